"""The contract of pages over arenas with one Mooncake Store behind them; its master is killed under way."""

import itertools

import pytest

from cache_service import messages
from cache_service.messages import FetchStatus
from cache_service.one_call import CallError
from tests.unit.arena_pages import ArenaHarness
from tests.unit.arenas import key
from tests.unit.cache_nodes import eventually, new_client, serving, store_chain, write
from tests.unit.mooncake_master import MooncakeMaster, free_port, has_mooncake
from tests.unit.page_contract import LAYOUT, PageContract
from tests.unit.test_fetch_calls import take_all, wanted

if not has_mooncake():
    pytest.skip("Mooncake cannot be imported: no wheel or no libibverbs1", allow_module_level=True)

from tests.unit.test_mooncake_store import SegmentOwner

pytestmark = pytest.mark.slow  # a master, and members that come and go: mostly waiting


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """A master, and a member whose memory holds the records."""
    master = MooncakeMaster(tmp_path_factory.mktemp("mooncake") / "master.log")
    owner = SegmentOwner(master).store
    yield master, owner
    owner.close()
    master.kill()


@pytest.fixture
def make_harness(pool, tmp_path):
    master, owner = pool
    owner.remove_all(True)
    made = []

    def make(num_nodes):
        made.append(
            ArenaHarness(
                tmp_path,
                num_nodes,
                f"mooncake:{master.endpoint}?segment_gb=0",
                lambda keys: owner.batch_remove([f"eyrie/{LAYOUT.name(key)}" for key in keys], True),
            )
        )
        return made[-1]

    yield make
    for harness in made:
        harness.close()


class TestArenaOverMooncake(PageContract):
    removes_under_readers = True

    @pytest.fixture
    def harness(self, make_harness):
        return make_harness(1)


class TestTwoArenasOverMooncake(PageContract):
    """What one node has put, the other gets."""

    removes_under_readers = True

    @pytest.fixture
    def harness(self, make_harness):
        return make_harness(2)


def test_a_masters_death_costs_pages_and_hangs_nothing(tmp_path):
    """Killed while pages are put and got; calls go on, losses say why, and its heir is found."""
    master = MooncakeMaster(tmp_path / "master.log")
    with serving(tmp_path) as server:
        client = new_client(server.core.endpoint)

        def counts():
            return {(count.name, count.reason): count.value for count in server.ask(messages.Stats()).counts}

        server.ask(messages.AttachStore(f"mooncake:{master.endpoint}?segment_gb=0.0625"))
        store_chain(client, "ab")
        eventually(lambda: server.ask(messages.Stats()).num_known_remote == 2)
        server.ask(messages.Clear())
        client.fetch(wanted("a", "b"), None, 5.0)
        store_chain(client, range(8))
        master.kill()
        (answer,) = take_all(client)
        allowed = {FetchStatus.FETCHED, FetchStatus.FAILED, FetchStatus.TIMED_OUT, FetchStatus.MISSING}
        assert {result.status for result in answer.outcome} <= allowed
        store_chain(client, range(20, 24))  # is there at once
        client.fetch(wanted("x"), None, 1.0)
        (answer,) = take_all(client)
        assert {result.status for result in answer.outcome} <= {FetchStatus.FAILED, FetchStatus.TIMED_OUT}
        eventually(lambda: counts().get(("puts", "failed"), 0) + counts().get(("puts", "timed_out"), 0))
        heir = MooncakeMaster(tmp_path / "heir.log", master.port)
        with pytest.raises(CallError, match="no Mooncake master"):
            server.ask(messages.AttachStore(f"mooncake:127.0.0.1:{free_port()}?segment_gb=0"))
        eventually(lambda: server.ask(messages.Stats()).store)  # the former again, at its master's heir
        eventually(lambda: server.ask(messages.Stats()).num_known_remote >= 4)
        client.close()
    heir.kill()


def test_a_master_that_comes_back_is_found_without_anybodys_help(tmp_path):
    master = MooncakeMaster(tmp_path / "master.log")
    with serving(tmp_path) as server:
        client = new_client(server.core.endpoint)
        server.ask(messages.AttachStore(f"mooncake:{master.endpoint}?segment_gb=0.0625"))
        store_chain(client, "ab")
        eventually(lambda: server.ask(messages.Stats()).num_known_remote == 2)
        master.kill()
        heir = MooncakeMaster(tmp_path / "heir.log", master.port)
        numbers = itertools.count()

        def puts_again():
            """Its members join the heir after a while; until then puts are lost."""
            client.commit([write(client, key(next(numbers)))])  # which may be lost, too
            return server.ask(messages.Stats()).num_known_remote > 2

        eventually(puts_again, 90.0)
        client.close()
    heir.kill()
