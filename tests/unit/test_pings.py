"""Who is lost: the dead, the failed and the silent; never one that is only slow."""

import pytest
from ray.exceptions import ActorDiedError

from cluster.pings import Member, Pings


class FakeActor:
    """Answers pings with `answer` while it is not None."""

    def __init__(self, answer=True):
        self.answer = answer
        self.num_pings = 0
        self.ping = self

    def remote(self):
        self.num_pings += 1
        return self, self.num_pings


def wait(refs, *, num_returns, timeout):
    assert timeout == 0, "a round never waits"
    assert num_returns == len(refs)
    return [ref for ref in refs if ref[0].answer is not None], []


def get(ref):
    if isinstance(ref[0].answer, Exception):
        raise ref[0].answer
    return ref[0].answer


@pytest.fixture
def pings():
    return Pings(wait, get, max_silent_rounds=3)


def test_the_living_are_asked_again_and_again(pings):
    actors = [FakeActor(), FakeActor()]
    members = [Member(str(i), actor) for i, actor in enumerate(actors)]
    for _ in range(10):
        assert pings.lost(members) == {}
    assert [actor.num_pings for actor in actors] == [10, 10]


def test_the_dead_and_the_failed_are_found_in_one_round(pings):
    dead, failed, well = FakeActor(ActorDiedError()), FakeActor(False), FakeActor()
    found = pings.lost([Member("dead", dead), Member("failed", failed), Member("well", well)])
    assert set(found) == {"dead", "failed"}
    assert "ActorDiedError" in found["dead"]


def test_the_silent_are_lost_after_a_while_and_hide_nobody(pings):
    silent, well = FakeActor(None), FakeActor()
    members = [Member("silent", silent), Member("well", well)]
    assert [set(pings.lost(members)) for _ in range(3)] == [set(), set(), {"silent"}]
    assert silent.num_pings == 1, "one ping is under way, not a queue of them"
    assert well.num_pings == 3


def test_under_the_name_of_one_that_was_left_out_another_is_asked_anew(pings):
    silent, heir = FakeActor(None), FakeActor()
    for _ in range(3):
        pings.lost([Member("rank 0", silent)])
    assert pings.lost([]) == {}
    assert pings.lost([Member("rank 0", heir)]) == {} and heir.num_pings == 1


def test_the_slow_are_not_lost(pings):
    slow = FakeActor(None)
    for _ in range(5):
        slow.answer = None
        assert pings.lost([Member("slow", slow)]) == {}
        assert pings.lost([Member("slow", slow)]) == {}
        slow.answer = True
        assert pings.lost([Member("slow", slow)]) == {}
