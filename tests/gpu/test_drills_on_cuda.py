"""What may befall one of several ranks over NCCL: the group is rebuilt and goes on, nothing hangs too long.

Run by hand on a machine with GPUs for all ranks (--tp-size).
"""

import pytest

from tests import rank_drills
from tests.drills import Drill

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(150)]

NUM_REQUESTS = 192
OPTIONS = {
    "device": "cuda",
    "dtype": "bfloat16",
    "collective_timeout_s": 12.0,
    "max_tokens_per_step": 256,
    # Few, to be captured soon: each drill starts a group.
    "graph_batch_sizes": (8, 24),
    "graph_token_sizes": (64, 256),
}


@pytest.fixture(scope="module")
def drill(tmp_path_factory, cuda_tp_size):
    with Drill(
        "small", OPTIONS, tmp_path_factory.mktemp("drill"), tp_size=cuda_tp_size, max_prompt_len=120
    ) as drill:
        yield drill


@pytest.mark.parametrize("late", [1, 0])
def test_late_moves_and_completions_of_one_rank_change_no_answer(drill, late):
    rank_drills.check_late_moves_and_completions(drill, NUM_REQUESTS, late)


@pytest.mark.parametrize("refuses", [1, 0])
def test_a_refused_plan_ends_the_group_which_is_rebuilt(drill, refuses):
    rank_drills.check_refusal(drill, NUM_REQUESTS, refuses)


@pytest.mark.parametrize("killed", [1, 0])
def test_a_rank_killed_in_mid_replay_ends_the_group_which_is_rebuilt(drill, killed):
    rank_drills.check_killed_rank(drill, NUM_REQUESTS, killed)


@pytest.mark.parametrize("hangs", [1, 0])
def test_a_hanging_rank_ends_the_group_at_its_deadline(drill, hangs):
    rank_drills.check_hanging_rank(drill, NUM_REQUESTS, hangs)


@pytest.mark.timeout(300)
def test_with_a_draft(tmp_path, cuda_tp_size):
    with Drill(
        "small", OPTIONS | {"draft": "self", "draft_tokens": 3}, tmp_path, tp_size=cuda_tp_size
    ) as drill:
        rank_drills.check_late_moves_and_completions(drill, NUM_REQUESTS, 1)
        rank_drills.check_refusal(drill, NUM_REQUESTS, 1)
        rank_drills.check_killed_rank(drill, NUM_REQUESTS, 1)
