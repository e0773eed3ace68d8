"""Ranks over NCCL, a process and a card each: tokens of one rank, with graphs and without, with drafts.

What one rank says is the reference of each round of the storm (tests/gpu/storm_compare.py): it runs without
the tier, the draft and the other ranks. Run by hand on a machine with GPUs for all of them (--tp-size).
"""

import pytest

from tests.bench.follower_ranks import FollowerRanks
from tests.gpu.storm import Leg, Round, parser
from tests.gpu.storm_progress import mean_accept_len

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]

QUIET = ["--shape", "small", "--requests", "96", "--concurrency", "24", "--max-prompt-len", "120"]
QUIET += ["--injection", "off", "--max-tokens-per-step", "256", "--page-size", "8"]
# Few, to be captured soon.
QUIET += ["--graph-batch-sizes", "[4, 12, 24]", "--graph-token-sizes", "[64, 256]"]
DRAFTING = {
    None: [],
    "self": ["--draft", "self"],
    "random": ["--draft", "random-eagle3"],
    "tree": ["--draft", "self", "--draft-topk", "3"],
}
MAX_ACCEPT_RATIO = 0.05
"""Between accept lengths of equal requests: bfloat16 rounds otherwise with other ranks, and each tie makes
another text of a sampled answer."""


@pytest.fixture(scope="module")
def followers(cuda_tp_size):
    with FollowerRanks(cuda_tp_size - 1, "cuda") as followers:
        yield followers


def play(followers: FollowerRanks | None, *arguments: str) -> Round:
    """Play a round of the storm, its host cache, evictions, sanitizer and reference."""
    tp_size = 1 if followers is None else followers.num_ranks + 1
    given = parser().parse_args([*QUIET, "--draft-tokens", "3", "--tp-size", str(tp_size), *arguments])
    with Leg(0, given, followers=followers) as leg:
        found = leg.play(0, given)
    assert not found.violations, found.violations
    assert found.num_compared_tokens > 300 and found.num_evictions
    return found


def replayed_ratio(found: Round, mode: str) -> float:
    counts = {name.split()[1]: count for name, count in found.outcomes.items() if name.split()[0] == mode}
    return 1 - counts.get("eager", 0) / sum(counts.values())


@pytest.mark.parametrize("draft", DRAFTING)
def test_tokens_are_those_of_one_rank_and_captured_collectives_are_replayed(followers, draft) -> None:
    found = play(followers, *DRAFTING[draft])
    assert replayed_ratio(found, "decode" if draft is None else "verify") == 1.0, found.outcomes


@pytest.mark.parametrize("draft", DRAFTING)
def test_tokens_are_those_of_one_rank_without_graphs(followers, draft) -> None:
    found = play(followers, "--graphs", "off", *DRAFTING[draft])
    assert {name.split()[1] for name in found.outcomes} == {"eager"}


@pytest.mark.parametrize("draft", ["self", "random", "tree"])
def test_as_many_drafts_are_right_as_on_one_rank(followers, draft) -> None:
    several, one = (mean_accept_len([play(ranks, *DRAFTING[draft])]) for ranks in (followers, None))
    assert several is not None and one is not None
    assert abs(several / one - 1) < MAX_ACCEPT_RATIO, (several, one)


def test_tokens_are_those_of_one_rank_in_the_reference_s_attention(followers) -> None:
    play(followers, "--attention-backend", "reference", "--requests", "48")


def test_a_model_whose_heads_do_not_divide_is_padded(followers) -> None:
    """9 query heads and 3 of KV: two ranks compute 12 and 4."""
    play(followers, "--shape", "smol135m")
