"""Agreeing by way of the host, and one-shot sums where some rank cannot have them."""

import threading
from datetime import timedelta

import torch
from torch._C._distributed_c10d import TCPStore

from tests.unit.tensor_parallel_group import GlooSums, on_ranks
from workers.completion_board import CompletionBoard
from workers.move_board import MoveBoard
from workers.one_shot_sums import OneShotSums
from workers.parallel import TPGroup


def test_all_is_well_only_where_it_is_on_every_rank() -> None:
    def work(group: TPGroup) -> list[bool]:
        return [group.agree(is_well) for is_well in (True, group.rank == 0, group.rank == 2, False, True)]

    assert on_ranks(3, work) == [[True, False, False, False, True]] * 3
    single = TPGroup.single()
    assert single.agree(True) and not single.agree(False)


def test_without_a_device_every_rank_goes_without() -> None:
    timeout = timedelta(seconds=20)
    server = TCPStore("127.0.0.1", 0, 2, is_master=True, timeout=timeout, wait_for_workers=False)
    found: dict[int, OneShotSums | None] = {}

    def connect(rank: int) -> None:
        store = TCPStore("127.0.0.1", server.port, 2, is_master=False, timeout=timeout)
        found[rank] = OneShotSums.connect(store, rank, 2, 20.0)

    threads = [threading.Thread(target=connect, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40)
    assert found == {0: None, 1: None}


def test_what_no_kernel_takes_the_process_group_sums() -> None:
    def work(group: TPGroup) -> list[float]:
        part = torch.full((2, 4), group.rank + 1.0)
        return group.sum(part)[0].tolist()

    assert on_ranks(2, work) == [[3.0] * 4] * 2


class EndedSums(GlooSums):
    num_ends = 0

    def end(self) -> None:
        self.num_ends += 1


class EndedCollectives:
    num_aborts = 0

    def abort(self) -> None:
        EndedCollectives.num_aborts += 1


def test_who_leaves_the_group_waits_for_no_part_any_more() -> None:
    sums = EndedSums(TPGroup.single())
    boards = CompletionBoard.private(), MoveBoard.private()
    group = TPGroup(1, 2, 5.0, *boards, process_group=EndedCollectives(), one_shot=sums)
    group.abort()
    group.close()
    assert (sums.num_ends, EndedCollectives.num_aborts) == (1, 1)
