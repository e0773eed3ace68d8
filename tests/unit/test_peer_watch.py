"""A rank that is gone, or does not come, ends the others' collectives, whatever their threads wait for."""

import socket
import threading

import pytest

from workers.peer_watch import PeerWatch

WAIT_S = 5.0


class Watched:
    """A watch over one link; `steps` may be changed."""

    def __init__(self, timeout_s):
        self.mine, self.theirs = socket.socketpair()
        self.steps = (0, 0)
        self.ended = threading.Event()
        self.num_ends = 0
        self.watch = PeerWatch([self.mine], lambda: self.steps, timeout_s, self.end)

    def end(self):
        self.num_ends += 1
        self.ended.set()


@pytest.fixture
def watched():
    made = []

    def make(timeout_s=60.0):
        made.append(Watched(timeout_s))
        return made[-1]

    yield make
    for one in made:
        one.watch.stop()
        one.mine.close()
        one.theirs.close()


def test_a_peer_that_is_gone_is_seen_behind_what_it_still_said(watched):
    one = watched()
    one.theirs.sendall(b"a plan that nobody reads")
    assert not one.ended.wait(0.3) and one.watch.reason is None
    one.theirs.close()
    assert one.ended.wait(WAIT_S) and one.watch.reason == "a rank closed its connection"


def test_a_step_that_is_not_over_in_time_waits_for_a_peer(watched):
    one = watched(timeout_s=0.3)
    one.steps = (7, 6)
    assert one.ended.wait(WAIT_S) and one.watch.reason == "step 7 is not over after 0.3 s"
    assert one.num_ends == 1


def test_steps_that_end_or_begin_and_idle_ranks_are_no_reason(watched):
    one = watched(timeout_s=0.3)
    for number in range(8):
        one.steps = (number + 2, number + 1)
        assert not one.ended.wait(0.1)
    one.steps = (10, 10)
    assert not one.ended.wait(0.8) and one.watch.reason is None


def test_a_watch_that_was_stopped_sees_no_end(watched):
    one = watched()
    one.watch.stop()
    one.theirs.close()
    assert not one.ended.wait(0.3)
