"""A TP group's calls, and what its ranks see when a peer dies or stalls. Ranks are real processes."""

import fcntl
import os
import resource
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from functools import partial

import pytest
import torch
from torch._C._distributed_c10d import TCPStore

from tests.unit.tensor_parallel_group import GlooSums, Ranks, on_ranks
from workers.completion_board import CompletionBoard
from workers.move_board import MoveBoard
from workers.parallel import TPGroup, TPPeerLostError, TPTimeoutError, listen
from workers.peer_watch import PeerWatch
from workers.plan_links import can_read, follow, hang_up
from workers.process_groups import NoDeviceError, process_group


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    ranks = Ranks()
    yield ranks
    ranks.close()


def test_ranks_sum_gather_and_share_plans_and_counters(ranks: Ranks) -> None:
    ranks.start("work")
    first, second = ranks.finish()
    assert first["sum"] == second["sum"] == [[3.0] * 3] * 2
    assert first["gathered"] == second["gathered"] == [[0.0, 10.0], [1.0, 11.0]]
    assert second["plans"] == [True, True, True]
    assert second["more"] is False
    assert first["counts"] == second["counts"] == [3, 4]
    assert first["minimum"] == 3
    assert [board.endswith("(deleted)") for board in first["boards"] + second["boards"]] == [True, True]
    assert first["closed"] and second["closed"]


def test_a_killed_peer_ends_a_collective_with_an_error(ranks: Ranks) -> None:
    _, victim = ranks.start("reduce_until_error")
    time.sleep(0.2)
    os.kill(victim["pid"], signal.SIGKILL)
    survivor, _ = ranks.finish()
    assert survivor["error"] == "TPPeerLostError"
    assert "rank 0: all_reduce" in survivor["message"]


def test_what_took_less_than_the_timeout_has_not_timed_out_whatever_the_error_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class KilledPeer:
        def allreduce(self, *_: object) -> None:
            raise RuntimeError("[gloo] Application timeout caused pair closure")

    group = TPGroup.single()
    monkeypatch.setattr(group, "_timeout_s", 30.0)
    monkeypatch.setattr(group, "_process_group", KilledPeer())
    with pytest.raises(TPPeerLostError, match="rank 0: all_reduce"):
        group.all_reduce(torch.ones(3))


def test_a_killed_leader_wakes_its_followers(ranks: Ranks) -> None:
    victim, _ = ranks.start("follow_until_error")
    os.kill(victim["pid"], signal.SIGKILL)
    _, survivor = ranks.finish()
    assert survivor["error"] == "TPPeerLostError"
    assert survivor["after_s"] < 10


def test_a_killed_follower_is_seen_by_the_next_plan(ranks: Ranks) -> None:
    _, victim = ranks.start("lead_until_error")
    os.kill(victim["pid"], signal.SIGKILL)
    survivor, _ = ranks.finish()
    assert survivor["error"] == "TPPeerLostError"
    assert "rank 1" in survivor["message"]
    assert survivor["after_s"] < 10


def test_a_stalled_peer_times_out_a_collective(ranks: Ranks) -> None:
    _, stalled = ranks.start("reduce_until_error", timeout_s=2)
    os.kill(stalled["pid"], signal.SIGSTOP)
    ranks.read_until(lambda: "error" in ranks.said[0])
    os.kill(stalled["pid"], signal.SIGKILL)
    waiting, _ = ranks.finish()
    assert waiting["error"] == "TPTimeoutError"
    assert waiting["after_s"] < 15


def test_a_peer_that_never_comes_is_a_timeout() -> None:
    listener = listen("127.0.0.1")
    with pytest.raises(TPTimeoutError, match="rank 0 of 2: meeting the group"):
        TPGroup.connect(0, 2, "127.0.0.1", 0, timeout_s=0.3, listener=listener)


def test_a_rank_outside_the_group_is_refused() -> None:
    with pytest.raises(ValueError, match="rank 2 of 2"):
        TPGroup.connect(2, 2, "127.0.0.1", 1, timeout_s=1)


def test_a_group_of_one_needs_no_connection() -> None:
    group = TPGroup.connect(0, 1, "127.0.0.1", 0, timeout_s=1)
    tensor = torch.ones(3)
    group.all_reduce(tensor)
    assert tensor.tolist() == [1.0, 1.0, 1.0]
    assert group.all_gather(tensor).tolist() == [tensor.tolist()]
    group.broadcast_plan(b"plan")
    group.board.publish(5)
    assert group.board.minimum() == 5
    with pytest.raises(AssertionError):
        group.board.publish(4)
    group.close()


@pytest.mark.parametrize("spin_s", [0.0, 0.02, 1.0])
def test_a_follower_waits_as_long_as_it_is_told_however_it_looks(spin_s: float) -> None:
    ours, theirs = socket.socketpair()
    board, moves = CompletionBoard.private(), MoveBoard.private()
    group = TPGroup(1, 2, 5.0, board, moves, links=[ours], spin_s=spin_s)
    began_s = time.monotonic()
    assert not group.has_plan(0.05)
    with pytest.raises(TPTimeoutError, match=r"no plan for 0\.1 s"):
        group.receive_plan(0.1)
    assert 0.15 <= time.monotonic() - began_s < 1.0
    theirs.sendall(struct.pack("<I", 3) + b"abc")
    assert group.has_plan(5.0) and group.receive_plan(5.0) == b"abc"
    theirs.close()
    assert group.has_plan(5.0)
    with pytest.raises(TPPeerLostError, match="rank 0 is gone"):
        group.receive_plan(5.0)
    group.close()


def test_who_has_left_the_group_sums_no_more() -> None:
    collectives = [
        lambda group: group.all_reduce(torch.ones(2)),
        lambda group: group.maximum(torch.ones(2)),
        lambda group: group.all_gather(torch.ones(2)),
    ]

    def work(group: TPGroup) -> int:
        group.abort()
        for collective in collectives:
            with pytest.raises(TPPeerLostError, match=f"rank {group.rank} has left its group"):
                collective(group)
        return len(collectives)

    assert on_ranks(2, work) == [3, 3]


def test_a_rank_hangs_up_before_its_sums_go_wrong() -> None:
    ours, theirs = socket.socketpair()
    seen: list[bool] = []

    class Sums(GlooSums):
        def end(self) -> None:
            seen.append(can_read(theirs) and not theirs.recv(1))

    class Collectives:
        def abort(self) -> None: ...

    boards = CompletionBoard.private(), MoveBoard.private()
    sums = Sums(TPGroup.single())
    group = TPGroup(1, 2, 5.0, *boards, process_group=Collectives(), links=[ours], one_shot=sums)
    group._end_collectives()  # as its watch does
    assert seen == [True]
    group.close()


def test_the_first_of_two_followers_that_leave_ends_no_collectives() -> None:
    has_left, stays = threading.Event(), threading.Event()

    def work(group: TPGroup) -> object:
        group._watch = PeerWatch(group._links, group._steps, 30.0, group._end_collectives)  # as on CUDA
        if group.rank == 1:
            group.close()
            has_left.set()
        elif group.rank == 2:
            stays.wait(30)
        else:
            threading.Timer(0.4, stays.set).start()
            assert group.see_off(20.0) and has_left.is_set()
            return group._watch.reason, group._process_group is None
        return None

    assert on_ranks(3, work)[0] == (None, False)


@pytest.mark.parametrize("says", [b"", b"x" * 36, b"short"])
def test_a_stranger_on_the_plan_port_does_not_keep_the_ranks_apart(
    monkeypatch: pytest.MonkeyPatch, says: bytes
) -> None:
    monkeypatch.setattr("workers.plan_links._HELLO_TIMEOUT_S", 0.3)
    strangers = []

    def follow_behind_one(store: TCPStore, rank: int, host: str, timeout_s: float) -> socket.socket:
        store.wait(["plan_port"])
        strangers.append(socket.create_connection((host, int(store.get("plan_port")))))
        strangers[-1].sendall(says)
        if not says:
            strangers[-1].close()
        return follow(store, rank, host, timeout_s)

    monkeypatch.setattr("workers.parallel.follow", follow_behind_one)
    assert on_ranks(2, lambda group: group.rank) == [0, 1]
    for stranger in strangers:
        stranger.close()


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard <= 1_030:
        pytest.skip("no descriptors from 1,024 on here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1_040), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_links_may_have_any_number(many_descriptors: None) -> None:
    ours, theirs = socket.socketpair()
    link = socket.socket(fileno=fcntl.fcntl(ours.fileno(), fcntl.F_DUPFD, 1_025))
    group = TPGroup(1, 2, 5.0, CompletionBoard.private(), MoveBoard.private(), links=[link])
    group.check_peers()
    theirs.sendall(struct.pack("<I", 3) + b"abc")
    assert group.has_plan(1.0) and group.receive_plan(1.0) == b"abc"
    theirs.close()
    with pytest.raises(TPPeerLostError):
        group.check_peers()
    group.close()


def test_nobody_waits_for_what_a_group_holds() -> None:
    """NCCL's joins a thread that may be asking the store of a rank 0 that hangs."""
    freed = threading.Event()

    class Collectives:
        def abort(self) -> None: ...

        def __del__(self) -> None:
            freed.wait(20)

    boards = CompletionBoard.private(), MoveBoard.private()
    began_s = time.monotonic()
    group = TPGroup(1, 2, 5.0, *boards, process_group=Collectives())
    group.abort()
    group.close()
    assert time.monotonic() - began_s < 10
    freed.set()


def test_a_group_that_ends_within_a_collective_is_freed_by_nobody_who_steps() -> None:
    is_in, has_ended, freed_by = threading.Event(), threading.Event(), []

    class Collectives:
        def allreduce(self, *_: object) -> None:
            del self  # as C++'s: no error's traceback keeps it
            is_in.set()
            has_ended.wait(20)
            raise RuntimeError("aborted")

        def abort(self) -> None:
            has_ended.set()

        def __del__(self) -> None:
            freed_by.append(threading.current_thread().name)

    boards = CompletionBoard.private(), MoveBoard.private()
    group = TPGroup(1, 2, 5.0, *boards, process_group=Collectives())
    watch = threading.Thread(target=lambda: is_in.wait(20) and group._end_collectives())
    watch.start()
    with pytest.raises(TPPeerLostError) as kept:
        group.all_reduce(torch.ones(2))
    watch.join(20)
    group.close()
    assert freed_by == ["group-abort"], kept


def test_a_rank_that_gave_up_says_why_and_blames_no_peer() -> None:
    for rank, call in (
        (0, lambda group: group.broadcast_plan(b"plan")),
        (1, lambda group: group.has_plan(0.1)),
        (1, lambda group: group.receive_plan(0.1)),
        (1, lambda group: group.check_peers()),
        (1, lambda group: group.all_reduce(torch.ones(2))),
    ):
        ours, theirs = socket.socketpair()
        boards = CompletionBoard.private(), MoveBoard.private()
        group = TPGroup(rank, 2, 5.0, *boards, links=[ours])
        group._watch = PeerWatch([ours], lambda: (7, 6), 0.05, partial(hang_up, [ours]))
        while group._watch.reason is None:
            time.sleep(0.01)
        with pytest.raises(TPPeerLostError, match=r"step 7 is not over after 0\.05 s"):
            call(group)
        group.close()
        theirs.close()


@pytest.mark.parametrize("size", [1, 2])
def test_a_rank_without_a_cuda_device_says_what_it_needs(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(NoDeviceError, match=r"device: 'cuda'.*eyrie\[cuda\].*--device cpu"):
        TPGroup.connect(0, size, "127.0.0.1", 0, timeout_s=1, device="cuda")


def test_nccl_is_told_to_leave_nvlink_multicast_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str | None] = []

    class Nccl:
        class Options: ...

        def __init__(self, *_: object) -> None:
            told.append(os.environ.get("NCCL_NVLS_ENABLE"))

    monkeypatch.setenv("NCCL_NVLS_ENABLE", "2")
    monkeypatch.setattr("torch._C._distributed_c10d.ProcessGroupNCCL", Nccl, raising=False)
    process_group(None, 0, 4, "127.0.0.1", timedelta(seconds=1), "cuda")
    assert told == ["0"]
