"""Logits equal those of transformers, which reads the same files with its own code."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from tests.unit.tensor_parallel_group import GlooSums
from workers.attention.backend import AttentionLayer
from workers.card import ModelCard, load_card
from workers.engine.forward_batch import ForwardBatch
from workers.models.weights import load_model
from workers.parallel import TPGroup, listen

CPU = torch.device("cpu")
VOCAB = 131
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 75,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
}
LINEAR = {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 500000.0,
}
# Chosen so that the ramp crosses several of the eight frequencies, and differently when not truncated
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 48,
    "rope_theta": 10000.0,
}
YARN_MSCALE = YARN | {
    "mscale": 0.7,
    "mscale_all_dim": 0.4,
    "beta_fast": 4,
    "beta_slow": 0.3,
    "truncate": False,
}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}


def llama(rope: dict, **changes) -> PreTrainedConfig:
    return LlamaConfig(**SHAPE | {"rope_parameters": rope} | changes)


def mistral(rope: dict, **changes) -> PreTrainedConfig:
    return MistralConfig(**SHAPE | {"rope_parameters": rope, "sliding_window": 5} | changes)


def qwen2(rope: dict, **changes) -> PreTrainedConfig:
    shape = {key: value for key, value in SHAPE.items() if key != "head_dim"}
    return Qwen2Config(**shape | {"rope_parameters": rope} | changes)


def qwen3(rope: dict, **changes) -> PreTrainedConfig:
    return Qwen3Config(**SHAPE | {"rope_parameters": rope} | changes)


SLIDING = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
CASES = {
    "llama": llama(PLAIN),
    "llama linear": llama(LINEAR),
    "llama llama3": llama(LLAMA3),
    "llama yarn": llama(YARN),
    "llama yarn mscale": llama(YARN_MSCALE),
    "llama biased tied": llama(PLAIN, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama one kv head": llama(LLAMA3, num_attention_heads=3, num_key_value_heads=1),
    "llama head_dim": llama(PLAIN, head_dim=24),
    "mistral sliding": mistral(PLAIN),
    "mistral sliding yarn": mistral(YARN),
    "mistral whole": mistral(LINEAR, sliding_window=None),
    "qwen2": qwen2(PLAIN),
    "qwen2 llama3 tied": qwen2(LLAMA3, tie_word_embeddings=True),
    "qwen2 yarn sliding": qwen2(YARN, **SLIDING),
    "qwen3": qwen3(PLAIN),
    "qwen3 linear tied": qwen3(LINEAR, tie_word_embeddings=True),
    "qwen3 yarn sliding biased": qwen3(YARN, attention_bias=True, **SLIDING),
}


class DenseAttention:
    """Causal attention over one sequence that is all there: no pool, no pages."""

    def plan(self, batch: ForwardBatch) -> None:
        raise AssertionError("the decoder never plans")

    def forward(
        self, layer: AttentionLayer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        assert q.shape[1:] == (layer.num_heads, layer.head_dim)
        assert k.shape[1:] == v.shape[1:] == (layer.num_kv_heads, layer.head_dim)
        age = torch.arange(len(q))[:, None] - torch.arange(len(q))[None, :]
        seen = (age >= 0) & (age < (layer.sliding_window or len(q)))
        group = layer.num_heads // layer.num_kv_heads
        out = functional.scaled_dot_product_attention(
            q.transpose(0, 1),
            k.repeat_interleave(group, 1).transpose(0, 1),
            v.repeat_interleave(group, 1).transpose(0, 1),
            attn_mask=seen,
            scale=layer.scale,
        )
        return out.transpose(0, 1).reshape(len(q), -1)


def save_random_model(config: PreTrainedConfig, folder: Path, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Norm weights and biases too: their defaults of 1 and 0 would hide their absence.
            parameter.normal_(0.0, parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.7)
    model.save_pretrained(folder)
    tokens = {f"t{index}": index for index in range(VOCAB)}
    Tokenizer(models.WordLevel(tokens, unk_token="t0")).save(str(folder / "tokenizer.json"))
    return model


def oracle_logits(model: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([token_ids])).logits[0].float()


def our_logits(card: ModelCard, token_ids: list[int], group: TPGroup) -> torch.Tensor:
    """Return those of the rank's own tokens."""
    model = load_model(card, group=group, device=CPU, dtype="float32")
    with torch.inference_mode():
        hidden = model.decoder(torch.tensor(token_ids), torch.arange(len(token_ids)), DenseAttention())
        return model.decoder.logits(hidden)


def run_ranks(size: int, work: Callable[[TPGroup], torch.Tensor]) -> torch.Tensor:
    """Run `work` on every rank of a real gloo group, one thread a rank; return the results side by side."""
    listener = listen("127.0.0.1")
    port = listener.getsockname()[1]
    results: dict[int, torch.Tensor] = {}
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            group = TPGroup.connect(
                rank, size, "127.0.0.1", port, timeout_s=30, listener=listener if rank == 0 else None
            )
            try:
                results[rank] = work(group)
            finally:
                group.close()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if errors:
        raise errors[0]
    return torch.cat([results[rank] for rank in range(size)], dim=-1)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    assert ours.dtype == torch.float32
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error < 1e-4, f"relative error {error:.2e}"


PROMPT = [7, 3, 99, 130, 0, 12, 12, 5, 64, 31, 88, 2, 45, 77, 101, 9, 54, 23, 118, 66]


@pytest.mark.parametrize("name", CASES)
def test_random_models_give_the_oracles_logits(name: str, tmp_path: Path) -> None:
    model = save_random_model(CASES[name], tmp_path)
    theirs = oracle_logits(model, PROMPT)
    card = load_card(str(tmp_path))
    assert_close(our_logits(card, PROMPT, TPGroup.single()), theirs)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("llama", 2),
        ("llama biased tied", 2),
        ("llama one kv head", 2),
        ("mistral sliding yarn", 2),
        ("qwen2 yarn sliding", 2),
        ("qwen3 yarn sliding biased", 2),
        ("llama biased tied", 4),
        ("llama one kv head", 4),
        ("qwen3", 3),
    ],
)
def test_tensor_parallel_logits_are_the_oracles(name: str, size: int, tmp_path: Path) -> None:
    model = save_random_model(CASES[name], tmp_path)
    theirs = oracle_logits(model, PROMPT)
    card = load_card(str(tmp_path))
    assert_close(run_ranks(size, lambda group: our_logits(card, PROMPT, group)), theirs)


@pytest.mark.parametrize("name", ["llama", "llama biased tied", "qwen2 yarn sliding"])
def test_sums_over_ranks_may_be_left_to_the_norms(name: str, tmp_path: Path) -> None:
    model = save_random_model(CASES[name], tmp_path)
    theirs = oracle_logits(model, PROMPT)
    card = load_card(str(tmp_path))
    sums: list[GlooSums] = []

    def work(group: TPGroup) -> torch.Tensor:
        sums.append(GlooSums(group))
        group.one_shot = sums[-1]
        return our_logits(card, PROMPT, group)

    assert_close(run_ranks(2, work), theirs)
    num_layers = card.config.num_layers
    num_biased = card.config.output_bias + card.config.mlp_bias  # of a layer's two: summed at once
    # The last one is read by no norm; the embedding's is of no layer.
    num_norms = num_layers * (2 - num_biased) - (not card.config.mlp_bias)
    assert {each.num_norms for each in sums} == {num_norms}
    assert {each.num_sums for each in sums} == {2 * num_layers - num_norms + 1}


TEXT = "The quick brown fox jumps over the lazy dog, and 12 more foxes follow it down to the river."


@pytest.fixture(scope="session")
def smollm2_oracle() -> tuple[list[int], torch.Tensor]:
    path = load_card("smollm2-135m").source
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    token_ids = Tokenizer.from_str(load_card("smollm2-135m").tokenizer_json).encode(TEXT).ids
    return token_ids, oracle_logits(model.eval(), token_ids)


def test_smollm2_gives_the_oracles_logits(smollm2_oracle: tuple[list[int], torch.Tensor]) -> None:
    token_ids, theirs = smollm2_oracle
    assert_close(our_logits(load_card("smollm2-135m"), token_ids, TPGroup.single()), theirs)


def test_smollm2_over_two_ranks_gives_the_oracles_logits(
    smollm2_oracle: tuple[list[int], torch.Tensor],
) -> None:
    token_ids, theirs = smollm2_oracle
    card = load_card("smollm2-135m")
    assert_close(run_ranks(2, lambda group: our_logits(card, token_ids, group)), theirs)
