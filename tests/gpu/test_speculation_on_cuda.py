"""A draft on CUDA: the same tokens as without, steps replayed, whatever it is worth."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from tests.gpu.storm import Leg, Round, parser

pytestmark = pytest.mark.gpu

QUIET = ["--shape", "small", "--requests", "96", "--concurrency", "24", "--max-prompt-len", "120"]
QUIET += ["--injection", "off", "--max-tokens-per-step", "256", "--draft-tokens", "3"]


def play(*arguments: str) -> tuple[Leg, Round]:
    """Play a round of the storm, its host cache, evictions, sanitizer and reference without a draft."""
    given = parser().parse_args([*QUIET, *arguments])
    with Leg(0, given) as leg:
        return leg, leg.play(0, given)


def replay_ratios(leg: Leg) -> dict[str, float]:
    counts: dict[str, list[int]] = {}
    for (part, outcome), count in leg.rank.engine.graph_steps.items():
        of = counts.setdefault(part, [0, 0])
        of[0] += count * (outcome != "eager")
        of[1] += count
    return {part: replayed / total for part, (replayed, total) in counts.items()}


def mean_accept_len(leg: Leg) -> float:
    lengths = leg.rank.scheduler.stats.accept_lengths
    return sum(length * count for (_, length), count in lengths.items()) / sum(lengths.values())


@pytest.mark.parametrize("page_size", ["1", "4", "16"])
@pytest.mark.parametrize("draft", ["self", "random-eagle3"])
def test_answers_are_those_without_a_draft_and_steps_are_replayed(draft: str, page_size: str) -> None:
    leg, found = play("--draft", draft, "--page-size", page_size)
    assert not found.violations, found.violations
    assert found.num_compared_tokens > 300
    assert found.num_loaded_pages and found.num_evictions
    ratios = replay_ratios(leg)
    assert ratios["verify"] == ratios["draft"] == 1.0, ratios
    assert ratios["draft_extend"] > 0.9, ratios  # long prefills are eager
    # Half of the answers are sampled, where the likeliest token is often not the right one.
    assert (mean_accept_len(leg) > 1.6) if draft == "self" else (mean_accept_len(leg) < 1.4)


@pytest.mark.parametrize("topk", ["2", "5"])
@pytest.mark.parametrize("page_size", ["1", "16"])
@pytest.mark.parametrize("draft", ["self", "random-eagle3"])
def test_trees_too(draft: str, page_size: str, topk: str) -> None:
    leg, found = play("--draft", draft, "--page-size", page_size, "--draft-topk", topk)
    assert not found.violations, found.violations
    assert found.num_compared_tokens > 300
    assert found.num_loaded_pages and found.num_evictions
    ratios = replay_ratios(leg)
    assert ratios["verify"] == ratios["draft"] == 1.0, ratios
    assert (mean_accept_len(leg) > 1.6) if draft == "self" else (mean_accept_len(leg) < 1.8)


@pytest.mark.parametrize(
    "options",
    [["--graphs", "off"], ["--attention-backend", "reference"], ["--draft-attention-backend", "reference"]],
)
def test_trees_of_eager_steps_and_other_attention(options: list[str]) -> None:
    leg, found = play("--draft", "self", "--page-size", "8", "--draft-topk", "3", *options)
    assert not found.violations, found.violations
    assert mean_accept_len(leg) > 1.6


@pytest.mark.parametrize("options", [["--graphs", "off"], ["--attention-backend", "reference"]])
def test_eager_steps_draft_too(options: list[str]) -> None:
    leg, found = play("--draft", "self", "--page-size", "8", *options)
    assert not found.violations, found.violations
    assert mean_accept_len(leg) > 1.6
    assert set(replay_ratios(leg).values()) == {0.0}


def test_a_draft_whose_attention_is_apart() -> None:
    leg, found = play("--draft", "self", "--page-size", "8", "--draft-attention-backend", "reference")
    assert not found.violations, found.violations
    assert mean_accept_len(leg) > 1.6
    ratios = replay_ratios(leg)
    assert ratios["verify"] == 1.0 and ratios["draft"] == ratios["draft_extend"] == 0.0, ratios
