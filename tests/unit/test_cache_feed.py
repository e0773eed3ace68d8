"""What an API process hears of a real CacheServer: late, restarted, silent or never there."""

import asyncio
import contextlib
import logging
import time

import pytest

from cache_service.arena_files import arena_path
from cache_service.changes_call import changes_since
from cache_service.identity import cluster_id_of
from cache_service.messages import ChangesSince, Clear
from cache_service.one_call import CallError
from cache_service.relocation import Changes, Snapshot, Version
from cluster.metrics import ApiMetrics
from cluster.router.cache_feed import SILENCE_S, CacheFeed
from cluster.router.host_index import CacheAddress
from cluster.router.router import Router
from tests.unit.arenas import key
from tests.unit.cache_nodes import (
    CONFIG,
    SECRET,
    TIMEOUT_S,
    ServerProcess,
    eventually,
    new_client,
    serving,
    store_chain,
)
from tests.unit.relocation_owner import RelocationOwner
from tests.unit.replica_threads import ThreadReplica
from tests.unit.test_router_affinity import Placements, finish, request

NOWHERE = "tcp://127.0.0.1:1"


@contextlib.contextmanager
def feeding(calls, broadcasts, **options):
    feed = CacheFeed(CacheAddress("node", calls, broadcasts), SECRET, **options)
    feed.start()
    try:
        yield feed
    finally:
        feed.close()


def knows(feed, keys):
    return feed.is_heard(time.monotonic()) and feed.pages.num_leading(keys) == len(keys)


def hears_broadcasts(feed):
    """Its connection is up: what comes now is heard without asking."""
    return feed._subscriber.follower.silence_s(time.monotonic()) < 0.02 and feed.stats().lag == 0


def test_pages_from_before_and_after_it_began_to_listen(tmp_path):
    with serving(tmp_path) as server, contextlib.closing(new_client(server.core.endpoint)) as client:
        keys, _ = store_chain(client, "abc")
        with feeding(server.core.endpoint, server.core.broadcasts) as feed:
            eventually(lambda: knows(feed, keys))
            eventually(lambda: hears_broadcasts(feed))
            more, _ = store_chain(client, "defg", keys[-1])
            eventually(lambda: knows(feed, keys + more))
            assert feed.stats().counter == 7
            assert feed.stats().num_host_pages == 7
            server.ask(Clear())
            eventually(lambda: feed.stats().num_host_pages == 0)
            stats = feed.stats()
            assert (stats.lag, stats.num_restarts) == (0, 0)
            assert stats.resyncs["snapshot"] == 1


def test_a_restarted_server_is_told_from_its_former_self(tmp_path):
    with serving(tmp_path) as server, contextlib.closing(new_client(server.core.endpoint)) as client:
        keys, _ = store_chain(client, "abc")
        ports = server.ports
        feed = CacheFeed(CacheAddress("node", server.core.endpoint, server.core.broadcasts), SECRET)
        feed.start()
        eventually(lambda: knows(feed, keys))
    with contextlib.closing(feed), serving(tmp_path, **ports) as heir:
        eventually(lambda: feed.stats().num_host_pages == 0)
        assert feed.stats().num_restarts == 1
        with contextlib.closing(new_client(heir.core.endpoint)) as client:
            new, _ = store_chain(client, "xy")
            eventually(lambda: knows(feed, new))
            assert feed.pages.num_leading([key("a")]) == 0


def test_a_killed_servers_pages_count_for_nothing_until_an_heir_has_adopted_them(tmp_path, caplog):
    server = ServerProcess(tmp_path)
    with (
        contextlib.closing(new_client(server.endpoint)) as client,
        feeding(server.endpoint, server.broadcasts, silence_s=0.6) as feed,
        caplog.at_level(logging.INFO, "cluster"),
    ):
        keys, _ = store_chain(client, "abcd")
        eventually(lambda: knows(feed, keys))
        server.kill()
        eventually(lambda: not feed.is_heard(time.monotonic()))
        assert feed.pages.num_leading(keys) == len(keys), "the same incarnation may come back"
        with serving(tmp_path, **server.ports):
            eventually(lambda: client.connection.is_attached and knows(feed, keys))
            assert feed.stats().num_restarts == 1
        said = [record.message for record in caplog.records if record.name == "cluster.router.cache_feed"]
        assert said[:3] == [
            "follows a cache server",
            "no longer follows a cache server",
            "follows a cache server",
        ]
    arena_path(cluster_id_of(SECRET), "127.0.0.1", tmp_path).unlink(missing_ok=True)


def test_a_paused_server_is_heard_again_without_a_restart(tmp_path):
    server = ServerProcess(tmp_path)
    try:
        with (
            contextlib.closing(new_client(server.endpoint)) as client,
            feeding(server.endpoint, server.broadcasts, silence_s=0.6) as feed,
        ):
            keys, _ = store_chain(client, "abcd")
            eventually(lambda: knows(feed, keys))
            server.pause()
            eventually(lambda: not feed.is_heard(time.monotonic()))
            server.resume()
            eventually(lambda: knows(feed, keys))
            assert feed.stats().num_restarts == 0
    finally:
        server.resume()
        server.kill()


def test_what_is_known_is_void_while_an_heir_speaks_that_has_not_told_its_own(tmp_path):
    with serving(tmp_path) as server, contextlib.closing(new_client(server.core.endpoint)) as client:
        keys, _ = store_chain(client, "abc")
        ports = server.ports
        feed = CacheFeed(CacheAddress("node", server.core.endpoint, server.core.broadcasts), SECRET)
        feed.start()
        eventually(lambda: knows(feed, keys))
    heir = RelocationOwner(SECRET, incarnation=2, port=ports["broadcast_port"])
    with contextlib.closing(feed), contextlib.closing(heir):
        eventually(lambda: feed.stats().lag is None)
        assert not feed.is_heard(time.monotonic())
        assert feed._subscriber.follower.silence_s(time.monotonic()) < SILENCE_S, "silence is not why"


def test_a_server_that_never_was_is_not_heard_and_closing_does_not_wait_for_it():
    with feeding(NOWHERE, NOWHERE) as feed:
        eventually(lambda: feed.stats().resyncs["failed"] >= 2)
        assert not feed.is_heard(time.monotonic())
        assert (feed.stats().counter, feed.stats().lag, feed.stats().num_host_pages) == (None, None, 0)


async def test_routing_goes_on_without_the_cache_servers(tmp_path):
    replica = ThreadReplica("replica", SECRET)
    recorder = Placements()
    router = Router(
        {replica.replica_id: replica.endpoint},
        SECRET,
        "api",
        card_digest="card",
        recorder=recorder,
        caches={replica.replica_id: CacheAddress("node", NOWHERE, NOWHERE)},
    )
    try:
        await router.start(TIMEOUT_S)
        await finish(await router.submit(request("lonely", [3] * 100)))
    finally:
        async with asyncio.timeout(TIMEOUT_S):
            await router.close()
        await asyncio.to_thread(replica.stop)
    assert recorder.hints == []
    assert [feed.is_heard for feed in router.cache_feeds()] == [False]


def test_what_was_missed_is_asked_for_as_it_would_be_broadcast(tmp_path):
    with serving(tmp_path) as server, contextlib.closing(new_client(server.core.endpoint)) as client:
        endpoint = server.core.endpoint
        empty = changes_since(endpoint, SECRET, None, TIMEOUT_S)
        assert isinstance(empty, Snapshot) and empty.stored == []
        store_chain(client, "abc")
        snapshot = changes_since(endpoint, SECRET, None, TIMEOUT_S)
        assert snapshot == server.ask(ChangesSince(None))
        assert isinstance(snapshot, Snapshot) and len(snapshot.stored) == 3
        version = Version(snapshot.version.incarnation, 1)
        changes = changes_since(endpoint, SECRET, version, TIMEOUT_S)
        assert changes == server.ask(ChangesSince(version))
        assert isinstance(changes, Changes) and len(changes.changes) == 2


def test_nobody_there_is_a_call_error():
    with pytest.raises(CallError, match="nobody listens there"):
        changes_since(NOWHERE, SECRET, None, TIMEOUT_S)


def test_metrics_show_each_node_as_this_process_hears_it(tmp_path):
    metrics = ApiMetrics("tiny", "api-node")
    with serving(tmp_path, CONFIG) as server, contextlib.closing(new_client(server.core.endpoint)) as client:
        keys, _ = store_chain(client, "abc")
        with feeding(server.core.endpoint, server.core.broadcasts) as feed, feeding(NOWHERE, NOWHERE) as dead:
            dead.address = CacheAddress("dead-node", NOWHERE, NOWHERE)
            eventually(lambda: knows(feed, keys))
            metrics.watch_caches(lambda: [feed.stats(), dead.stats()])
            metrics.hinted("peer")
            text = metrics.exposition()[0].decode()
    labels = 'model="tiny",node="api-node"'
    for line in (
        f'eyrie_router_cache_heard{{cache_node="node",{labels}}} 1.0',
        f'eyrie_router_cache_heard{{cache_node="dead-node",{labels}}} 0.0',
        f'eyrie_router_relocations{{cache_node="node",{labels}}} 3.0',
        f'eyrie_router_relocation_lag{{cache_node="node",{labels}}} 0.0',
        f'eyrie_router_host_pages{{cache_node="node",{labels}}} 3.0',
        f'eyrie_router_remote_pages{{cache_node="node",{labels}}} 0.0',
        f'eyrie_router_cache_restarts_total{{cache_node="node",{labels}}} 0.0',
        f'eyrie_router_resyncs_total{{cache_node="node",{labels},outcome="snapshot"}} 1.0',
        f'eyrie_router_hints_total{{kind="peer",{labels}}} 1.0',
    ):
        assert line in text, line
    assert 'eyrie_router_relocations{cache_node="dead-node"' not in text, "nobody knows"
