"""The CacheServer by itself: how soon its relocations are heard, what a page costs it, how it comes back."""

import itertools
import multiprocessing
import time

from cache_service.arena_format import ArenaSpec
from cache_service.messages import ChangesSince
from cache_service.one_call import call_once
from cache_service.relocation_records import Stored
from cache_service.subscriber import Subscriber
from tests.bench.cache_node import FINGERPRINT, SECRET, TIMEOUT_S, CacheNode, eventually, write_pages
from tests.bench.measuring import quantile, say

GIB = 1 << 30
NUM_SUBSCRIBERS = 8
PAGES_PER_COMMIT = 8
COMMITS_PER_S = 50
CHAIN_LEN = 64
"""Pages of a prompt, where pages are made up."""
MODEL_BUNDLE_BYTES = 368_640
"""Of SmolLM2-135M: 16 tokens in bfloat16."""


def measure_server(num_commits, num_pages, arena_gb):
    """Return broadcast_p99_ms, server_bytes_per_page and recovery_s with their parts."""
    found = _broadcasts(num_commits)
    say(f"broadcasts: {found}")
    found |= _memory(num_pages)
    say(f"memory: {found['server_bytes_per_page']} bytes a page")
    return found | _recovery(arena_gb)


# Broadcasts.


class _Heard:
    """A listener that notes when each page's news came."""

    def __init__(self):
        self.times = {}

    def restart(self, stored):
        self.apply(stored)

    def apply(self, changes):
        now_s = time.monotonic()
        self.times |= {change.key: now_s for change in changes if isinstance(change, Stored)}


def _subscribe(endpoint, broadcasts, pipe):
    heard = _Heard()
    subscriber = Subscriber(
        broadcasts,
        SECRET,
        heard,
        lambda version: call_once(endpoint, SECRET, ChangesSince(version), TIMEOUT_S),
    )
    subscriber.start()
    eventually(lambda: subscriber.follower.applied is not None)
    pipe.send(None)
    pipe.recv()
    pipe.send((heard.times, subscriber.follower.stats.num_gaps))
    subscriber.close()


def _broadcasts(num_commits):
    """From a worker's commit to the index of each of eight processes: its call's way is in it."""
    spawn = multiprocessing.get_context("spawn")
    num_pages = PAGES_PER_COMMIT * num_commits
    committed = {}
    with CacheNode(_arena_gb(4_096, 2 * num_pages)) as node:
        client = node.client(4_096, 256)
        pairs = [spawn.Pipe() for _ in range(NUM_SUBSCRIBERS)]
        processes = [
            spawn.Process(target=_subscribe, args=(node.endpoint, node.broadcasts, theirs), daemon=True)
            for _, theirs in pairs
        ]
        for process in processes:
            process.start()
        for ours, _ in pairs:
            ours.recv()
        time.sleep(1.0)  # for their connections
        for number in range(num_commits):
            entries = write_pages(client, [(number, place) for place in range(PAGES_PER_COMMIT)])
            committed[entries[-1].key] = time.monotonic()
            client.commit(entries)
            time.sleep(1 / COMMITS_PER_S)
        eventually(lambda: client.num_known_pages == num_pages)
        delays, num_gaps = [], 0
        for (ours, _), process in zip(pairs, processes, strict=True):
            ours.send(None)
            times, gaps = ours.recv()
            num_gaps += gaps
            delays += [1000 * (times[page_key] - began_s) for page_key, began_s in committed.items()]
            process.join(TIMEOUT_S)
        client.close()
    assert len(delays) == NUM_SUBSCRIBERS * num_commits
    return {
        "broadcast_p99_ms": round(quantile(delays, 0.99), 2),
        "broadcast_p50_ms": round(quantile(delays, 0.5), 2),
        "broadcast_gaps": num_gaps,
    }


# Memory.


def _memory(num_pages):
    """What each page adds to the server's own memory, and what it has besides: its log of changes, mostly."""
    few_held, few_bytes = _grown_bytes(num_pages // 4)
    held, num_bytes = _grown_bytes(num_pages)
    bytes_per_page = (num_bytes - few_bytes) / (held - few_held)
    return {
        "server_bytes_per_page": round(bytes_per_page),
        "server_fixed_mb": round((num_bytes - held * bytes_per_page) / 1e6, 1),
        "server_pages": held,
    }


def _grown_bytes(num_slots):
    """Fill an arena, once and a half; return the pages in it and by how much its server has grown with it."""
    with CacheNode(_arena_gb(256, num_slots)) as node:
        before = node.anonymous_bytes()
        client = node.client(256, 4_096)
        num_chains = 3 * num_slots // (2 * CHAIN_LEN)
        for chain in range(num_chains):
            client.commit(write_pages(client, [(chain, place) for place in range(CHAIN_LEN)]))
        eventually(lambda: sum(client.stats.commits.values()) == num_chains * CHAIN_LEN)
        num_held, num_bytes = client.num_known_pages, node.anonymous_bytes() - before
        client.close()
    return num_held, num_bytes


# Recovery.


def _recovery(arena_gb):
    """From a kill -9 until a client has the new server's grants and hears of all pages again."""
    with CacheNode(arena_gb) as node:
        client = node.client(MODEL_BUNDLE_BYTES, 64)
        fill = bytes(range(256)) * (MODEL_BUNDLE_BYTES // 256)
        num_pages = int(0.85 * client.arena.spec.num_slots)
        for chain in itertools.count():
            if client.num_known_pages >= num_pages:
                break
            client.commit(write_pages(client, [(chain, place) for place in range(CHAIN_LEN)], fill=fill))
            eventually(lambda told=chain: client.num_known_pages >= told * CHAIN_LEN)
        num_pages, version = client.num_known_pages, client.subscriber.follower.applied
        began_s = time.monotonic()
        node.kill()
        node.start()

        def is_back():
            applied = client.subscriber.follower.applied
            is_heard = applied is not None and applied.incarnation != version.incarnation
            return is_heard and client.num_known_pages and client.take_grant() is not None

        eventually(is_back)
        seconds = time.monotonic() - began_s
        num_found = client.num_known_pages
        assert num_found == num_pages, f"{num_found} of {num_pages} pages are back"
        client.close()
    return {
        "recovery_s": round(seconds, 2),
        "recovery_adoption_s": round(node.start_s, 2),
        "recovery_gb": arena_gb,
        "recovery_pages": num_pages,
    }


def _arena_gb(bundle_bytes, num_slots):
    spec = ArenaSpec("bench", FINGERPRINT, bundle_bytes, 1, num_slots)
    return (spec.file_bytes + 64 * 1024) / GIB
