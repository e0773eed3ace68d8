"""Published drafts against their arithmetic written out, whole sequences at once, with dense attention."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.nn.functional import linear, silu

from tests.unit.draft_checkpoints import (
    HIDDEN,
    Weights,
    eagle3_weights,
    eagle_weights,
    mtp_weights,
    tables,
    target_weights,
    write_draft,
    write_target_with_mtp,
)
from tests.unit.draft_models import CPU, planned, pool_for, some_tokens, tiny_card, tiny_decoder
from tests.unit.tensor_parallel_group import GlooSums, on_ranks
from workers.attention.native import NativeAttention
from workers.attention.reference import ReferenceAttention
from workers.card import ModelCard, load_card
from workers.draft_card import read_draft_card
from workers.models.decoder import Decoder
from workers.models.draft import DraftModel
from workers.models.draft_weights import LoadedDraft, load_draft
from workers.models.weights import load_model
from workers.native.kernels import NativeKernels
from workers.parallel import TPGroup

EPS, THETA, HEADS, KV_HEADS, HEAD_DIM = 1e-5, 10000.0, 4, 2, 8


def load(folder: Path | str, target: ModelCard, decoder: Decoder, **changes) -> LoadedDraft:
    card = read_draft_card(str(folder), target)
    return load_draft(card, decoder, group=decoder.group, device=CPU, dtype=torch.float32, **changes)


# The oracle: plain functions of whole sequences, positions 0, 1, 2, ...


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight


def turn(x: torch.Tensor) -> torch.Tensor:
    """RoPE of [heads, tokens, dim] as complex numbers: the first half real, the second imaginary."""
    frequencies = THETA ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = torch.arange(x.shape[1])[:, None] * frequencies
    turned = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=-1)


def attend(x: torch.Tensor, weights: Weights, prefix: str) -> torch.Tensor:
    def project(name: str, heads: int) -> torch.Tensor:
        bias = weights.get(f"{prefix}{name}_proj.bias")
        y = linear(x, weights[f"{prefix}{name}_proj.weight"], bias)
        return y.view(len(x), heads, HEAD_DIM).transpose(0, 1)

    q, k, v = turn(project("q", HEADS)), turn(project("k", KV_HEADS)), project("v", KV_HEADS)
    k, v = (t.repeat_interleave(HEADS // KV_HEADS, dim=0) for t in (k, v))
    scores = q @ k.transpose(1, 2) * HEAD_DIM**-0.5
    scores = scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), float("-inf"))
    mixed = (scores.softmax(-1) @ v).transpose(0, 1).reshape(len(x), -1)
    return linear(mixed, weights[f"{prefix}o_proj.weight"])


def layer(stream: torch.Tensor, x: torch.Tensor, weights: Weights, prefix: str) -> torch.Tensor:
    """A decoder layer over `x`, already normalised or not, added to `stream`."""
    stream = stream + attend(x, weights, f"{prefix}self_attn.")
    y = norm(stream, weights[f"{prefix}post_attention_layernorm.weight"])
    gate, up, down = (weights[f"{prefix}mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    return stream + linear(silu(linear(y, gate)) * linear(y, up), down)


@dataclass
class Oracle:
    """`outputs` maps embeddings and features [T, HIDDEN] to what predicts the next tokens."""

    feature: Callable[[Decoder, list[torch.Tensor]], torch.Tensor]
    outputs: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    logits: Callable[[Decoder, torch.Tensor], torch.Tensor]


def last_hidden(decoder: Decoder, taps: list[torch.Tensor]) -> torch.Tensor:
    return norm(taps[-1], decoder.norm.weight)


def of_target(decoder: Decoder, hidden: torch.Tensor) -> torch.Tensor:
    return linear(hidden, decoder.head.weight)


def eagle_oracle(weights: Weights, num_layers: int) -> Oracle:
    def outputs(embedded: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        pair = torch.cat([embedded, features], dim=-1)
        stream = linear(pair, weights["fc.weight"], weights.get("fc.bias"))
        stream = layer(stream, stream, weights, "layers.0.")
        for index in range(1, num_layers):
            x = norm(stream, weights[f"layers.{index}.input_layernorm.weight"])
            stream = layer(stream, x, weights, f"layers.{index}.")
        return stream

    return Oracle(last_hidden, outputs, of_target)


def eagle3_oracle(weights: Weights, mid: str = "midlayer.", *, normed_stream: bool = False) -> Oracle:
    def feature(decoder: Decoder, taps: list[torch.Tensor]) -> torch.Tensor:
        return linear(torch.cat([taps[2], taps[3], taps[1]], dim=-1), weights["fc.weight"])

    def outputs(embedded: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        embedded = norm(embedded, weights[f"{mid}input_layernorm.weight"])
        normed = norm(features, weights[f"{mid}hidden_norm.weight"])
        stream = normed if normed_stream else features
        return layer(stream, torch.cat([embedded, normed], dim=-1), weights, mid)

    def logits(decoder: Decoder, hidden: torch.Tensor) -> torch.Tensor:
        return linear(norm(hidden, weights["norm.weight"]), weights["lm_head.weight"])

    return Oracle(feature, outputs, logits)


def mtp_oracle(weights: Weights, layout: str) -> Oracle:
    prefix = "model.mtp_layers.0." if layout == "mimo" else "model.layers.4."
    names = {
        "mimo": ("token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm"),
        "deepseek": ("enorm", "hnorm", "eh_proj", "shared_head.norm"),
    }[layout]
    token_norm, feature_norm, projection, last_norm = (weights[f"{prefix}{name}.weight"] for name in names)

    def outputs(embedded: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        pair = [norm(embedded, token_norm), norm(features, feature_norm)]
        stream = linear(torch.cat(pair[::-1] if layout == "mimo" else pair, dim=-1), projection)
        x = norm(stream, weights[f"{prefix}input_layernorm.weight"])
        return norm(layer(stream, x, weights, prefix), last_norm)

    return Oracle(last_hidden, outputs, of_target)


@dataclass
class Case:
    target: ModelCard
    folder: Path
    oracle: Oracle


def eagle3_case(folder: Path, *, mid: str = "midlayer.", prefix: str = "", **changes) -> Case:
    """Taps in the order 2, 3, 1, which the configuration says: EAGLE's own would be 1, 2, 3 here."""
    weights = eagle3_weights(mid, prefix)
    settings = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "draft_vocab_size": 60,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [2, 3, 1]},
    }
    oracle = eagle3_oracle(
        {name.removeprefix(prefix): value for name, value in weights.items()},
        mid,
        normed_stream=changes.get("norm_before_residual", False),
    )
    return Case(
        tiny_card(folder / "target"), write_draft(folder / "draft", weights, **settings | changes), oracle
    )


def make_case(kind: str, folder: Path) -> Case:
    if kind in ("deepseek", "mimo"):
        path = write_target_with_mtp(folder, kind)
        return Case(load_card(str(path)), path, mtp_oracle(mtp_weights(kind), kind))
    if kind == "eagle3":
        return eagle3_case(folder)
    if kind == "eagle3 as layers.0":
        return eagle3_case(folder, mid="layers.0.", architectures=["Eagle3LlamaForCausalLM"])
    if kind == "eagle3 of SafeAILab":
        return eagle3_case(folder, architectures=["LlamaForCausalLM"])
    if kind == "eagle3 under model":
        return eagle3_case(folder, prefix="model.")
    if kind == "eagle3 with a normed stream":
        return eagle3_case(folder, norm_before_residual=True)
    num_layers = 3 if kind == "eagle of three layers" else 1
    weights = eagle_weights(num_layers, bias=kind != "eagle without bias")
    path = write_draft(
        folder / "draft", weights, num_hidden_layers=num_layers, pickled=kind == "eagle pickled"
    )
    return Case(tiny_card(folder / "target"), path, eagle_oracle(weights, num_layers))


KINDS = [
    "eagle",
    "eagle without bias",
    "eagle of three layers",
    "eagle pickled",
    "eagle3",
    "eagle3 as layers.0",
    "eagle3 of SafeAILab",
    "eagle3 under model",
    "eagle3 with a normed stream",
    "deepseek",
    "mimo",
]


def entries_of(features: torch.Tensor) -> torch.Tensor:
    """Return the features of the tokens before, zeros for the first."""
    return torch.cat([torch.zeros_like(features[:1]), features[:-1]])


@pytest.mark.parametrize("kind", KINDS)
def test_a_draft_computes_what_its_paper_says(kind: str, tmp_path: Path) -> None:
    case = make_case(kind, tmp_path)
    decoder = tiny_decoder(case.target)
    draft = load(case.folder, case.target, decoder).model
    attention = ReferenceAttention(pool_for(decoder))
    numbers = [layer.index for layer in draft.attention_layers]
    assert numbers == list(range(4, 4 + len(numbers)))
    tokens = some_tokens(7)
    _, taps = decoder.forward_tapped(tokens, planned(attention, 7), attention, draft.feature_layers)
    _, all_taps = decoder.forward_tapped(tokens, planned(attention, 7), attention, range(5))
    features = draft.feature(taps)
    torch.testing.assert_close(features, case.oracle.feature(decoder, all_taps))
    assert features.shape == (7, draft.feature_size)

    # Two chunks of known tokens, one of which is but kept, then drafting on its own output.
    entries = entries_of(features)
    draft.extend(tokens[:3], entries[:3].contiguous(), planned(attention, 3), attention)
    hidden = draft.forward(tokens[3:], entries[3:].contiguous(), planned(attention, 4, 3), attention)[-1:]
    for length in range(7, 11):
        wanted = case.oracle.outputs(decoder.embedding(tokens), entries)[-1:]
        torch.testing.assert_close(hidden, wanted, rtol=1e-4, atol=1e-5)
        logits = draft.logits(hidden)
        torch.testing.assert_close(logits, case.oracle.logits(decoder, wanted), rtol=1e-4, atol=1e-5)
        assert logits is not None and logits.shape == (1, draft.draft_vocab_size)
        token = draft.target_ids(logits.argmax(-1))
        tokens = torch.cat([tokens, token])
        entries = torch.cat([entries, draft.next_feature(hidden)])
        hidden = draft.forward(token, entries[-1:], planned(attention, 1, length), attention)


def test_target_ids_are_draft_ids_and_their_offsets(tmp_path: Path) -> None:
    case = make_case("eagle3", tmp_path)
    draft = load(case.folder, case.target, tiny_decoder(case.target)).model
    wanted = tables()["t2d"].nonzero().flatten()
    assert torch.equal(draft.target_ids(torch.arange(60)), wanted)
    assert torch.equal(draft.target_ids(torch.tensor([[0, 59], [7, 7]])), wanted[[0, 59, 7, 7]].view(2, 2))


def test_what_a_checkpoint_lacks_is_the_targets_own_storage(tmp_path: Path) -> None:
    target = tiny_card(tmp_path / "target")
    decoder = tiny_decoder(target)
    draft = load(write_draft(tmp_path / "draft", eagle_weights()), target, decoder).model
    assert draft.ends.embedding is decoder.embedding and draft.ends.head is decoder.head
    mtp = make_case("deepseek", tmp_path / "mtp")
    decoder = tiny_decoder(mtp.target)
    draft = load(mtp.folder, mtp.target, decoder).model
    assert draft.ends.embedding is decoder.embedding and draft.ends.head is decoder.head


def test_a_copy_of_the_targets_embedding_is_given_up_and_another_is_kept(tmp_path: Path) -> None:
    target = tiny_card(tmp_path / "target")
    decoder = tiny_decoder(target)
    copy = {"embed_tokens.weight": decoder.embedding.weight.detach().clone()}
    folder = write_draft(tmp_path / "copy", eagle_weights() | copy)
    assert load(folder, target, decoder).model.ends.embedding is decoder.embedding
    other = {"embed_tokens.weight": copy["embed_tokens.weight"] * 2}
    draft = load(write_draft(tmp_path / "own", eagle_weights() | other), target, decoder).model
    assert torch.equal(draft.ends.embedding.weight, other["embed_tokens.weight"])


@pytest.mark.parametrize("layout", ["deepseek", "mimo"])
def test_a_target_loads_from_the_files_it_shares_with_its_mtp_layer(layout: str, tmp_path: Path) -> None:
    case = make_case(layout, tmp_path)
    decoder = load_model(case.target, group=TPGroup.single(), device=CPU).decoder
    assert len(decoder.layers) == 4
    assert torch.equal(decoder.norm.weight, target_weights(biased=layout == "mimo")["model.norm.weight"])
    assert load(case.folder, case.target, decoder).model.ends.embedding is decoder.embedding


def test_a_draft_may_be_narrower_than_its_target(tmp_path: Path) -> None:
    settings = {"hidden_size": 2 * HIDDEN, "intermediate_size": 80, "head_dim": 16}
    target = tiny_card(tmp_path / "target", **settings)
    weights = eagle3_weights() | {"fc.weight": torch.randn(HIDDEN, 6 * HIDDEN)}
    weights["embed_tokens.weight"] = torch.randn(300, HIDDEN)
    changes = {"draft_vocab_size": 60, "target_hidden_size": 2 * HIDDEN}
    decoder = tiny_decoder(target)
    draft = load(write_draft(tmp_path / "draft", weights, **changes), target, decoder).model
    assert draft.feature_size == HIDDEN
    assert draft.feature([torch.randn(5, 2 * HIDDEN)] * 3).shape == (5, HIDDEN)


def drafted(draft: DraftModel, decoder: Decoder, attention) -> list[torch.Tensor]:
    """Return features, output and this rank's logits of a short sequence whose first tokens are but kept."""
    tokens = some_tokens(9)
    _, taps = decoder.forward_tapped(tokens, planned(attention, 9), attention, draft.feature_layers)
    features = draft.feature(taps)
    entries = entries_of(features)
    draft.extend(tokens[:4], entries[:4].contiguous(), planned(attention, 4), attention)
    hidden = draft.forward(tokens[4:], entries[4:].contiguous(), planned(attention, 5, 4), attention)
    return [features, hidden, draft.logits(hidden)]


@pytest.mark.parametrize("kind", ["eagle of three layers", "eagle3", "mimo", "random-eagle3"])
@pytest.mark.parametrize("sums_late", [False, True])
def test_two_ranks_compute_what_one_does(kind: str, sums_late: bool, tmp_path: Path) -> None:
    if kind == "random-eagle3":  # 3 KV heads: the second rank has a zero head
        heads = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8}
        target, folder = tiny_card(tmp_path, **heads), "random-eagle3"
    else:
        case = make_case(kind, tmp_path)
        target, folder = case.target, case.folder

    def work(group: TPGroup) -> tuple[str, list[torch.Tensor]]:
        if sums_late and group.size > 1:
            group.one_shot = GlooSums(group)
        decoder = tiny_decoder(target, group)
        loaded = load(folder, target, decoder)
        return loaded.weights_digest, drafted(loaded.model, decoder, ReferenceAttention(pool_for(decoder)))

    digest, whole = work(TPGroup.single())
    first, second = on_ranks(2, work)
    assert first[0] == second[0] == digest
    for mine, theirs, wanted in zip(first[1][:2], second[1][:2], whole[:2], strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(theirs, wanted, rtol=1e-4, atol=1e-5)
    parts = torch.cat([first[1][2], second[1][2]], dim=1)
    torch.testing.assert_close(parts, whole[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["eagle of three layers", "eagle3", "deepseek", "self"])
def test_compiled_kernels_are_adopted_beside_the_targets(kind: str, tmp_path: Path) -> None:
    case = make_case("eagle3" if kind == "self" else kind, tmp_path)
    decoder = tiny_decoder(case.target)
    draft = load("self" if kind == "self" else case.folder, case.target, decoder).model
    wanted = drafted(draft, decoder, ReferenceAttention(pool_for(decoder)))
    kernels = NativeKernels.load()
    decoder.adopt(kernels)
    draft.adopt(kernels)
    found = drafted(draft, decoder, NativeAttention(pool_for(decoder), kernels))
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_random_drafts_are_seeded_and_speak_of_tokens_all_over_the_vocabulary(tmp_path: Path) -> None:
    target = tiny_card(tmp_path, vocab_size=9000)
    decoder = tiny_decoder(target)
    one, again, other = (load("random-eagle3", target, decoder, seed=seed) for seed in (1, 1, 2))
    assert one.weights_digest == again.weights_digest != other.weights_digest
    assert one.model.draft_vocab_size == 4096
    ids = one.model.target_ids(torch.arange(4096))
    assert (ids.diff() > 0).all() and ids[-1] >= 8990
    found = [drafted(d.model, decoder, ReferenceAttention(pool_for(decoder)))[2] for d in (one, again, other)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    small = tiny_card(tmp_path / "small")
    draft = load("random-eagle3", small, tiny_decoder(small)).model
    assert torch.equal(draft.target_ids(torch.arange(300)), torch.arange(300))
