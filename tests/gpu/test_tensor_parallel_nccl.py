"""A TP group over NCCL, one process a GPU. Run by hand on a machine with GPUs: pytest -m gpu tests/gpu"""

import pytest

from tests.unit.tensor_parallel_group import Ranks

pytestmark = pytest.mark.gpu


def test_ranks_sum_gather_and_replay_a_captured_sum(cuda_tp_size: int) -> None:
    ranks = Ranks()
    try:
        ranks.start("work", device="cuda", size=cuda_tp_size)
        said = ranks.finish()
    finally:
        ranks.close()
    total = sum(range(1, cuda_tp_size + 1))
    assert all(each["sum"] == [[total] * 3] * 2 for each in said)
    gathered = [[rank, 10.0 + rank] for rank in range(cuda_tp_size)]
    assert [each["gathered"] for each in said] == [gathered] * cuda_tp_size
    assert all(
        each["graphed"]
        == [sum(1.0 + r for r in range(cuda_tp_size)), sum(5.0 + r for r in range(cuda_tp_size))]
        for each in said
    )
    assert all(each["plans"] == [True, True, True] for each in said[1:])
    assert all(each["closed"] for each in said)
