"""Metrics of the cache tier: what is counted is what happened; labels are bounded."""

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from cache_service import messages
from cache_service.metrics import CacheClientCollector, CacheServerCollector, MetricLabels
from cache_service.remote import PutStatus
from tests.unit.arenas import key
from tests.unit.cache_nodes import BUNDLE_BYTES, NUM_SLOTS, eventually, new_client, serving, store_chain
from tests.unit.fake_store import ADDRESS, FakeOpener
from tests.unit.peer_nodes import lease, two_nodes
from tests.unit.raw_cache_client import RawClient

ALLOWED_LABELS = {"node", "rank", "state", "reason", "status", "outcome", "call", "source"}


def exposed(collector):
    registry = CollectorRegistry()
    registry.register(collector)
    families = list(text_string_to_metric_families(generate_latest(registry).decode()))
    samples = {}
    for family in families:
        assert family.name.startswith("eyrie_cache_") and family.documentation.endswith(".")
        for sample in family.samples:
            assert set(sample.labels) <= ALLOWED_LABELS
            own = tuple(value for name, value in sample.labels.items() if name not in ("node", "rank"))
            samples[(sample.name.removeprefix("eyrie_cache_"), *own)] = sample.value
    return samples


def test_server_and_client_tell_what_they_have_and_did(tmp_path):
    with serving(tmp_path) as server:
        client = new_client(server.core.endpoint)
        keys, locations = store_chain(client, "abc")
        assert client.acquire(keys, locations) == 3
        client.release([location.slot for location in locations[1:]])
        client.report_corrupt(locations[2])
        eventually(lambda: client.locate(keys[2]) is None)
        assert client.acquire([keys[2]], [locations[2]]) == 0
        eventually(lambda: client.num_grants == 5)
        eventually(lambda: server.core.stats().num_leased == 1)
        server.ask(messages.Stats())
        seen = exposed(CacheServerCollector("127.0.0.1", server.core.stats))
        assert seen["slots", "ready"] == 2 and seen["slots", "writing"] == 5
        assert sum(value for name, value in seen.items() if name[0] == "slots") == NUM_SLOTS
        assert seen[("slot_bytes",)] == BUNDLE_BYTES and seen[("readers",)] == 1
        assert seen["commits_total", "committed"] == 3 and seen["dropped_pages_total", "load"] == 1
        assert seen["calls_total", "attach"] == 1 and seen[("evictions_total",)] == 0
        assert seen[("leased_slots",)] == 1 and seen[("oldest_lease_seconds",)] >= 0
        mine = exposed(CacheClientCollector(MetricLabels(("node", "rank"), ("127.0.0.1", "0")), client))
        assert mine[("hits_total",)] == 3 and mine["misses_total", "stale"] == 1
        assert mine["offered_pages_total", "committed"] == 3
        assert mine["client_calls_total", "commit", "answered"] == 1
        assert (mine["breaker", "closed"], mine["breaker", "open"]) == (1, 0)
        assert mine[("attached",)] == 1 and mine[("grants",)] == 5 and mine[("known_pages",)] == 2
        assert mine[("relocations",)] == 4 and mine[("relocation_lag",)] == 0
        assert seen[("relocation_counter",)] == mine[("relocations",)]
        assert mine["resyncs_total", "snapshot"] >= 1
        client.release([locations[0].slot])
        client.close()


def test_a_server_tells_what_it_put_got_and_lost(tmp_path):
    opener = FakeOpener()
    with serving(tmp_path, open_store=opener) as server:
        client = new_client(server.core.endpoint)
        server.ask(messages.AttachStore(ADDRESS))
        keys, _ = store_chain(client, "ab")
        eventually(lambda: server.ask(messages.Stats()).num_known_remote == 2)
        opener.store.status = PutStatus.FULL
        store_chain(client, "c", keys[1])
        server.ask(messages.Clear())
        client.fetch([messages.WantedPage(keys[0], None, 16)], None, 20.0)
        eventually(client.take_fetched)
        stats = eventually(
            lambda: (
                (found := server.ask(messages.Stats())).num_ready == 1
                and messages.Count("puts", 1, "full") in found.counts
                and found
            )
        )
        seen = exposed(CacheServerCollector("127.0.0.1", lambda: stats))
        assert (seen["put_pages_total", "stored"], seen["put_pages_total", "full"]) == (2, 1)
        assert seen[("put_bytes_total",)] == 2 * BUNDLE_BYTES
        assert seen[("put_batches_total",)] >= 2 and seen[("put_seconds_total",)] > 0
        assert seen["got_pages_total", "found"] == 1 and seen["stores_total", "attached"] == 1
        assert seen["store_failures_total", "put: as the test wants"] == 1
        assert seen[("store_attached",)] == 1 and seen[("known_remote_pages",)] == 2
        assert seen[("waiting_puts",)] == 0
        for call in ("put", "get"):
            assert (seen["store_breaker", call, "closed"], seen["store_breaker", call, "open"]) == (1, 0)
        client.close()


def test_a_server_tells_what_it_fetched_and_what_it_lends(tmp_path):
    with two_nodes(tmp_path) as (owner, reader), RawClient(owner.server) as peer:
        assert set(reader.fetch("abc", owner)) == {messages.FetchStatus.FETCHED}
        reader.transfer.on_wire = lambda data: data.__setitem__(0, data[0] ^ 1)
        reader.fetch("de", owner, parent=key("c"))
        peer.ask(lease("ab"))
        stats = reader.raw.ask(messages.Stats())
        seen = exposed(CacheServerCollector("127.0.0.1", lambda: stats))
        assert seen["fetched_pages_total", "fetched"] == 3 and seen["fetched_pages_total", "corrupt"] == 2
        assert seen["fetched_bytes_total", "peer"] == 3 * BUNDLE_BYTES
        assert seen["fetch_batches_total", "peer"] == 2 and seen["fetch_seconds_total", "peer"] > 0
        assert (seen["peers", "used"], seen["peers", "avoided"]) == (1, 0)
        assert seen[("fetches",)] == seen[("lingering_slots",)] == seen[("lent_pages",)] == 0
        stats = eventually(lambda: (found := owner.raw.ask(messages.Stats())).oldest_lent_s > 0 and found)
        lent = exposed(CacheServerCollector("127.0.0.1", lambda: stats))
        assert lent[("lent_pages",)] == 2 and lent[("oldest_lent_seconds",)] > 0
        assert lent["remote_leases_total", "granted"] == 3
        assert lent[("unconfirmed_corruption_total",)] == 2
