"""Weights from GGUF files of every supported type, against the gguf package and against transformers."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from transformers import AutoModelForCausalLM

from tests.unit.model_files import GGUFModel, Q
from workers.card import load_card
from workers.layers.rotary import inverse_frequencies
from workers.models.config import FrequencyFactors, Llama3Scaling, ModelError
from workers.models.weights import checkpoint_tensors, load_model
from workers.parallel import TPGroup

CPU = torch.device("cpu")
KINDS = [Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q4_1, Q.Q4_K, Q.Q6_K]


def decoder_of(path: Path, **changes):
    card = load_card(str(path))
    settings = {"group": TPGroup.single(), "device": CPU, "dtype": "float32"}
    return load_model(card, **settings | changes)


@pytest.mark.parametrize("kind", KINDS, ids=[kind.name for kind in KINDS])
def test_every_type_is_read_as_the_gguf_package_reads_it(kind, tmp_path: Path) -> None:
    path = GGUFModel(tmp_path / "m.gguf", "qwen2", [kind]).write()
    theirs = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    stored = theirs["blk.1.ffn_down.weight"]
    assert stored.tensor_type == kind
    expected = dequantize(stored.data, stored.tensor_type)
    decoder = decoder_of(path).decoder
    assert np.array_equal(decoder.layers[1].mlp.down.weight.numpy(), expected)
    assert np.abs(expected).max() > 0


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_mixed_types_give_the_weights_transformers_reads(
    architecture: str, tied: bool, tmp_path: Path
) -> None:
    # Eight types dealt to fifteen matrices or more: q and k of both layers get different ones.
    path = GGUFModel(tmp_path / "m.gguf", architecture, KINDS).write(tied=tied)
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    theirs = oracle.state_dict()
    layers = decoder_of(path).decoder.layers
    for index, layer in enumerate(layers):
        prefix = f"model.layers.{index}"
        names = [f"{prefix}.self_attn.{name}_proj" for name in "qkv"]
        assert torch.equal(layer.attention.qkv.weight, torch.cat([theirs[f"{n}.weight"] for n in names]))
        if architecture == "qwen2":
            assert torch.equal(layer.attention.qkv.bias, torch.cat([theirs[f"{n}.bias"] for n in names]))
        if architecture == "qwen3":
            assert torch.equal(layer.attention.q_norm.weight, theirs[f"{prefix}.self_attn.q_norm.weight"])
        assert torch.equal(layer.attention.output.weight, theirs[f"{prefix}.self_attn.o_proj.weight"])
        assert torch.equal(layer.mlp.down.weight, theirs[f"{prefix}.mlp.down_proj.weight"])
    ours = decoder_of(path).decoder
    assert torch.equal(ours.head.weight, theirs["lm_head.weight"])
    assert torch.equal(ours.embedding.weight, theirs["model.embed_tokens.weight"])
    assert (ours.head.weight is ours.embedding.weight) == tied


def test_rows_of_permuted_heads_may_be_read_in_any_piece(tmp_path: Path) -> None:
    path = GGUFModel(tmp_path / "m.gguf", "llama", [Q.Q8_0]).write()
    tensors = {tensor.name: tensor for tensor in checkpoint_tensors(load_card(str(path)))}
    q = tensors["model.layers.0.self_attn.q_proj.weight"]
    whole = q.rows(0, 256)
    assert torch.equal(torch.cat([q.rows(0, 5), q.rows(5, 70), q.rows(70, 129), q.rows(129, 256)]), whole)


def test_a_quantised_file_defaults_to_bfloat16_and_a_plain_one_to_its_own(tmp_path: Path) -> None:
    dtypes = {}
    for kind in (Q.Q4_0, Q.F16, Q.F32, Q.BF16):
        path = GGUFModel(tmp_path / f"{kind.name}.gguf", "llama", [kind]).write()
        dtypes[kind.name] = decoder_of(path, dtype="auto").dtype
    assert dtypes == {
        "Q4_0": torch.bfloat16,
        "F16": torch.float16,
        "F32": torch.float32,
        "BF16": torch.bfloat16,
    }


def test_llama3_scaling_stored_as_frequency_factors_equals_the_formula(tmp_path: Path) -> None:
    plain = load_card(str(GGUFModel(tmp_path / "a.gguf", "llama", [Q.F32]).write())).config
    expected, _ = inverse_frequencies(replace(plain, rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 64)))
    factors = (inverse_frequencies(plain)[0] / expected).numpy()

    def add_factors(writer) -> None:
        writer.add_tensor("rope_freqs.weight", factors)

    path = GGUFModel(tmp_path / "b.gguf", "llama", [Q.F32]).write(extra=add_factors)
    config = load_card(str(path)).config
    assert isinstance(config.rope_scaling, FrequencyFactors)
    assert torch.allclose(inverse_frequencies(config)[0], expected, rtol=1e-6)
    assert decoder_of(path).weights_digest


def test_a_file_cut_anywhere_is_called_truncated(tmp_path: Path) -> None:
    path = GGUFModel(tmp_path / "m.gguf", "llama", [Q.Q8_0]).write()
    content = path.read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [30, 200, 2_000, 5_000, len(content) // 2, len(content) - 1_000]:
        cut.write_bytes(content[:length])
        with pytest.raises(ModelError, match=r"cut\.gguf: truncated: .*fetch it again"):
            load_card(str(cut))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes is too short for a GGUF file"),
        (b"PK\x03\x04" + bytes(100), "not a GGUF file"),
        (b"GGUF" + bytes([9, 0, 0, 0]) + bytes(100), "GGUF version 9; versions 2 and 3"),
        (b"GGUF" + bytes([3, 0, 0, 0]) + bytes(16), "general.architecture is missing"),
    ],
)
def test_what_is_no_gguf_file_is_said_so(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message):
        load_card(str(path))


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    path = GGUFModel(tmp_path / "m.gguf", "llama", [Q.F32]).write(skip="blk.1.ffn_up.weight")
    with pytest.raises(ModelError, match=r"1 tensors are missing.*model\.layers\.1\.mlp\.up_proj\.weight"):
        decoder_of(path)


def test_a_tensor_of_no_known_part_is_named(tmp_path: Path) -> None:
    def add(writer) -> None:
        writer.add_tensor("blk.0.ssm_conv1d.weight", np.zeros(4, np.float32))

    path = GGUFModel(tmp_path / "m.gguf", "llama", [Q.F32]).write(extra=add)
    with pytest.raises(ModelError, match=r"blk\.0\.ssm_conv1d\.weight"):
        decoder_of(path)


def test_an_unsupported_type_is_refused_with_those_allowed(tmp_path: Path) -> None:
    model = GGUFModel(tmp_path / "m.gguf", "llama", [Q.F32])

    def add_blocks(writer) -> None:
        writer.add_tensor("blk.0.extra.weight", np.zeros((2, 24), np.uint8), raw_dtype=Q.Q5_1)

    with pytest.raises(ModelError, match=r"type Q5_1 are not supported; supported: F32, F16, BF16, Q8_0"):
        load_card(str(model.write(extra=add_blocks)))


def test_what_cannot_run_is_refused(tmp_path: Path) -> None:
    model = GGUFModel(tmp_path / "m.gguf", "llama", [Q.F32])
    cases = {
        "split.count": (2, "one part of a split file; merge the parts"),
        "llama.expert_count": (8, "a mixture of experts"),
        "llama.rope.dimension_count": (32, "is 32 of a head's 64 dimensions; RoPE over the whole head"),
    }
    for key, (value, message) in cases.items():
        path = model.write(extra=lambda writer, key=key, value=value: writer.add_uint32(key, value))
        with pytest.raises(ModelError, match=message):
            load_card(str(path))
    model.kv_heads = 3
    with pytest.raises(ModelError, match="4 attention heads; a multiple of the 3 KV heads"):
        load_card(str(model.write()))


def test_a_missing_key_and_a_foreign_architecture_are_named(tmp_path: Path) -> None:
    model = GGUFModel(tmp_path / "m.gguf", "llama", [Q.F32])
    with pytest.raises(ModelError, match=r"m\.gguf: llama\.embedding_length is missing"):
        load_card(str(model.write(skip="llama.embedding_length")))
    foreign = GGUFModel(tmp_path / "g.gguf", "gemma", [Q.F32]).write()
    with pytest.raises(
        ModelError, match=r"'gemma' is not supported; supported: llama, mistral, qwen2, qwen3"
    ):
        load_card(str(foreign))
