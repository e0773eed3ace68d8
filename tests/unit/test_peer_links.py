"""A link between nodes that is cut without a word: leases end with it, and what was read does not count."""

import pytest

from cache_service.messages import FetchStatus
from cache_service.peer_source import PeerPatience
from tests.unit.cache_nodes import eventually
from tests.unit.peer_nodes import QUICK_PEER, two_nodes
from tests.unit.stalling_link import StallingLink

pytestmark = pytest.mark.slow  # the heartbeats' own deadlines

FETCHED, PRESENT, MISSING, CORRUPT, NO_SLOT, TIMED_OUT, FAILED = FetchStatus


class Elsewhere:
    """A node as it is reached over a link."""

    def __init__(self, link):
        self.endpoint = link.endpoint


@pytest.fixture
def linked(tmp_path, request):
    """Given a PeerPatience, the reader has it."""
    patience = getattr(request, "param", QUICK_PEER)
    with two_nodes(tmp_path, reader={"patience": patience}) as (owner, reader):
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


@pytest.mark.parametrize("linked", [PeerPatience(2, retry_s=3.0, max_retry_s=3.0)], indirect=True)
def test_a_cut_link_costs_a_fetch_its_deadline_and_later_ones_nothing(linked):
    _, reader, link = linked
    assert reader.fetch("a", Elsewhere(link)) == [FETCHED]
    link.cut()
    assert reader.fetch("abc", Elsewhere(link), 0.3)[1:] == [TIMED_OUT] * 2
    is_open = eventually(lambda: reader.fetch("abc", Elsewhere(link), 0.3)[1:] == [FAILED] * 2)
    assert is_open and reader.core._peers.peers.states()["open"] == 1
    link.mend()
    eventually(lambda: reader.fetch("abc", Elsewhere(link))[1:] == [FETCHED] * 2)
