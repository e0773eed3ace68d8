"""Safetensors and dummy weights: what is loaded, the digest over all bytes, memory, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.unit.model_files import CONFIG, write_directory
from tests.unit.tensor_parallel_group import on_ranks
from workers.card import load_card
from workers.models.config import ModelError
from workers.models.decoder import Decoder
from workers.models.weights import LoadedModel, load_model
from workers.parallel import TPGroup

CPU = torch.device("cpu")


def tensors(seed: int = 0, **changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Return random bfloat16 weights for CONFIG, by Hugging Face names. A change to None drops a tensor."""
    generator = torch.Generator().manual_seed(seed)
    hidden, inner, vocab = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["vocab_size"]
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "lm_head.weight": (vocab, hidden)}
    shapes["model.norm.weight"] = (hidden,)
    for layer in range(CONFIG["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
            f"{prefix}.self_attn.q_proj.weight": (hidden, hidden),
            f"{prefix}.self_attn.k_proj.weight": (hidden // 2, hidden),
            f"{prefix}.self_attn.v_proj.weight": (hidden // 2, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, hidden),
            f"{prefix}.mlp.gate_proj.weight": (inner, hidden),
            f"{prefix}.mlp.up_proj.weight": (inner, hidden),
            f"{prefix}.mlp.down_proj.weight": (hidden, inner),
        }
    made = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    made |= {name: value for name, value in changes.items() if value is not None}
    return {name: value for name, value in made.items() if name not in changes or changes[name] is not None}


def write_model(folder: Path, weights: dict[str, torch.Tensor], **changes) -> Path:
    write_directory(folder, **changes)
    save_file(weights, folder / "model.safetensors")
    return folder


def load(folder: Path, group: TPGroup | None = None, **changes) -> LoadedModel:
    return load_model(load_card(str(folder)), group=group or TPGroup.single(), device=CPU, **changes)


def test_weights_keep_the_checkpoints_dtype_unless_told_otherwise(tmp_path: Path) -> None:
    weights = tensors()
    folder = write_model(tmp_path, weights)
    loaded = load(folder)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded.decoder.head.weight, weights["lm_head.weight"])
    gate_up = [weights[f"model.layers.1.mlp.{name}_proj.weight"] for name in ("gate", "up")]
    assert torch.equal(loaded.decoder.layers[1].mlp.gate_up.weight, torch.cat(gate_up))
    wide = load(folder, dtype="float32")
    assert wide.dtype == torch.float32
    assert torch.equal(wide.decoder.head.weight, weights["lm_head.weight"].float())


def test_a_sharded_index_is_followed(tmp_path: Path) -> None:
    weights = tensors()
    whole = load(write_model(tmp_path / "whole", weights)).decoder.state_dict()
    folder = write_directory(tmp_path / "sharded")
    names = sorted(weights)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: weights[name] for name in part}, folder / file)
    # A file the index does not name, as some repositories ship the same weights twice
    save_file({"tok_embeddings.weight": torch.zeros(4)}, folder / "consolidated.safetensors")
    weight_map = {name: file for file, part in files.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    sharded = load(folder).decoder.state_dict()
    assert whole.keys() == sharded.keys()
    assert all(torch.equal(whole[name], sharded[name]) for name in whole)
    (folder / "b.safetensors").unlink()
    with pytest.raises(ModelError, match=r"index\.json: names b\.safetensors, which .* lacks"):
        load(folder)


def test_the_digest_covers_every_byte_on_every_rank(tmp_path: Path) -> None:
    weights = tensors()
    folder = write_model(tmp_path / "a", weights)
    digest = load(folder).weights_digest
    assert load(write_model(tmp_path / "b", weights)).weights_digest == digest
    ranks = on_ranks(2, lambda group: load(folder, group))
    assert [rank.weights_digest for rank in ranks] == [digest, digest]
    # One value of one tensor, in turn in the shard of each rank
    for row in (0, 47):
        name = "model.layers.1.mlp.up_proj.weight"
        changed = weights[name].clone()
        changed[row, 3] += 1
        other = write_model(tmp_path / f"changed{row}", weights | {name: changed})
        ranks = on_ranks(2, lambda group, folder=other: load(folder, group))
        assert ranks[0].weights_digest == ranks[1].weights_digest != digest


def test_the_digest_tells_equal_bytes_under_other_names_apart(tmp_path: Path) -> None:
    weights = tensors()
    first, second = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight"
    swapped = weights | {first: weights[second], second: weights[first]}
    digests = {
        load(write_model(tmp_path / str(i), w)).weights_digest for i, w in enumerate((weights, swapped))
    }
    assert len(digests) == 2


def test_a_rank_holds_its_shard_and_nothing_else(tmp_path: Path) -> None:
    weights = tensors()
    ranks = on_ranks(2, lambda group: load(write_model(tmp_path / str(group.rank), weights), group))
    whole = sum(weight.numel() for weight in weights.values())
    norms = sum(weight.numel() for name, weight in weights.items() if "norm" in name)
    for rank in ranks:
        held = sum(parameter.numel() for parameter in rank.decoder.parameters())
        assert held == (whole - norms) // 2 + norms
    down = [rank.decoder.layers[0].mlp.down.weight for rank in ranks]
    assert torch.equal(torch.cat(down, dim=1), weights["model.layers.0.mlp.down_proj.weight"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.norm.weight": None}, r"1 tensors are missing, among them model\.norm\.weight"),
        ({"lm_head.weight": None}, r"1 tensors are missing, among them lm_head\.weight"),
        (
            {"model.norm.weight": torch.ones(31)},
            r"model\.norm\.weight has shape \(31,\); the configuration needs \(32,\)",
        ),
        ({"model.layers.2.mlp.up_proj.weight": torch.ones(48, 32)}, r"layers\.2\..* belongs to no part"),
        ({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}, r"q_proj\.bias belongs to no part"),
    ],
)
def test_what_does_not_fit_the_configuration_is_named(changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        load(write_model(tmp_path, tensors(**changes)))


def test_a_tied_models_spare_head_and_derived_tables_are_passed_over(tmp_path: Path) -> None:
    spare = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    folder = write_model(tmp_path, tensors() | spare, tie_word_embeddings=True)
    decoder = load(folder).decoder
    assert decoder.head.weight is decoder.embedding.weight


def test_a_cut_or_foreign_file_is_named(tmp_path: Path) -> None:
    folder = write_model(tmp_path, tensors())
    path = folder / "model.safetensors"
    content = path.read_bytes()
    for length in (0, 4, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ModelError, match=r"model\.safetensors: not a whole safetensors file.*truncated"):
            load(folder)
    path.write_bytes(b"\x80\x02}q\x00." * 100)
    with pytest.raises(ModelError, match=r"model\.safetensors: not a whole"):
        load(folder)
    path.unlink()
    with pytest.raises(ModelError, match=r"no \*\.safetensors file"):
        load(folder)


def test_dummy_weights_are_seeded_and_the_same_for_any_number_of_ranks(tmp_path: Path) -> None:
    folder = write_directory(tmp_path)
    first = load(folder, load_format="dummy", seed=3)
    again = load(folder, load_format="dummy", seed=3)
    other = load(folder, load_format="dummy", seed=4)
    assert first.weights_digest == again.weights_digest != other.weights_digest
    assert torch.equal(first.decoder.head.weight, again.decoder.head.weight)
    assert not torch.equal(first.decoder.head.weight, other.decoder.head.weight)
    ranks = on_ranks(2, lambda group: load(folder, group, load_format="dummy", seed=3))
    assert {rank.weights_digest for rank in ranks} == {first.weights_digest}
    for name in ("embedding", "head"):
        shards = [getattr(rank.decoder, name).weight for rank in ranks]
        assert torch.equal(torch.cat(shards), getattr(first.decoder, name).weight)
    outputs = [rank.decoder.layers[1].attention.output.weight for rank in ranks]
    assert torch.equal(torch.cat(outputs, dim=1), first.decoder.layers[1].attention.output.weight)


def test_dummy_weights_of_another_shape_have_another_digest(tmp_path: Path) -> None:
    digests = {
        load(write_directory(tmp_path / str(theta), rope_theta=theta), load_format="dummy").weights_digest
        for theta in (1e4, 1e5)
    }
    assert len(digests) == 2


MEASURE = """
import re, sys, torch
from pathlib import Path
from workers.card import load_card
from workers.models.weights import load_model
from workers.parallel import TPGroup

def status(field):
    return int(re.search(rf"{field}:\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024

card = load_card(sys.argv[1])
before = status("VmRSS")
model = load_model(card, group=TPGroup.single(), device=torch.device("cpu"))
print(status("VmHWM") - before)
"""


def test_loading_takes_the_weights_and_at_most_one_shard_of_memory(tmp_path: Path) -> None:
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4, "num_key_value_heads": 4}
    folder = write_directory(tmp_path, **shape)
    decoder = Decoder(load_card(str(folder)).config, dtype=torch.bfloat16, device=CPU, group=TPGroup.single())
    weight_map, sizes = {}, []
    for shard in range(4):
        part = {
            name: torch.ones(placement.shape, dtype=torch.bfloat16)
            for name, placement in decoder.placements().items()
            if f".layers.{shard}." in name or (shard == 0 and ".layers." not in name)
        }
        save_file(part, folder / f"{shard}.safetensors")
        weight_map |= dict.fromkeys(part, f"{shard}.safetensors")
        sizes.append(sum(tensor.nbytes for tensor in part.values()))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        cwd=Path(__file__).parents[2],
    )
    taken, weights_bytes, shard_bytes = int(result.stdout), sum(sizes), max(sizes)
    assert weights_bytes > 4 * (32 << 20)
    assert weights_bytes <= taken <= weights_bytes + shard_bytes + (16 << 20)
