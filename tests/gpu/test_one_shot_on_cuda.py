"""Sums by the ranks' own kernel are torch's, eager and replayed, whoever is late. Needs two GPUs."""

import pytest
import torch

if torch.cuda.device_count() < 2:
    pytest.skip("needs two CUDA devices", allow_module_level=True)

from tests.bench.all_reduce import on_ranks
from tests.gpu.one_shot_sums import check_sums

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(90)]


def test_sums_are_those_of_torch() -> None:
    for wrong in on_ranks(2, "cuda", check_sums):
        assert wrong == {"sum": 0, "norm": 0, "replayed": 0}
