"""What may befall one rank of a group: it is rebuilt and goes on, and nothing hangs past its deadline."""

import pytest

from tests import rank_drills
from tests.drills import Drill

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

NUM_REQUESTS = 48
OPTIONS = {"device": "cpu", "dtype": "float32", "collective_timeout_s": 6.0, "max_tokens_per_step": 64}


@pytest.fixture(scope="module")
def drill(tmp_path_factory, tp_size):
    with Drill("tiny", OPTIONS, tmp_path_factory.mktemp("drill"), tp_size=tp_size) as drill:
        yield drill


@pytest.mark.parametrize("late", [1, 0])
def test_late_moves_and_completions_of_one_rank_change_no_answer(drill, late):
    rank_drills.check_late_moves_and_completions(drill, NUM_REQUESTS, late)


@pytest.mark.parametrize("refuses", [1, 0])
def test_a_refused_plan_ends_the_group_which_is_rebuilt(drill, refuses):
    rank_drills.check_refusal(drill, NUM_REQUESTS, refuses)


@pytest.mark.parametrize("killed", [1, 0])
def test_a_killed_rank_ends_the_group_which_is_rebuilt(drill, killed):
    rank_drills.check_killed_rank(drill, NUM_REQUESTS, killed)


@pytest.mark.parametrize("hangs", [1, 0])
def test_a_hanging_rank_ends_the_group_at_its_deadline(drill, hangs):
    rank_drills.check_hanging_rank(drill, NUM_REQUESTS, hangs)


def test_with_a_draft(tmp_path, tp_size):
    with Drill("tiny", OPTIONS | {"draft": "self", "draft_tokens": 3}, tmp_path, tp_size=tp_size) as drill:
        rank_drills.check_late_moves_and_completions(drill, NUM_REQUESTS, 1)
        rank_drills.check_refusal(drill, NUM_REQUESTS, 1)
        rank_drills.check_killed_rank(drill, NUM_REQUESTS, 1)
