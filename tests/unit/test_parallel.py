"""A TP group's calls, and what its ranks see when a peer dies or stalls. Ranks are real processes."""

import os
import signal
import socket
import struct
import time
from collections.abc import Iterator

import pytest
import torch

from tests.unit.tensor_parallel_group import Ranks
from workers.completion_board import CompletionBoard
from workers.move_board import MoveBoard
from workers.parallel import TPGroup, TPPeerLostError, TPTimeoutError, listen


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    ranks = Ranks()
    yield ranks
    ranks.close()


def test_ranks_sum_gather_and_share_plans_and_counters(ranks: Ranks) -> None:
    ranks.start("work")
    first, second = ranks.finish()
    assert first["sum"] == second["sum"] == [[3.0] * 3] * 2
    assert first["gathered"] == [[0.0, 10.0, 1.0, 11.0]]
    assert second["gathered"] is None
    assert first["tokens"] == second["tokens"] == [7, 8, 9]
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
    group.broadcast(tensor)
    assert group.gather_columns(tensor) is tensor
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
