"""Sums by the ranks' own kernel are torch's, eager and replayed, whoever is late. Needs a GPU a rank."""

import pytest

from tests.bench.all_reduce import on_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(90)]


def test_sums_are_those_of_torch(tp_size) -> None:
    from tests.gpu.one_shot_sums import check_sums  # imports Triton

    for wrong in on_ranks(tp_size, "cuda", check_sums):
        assert wrong == {"sum": 0, "norm": 0, "replayed": 0}
