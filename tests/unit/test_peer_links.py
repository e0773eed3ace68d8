"""A link between nodes that is cut without a word: leases end with it, and what was read does not count."""

import pytest

from cache_service.messages import FetchStatus
from tests.unit.cache_nodes import eventually
from tests.unit.peer_nodes import two_nodes
from tests.unit.stalling_link import StallingLink

pytestmark = pytest.mark.slow  # the heartbeats' own deadlines

FETCHED, PRESENT, MISSING, CORRUPT, NO_SLOT, TIMED_OUT, FAILED = FetchStatus


class Elsewhere:
    """A node as it is reached over a link."""

    def __init__(self, link):
        self.endpoint = link.endpoint


@pytest.fixture
def linked(tmp_path):
    with two_nodes(tmp_path) as (owner, reader):
        link = StallingLink(owner.endpoint)
        yield owner, reader, link
        link.close()


def test_a_cut_link_ends_the_leases_and_what_was_read_counts_for_nothing(linked):
    owner, reader, link = linked
    reader.transfer.go.clear()
    wait = reader.begin_fetch("abc", Elsewhere(link))
    eventually(lambda: reader.transfer.num_reads)
    link.cut()
    assert owner.core._peers.leases.num_slots == 3, "nobody knows yet"
    eventually(lambda: owner.core._peers.leases.num_slots == 0)
    assert owner.counts()["remote_leases", "fenced"] == 1
    reader.transfer.go.set()
    assert set(wait()) <= {FAILED, TIMED_OUT}
    assert reader.locations("abc") == [None] * 3
    link.mend()
    eventually(lambda: reader.fetch("abc", Elsewhere(link)) == [FETCHED] * 3)
    assert reader.holds("abc")
    owner.check()
    reader.check()


def test_a_cut_link_costs_a_fetch_its_deadline_and_later_ones_nothing(linked):
    _, reader, link = linked
    assert reader.fetch("a", Elsewhere(link)) == [FETCHED]
    link.cut()
    results = [reader.fetch("abc", Elsewhere(link), 0.3)[1:] for _ in range(6)]
    assert results[0] == [TIMED_OUT] * 2
    assert results[-1] == [FAILED] * 2, "the breaker is open"
    link.mend()
    eventually(lambda: reader.fetch("abc", Elsewhere(link))[1:] == [FETCHED] * 2)
