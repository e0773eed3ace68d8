"""MoveBoard: what ranks in different processes tell each other of moves, and what the group's status is."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.unit.tiers import Meeting, boards
from workers.move_board import MOVE_CAPACITY, MoveBoard, MoveStatus
from workers.parallel import TPGroup, listen

PENDING, ENQUEUED, DONE = MoveStatus.PENDING, MoveStatus.ENQUEUED, MoveStatus.DONE
STALE, CORRUPT, TORN = MoveStatus.FAILED_STALE, MoveStatus.FAILED_CORRUPT, MoveStatus.FAILED_TORN


def test_a_move_nobody_has_spoken_of_is_pending() -> None:
    board = MoveBoard.private()
    assert [board.status(1), board.own_status(1), board.is_over(1)] == [PENDING, PENDING, False]
    board.publish(1, ENQUEUED)
    assert [board.status(1), board.status(2)] == [ENQUEUED, PENDING]
    board.publish(1, DONE)
    assert [board.status(1), board.is_over(1)] == [DONE, True]


@pytest.mark.parametrize(
    ("told", "status", "is_over"),
    [
        ((PENDING, DONE), PENDING, False),
        ((ENQUEUED, DONE), ENQUEUED, False),
        ((DONE, DONE), DONE, True),
        ((PENDING, STALE), STALE, False),
        ((CORRUPT, ENQUEUED), CORRUPT, False),
        ((DONE, STALE), STALE, True),
        ((TORN, STALE), TORN, True),
    ],
)
def test_a_group_has_come_as_far_as_its_last_rank_and_fails_with_the_first(told, status, is_over) -> None:
    first, second = boards(2, capacity=8)
    for board, own in zip((first, second), told, strict=True):
        if own is not PENDING:
            board.publish(3, own)
    assert [board.status(3) for board in (first, second)] == [status] * 2
    assert [board.is_over(3) for board in (first, second)] == [is_over] * 2
    assert (first.own_status(3), second.own_status(3)) == told


def test_a_move_s_word_serves_the_move_a_whole_ring_later() -> None:
    first, second = boards(2, capacity=8)
    for move in range(1, 30):
        assert first.status(move) is PENDING
        for board in (first, second):
            board.publish(move, ENQUEUED)
            board.publish(move, STALE if move == 20 else DONE)
        known = range(max(1, move - 7), move + 1)
        assert [first.status(each) for each in known] == [STALE if each == 20 else DONE for each in known]
    with pytest.raises(AssertionError, match="asked for move 21, whose word is move 29's"):
        first.status(21)


def test_a_status_never_goes_back() -> None:
    board = MoveBoard.private(8)
    board.publish(9, DONE)
    for move, status in ((9, ENQUEUED), (9, DONE), (1, DONE), (0, DONE)):
        with pytest.raises(AssertionError):
            board.publish(move, status)
    assert board.own_status(9) is DONE


def test_only_not_over_moves_may_still_touch_memory() -> None:
    assert [status for status in MoveStatus if not status.is_over] == [PENDING, ENQUEUED]
    assert [status for status in MoveStatus if status.is_over and not status.is_failed] == [DONE]


RANK = """
import sys
from workers.move_board import MoveStatus
from workers.parallel import TPGroup
group = TPGroup.connect(1, 2, "127.0.0.1", int(sys.argv[1]), timeout_s=30)
last = 0
while plan := group.receive_plan(30):
    for move in range(last + 1, int(plan) + 1):
        group.moves.publish(move, MoveStatus.ENQUEUED)
        group.moves.publish(move, MoveStatus.FAILED_IO if move == 4500 else MoveStatus.DONE)
    last = int(plan)
maps = [line.strip() for line in open("/proc/self/maps") if "eyrie-moves" in line]
print(len(maps), maps[0].endswith("(deleted)"))
group.close()
"""


def test_ranks_in_two_processes_share_a_board_without_a_file() -> None:
    listener = listen("127.0.0.1")
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", RANK, str(listener.getsockname()[1])],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root), "TORCH_CPP_LOG_LEVEL": "FATAL"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        group = TPGroup.connect(0, 2, "127.0.0.1", 0, timeout_s=30, listener=listener)
        for last in (3000, 6000):  # more than the ring holds, never more at once
            group.broadcast_plan(str(last).encode())
            for move in range(last - 2999, last + 1):
                group.moves.publish(move, DONE)
            end_s = time.monotonic() + 20
            while not group.moves.is_over(last):
                assert time.monotonic() < end_s
                time.sleep(0.001)
            found = {move: group.moves.status(move) for move in range(last - 2999, last + 1)}
            failed = {move: status for move, status in found.items() if status is not DONE}
            assert failed == ({4500: MoveStatus.FAILED_IO} if last == 6000 else {})
        group.broadcast_plan(b"")
        assert process.communicate(timeout=30)[0] == "1 True\n"
        group.close()
    finally:
        process.kill()


KILLED = """
import os, signal
from workers.move_board import MoveBoard
class Store:
    def set(self, name, value):
        pass
    def wait(self, names):
        os.kill(os.getpid(), signal.SIGKILL)
MoveBoard.shared(Store(), 0, 2)
"""


def test_a_rank_that_is_killed_before_the_others_have_its_board_leaves_no_file() -> None:
    root, before = Path(__file__).parents[2], set(Path("/dev/shm").glob("eyrie-moves-*"))
    killed = subprocess.run([sys.executable, "-c", KILLED], cwd=root, timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert set(Path("/dev/shm").glob("eyrie-moves-*")) <= before


def test_what_another_machine_s_rank_has_told_is_not_looked_for_here() -> None:
    """A path in /proc may lead to something else on each machine."""
    meeting, something = Meeting(), os.memfd_create("something else")
    meeting.set("moves_memory", f"/proc/{os.getpid()}/fd/{something} eyrie-moves-1234")
    with pytest.raises(OSError, match="is not eyrie-moves-1234: do all ranks run on one machine"):
        MoveBoard.shared(meeting, 1, 2, capacity=8)
    os.close(something)


def test_a_group_of_one_has_a_board_of_its_own() -> None:
    group = TPGroup.single()
    assert group.moves.capacity == MOVE_CAPACITY
    group.moves.publish(MOVE_CAPACITY, ENQUEUED)
    assert group.moves.status(MOVE_CAPACITY) is ENQUEUED
    group.close()
    group.close()
