"""A TP group over NCCL, one process a GPU. Run by hand on a machine with two GPUs: pytest -m gpu tests/gpu"""

import pytest
import torch

from tests.unit.tensor_parallel_group import Ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


def test_ranks_sum_gather_and_replay_a_captured_sum() -> None:
    ranks = Ranks()
    try:
        ranks.start("work", device="cuda")
        first, second = ranks.finish()
    finally:
        ranks.close()
    assert first["sum"] == second["sum"] == [[3.0] * 3] * 2
    assert first["gathered"] == [[0.0, 10.0, 1.0, 11.0]]
    assert second["gathered"] is None
    assert first["graphed"] == second["graphed"] == [3.0, 11.0]
    assert first["tokens"] == second["tokens"] == [7, 8, 9]
    assert second["plans"] == [True, True, True]
    assert first["closed"] and second["closed"]
