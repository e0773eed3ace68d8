"""Sums by the ranks' own kernel are torch's, eager and replayed, whoever is late. Needs a GPU a rank."""

import pytest

from tests.bench.all_reduce import on_ranks

MAX_ENDING_S = 1.0
"""Two kernels, of 1,024 looks each"""

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(90)]


def test_sums_are_those_of_torch(cuda_tp_size) -> None:
    from tests.gpu.one_shot_sums import check_sums  # imports Triton

    for wrong in on_ranks(cuda_tp_size, "cuda", check_sums):
        assert wrong == {"sum": 0, "norm": 0, "best": 0, "replayed": 0}


def test_who_waits_for_a_rank_that_is_gone_is_ended_at_once(cuda_tp_size) -> None:
    from tests.gpu.one_shot_sums import sum_alone  # imports Triton

    assert on_ranks(cuda_tp_size, "cuda", sum_alone)[0]["ended_after_s"] < MAX_ENDING_S
