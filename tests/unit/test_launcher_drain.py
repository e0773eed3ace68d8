"""How long a drain is waited for: until it is done, cut short, or past its deadline."""

from cluster.launcher import POLL_S, wait_until_done


class FakeRay:
    """Time passes in `wait` only; the call is done at `done_s`."""

    def __init__(self, done_s):
        self.done_s = done_s
        self.now_s = 100.0

    def clock(self):
        return self.now_s

    def wait(self, refs, *, timeout):
        self.now_s += timeout
        return (refs, []) if self.now_s >= 100.0 + self.done_s else ([], refs)


def drain(fake, is_cut_short=lambda: False):
    wait_until_done(["call"], 40.0, is_cut_short, wait=fake.wait, clock=fake.clock)
    return fake.now_s - 100.0


def test_a_drain_is_over_when_the_server_says_so():
    assert drain(FakeRay(3.0)) == 3.0


def test_a_stuck_server_is_not_waited_for_beyond_the_deadline():
    assert drain(FakeRay(float("inf"))) == 40.0


def test_a_second_signal_cuts_a_drain_short():
    fake = FakeRay(float("inf"))
    assert drain(fake, lambda: fake.now_s > 105.0) <= 5.0 + POLL_S
