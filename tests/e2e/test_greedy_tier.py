"""Greedy tokens do not depend on the cache tier, whatever comes back from it, late, broken or not at all."""

import itertools
import zlib

import pytest

from cache_service.in_process_transfer import InProcessNetwork, InProcessTransfer
from cache_service.keys import page_keys
from tests.arena_host import ArenaHost
from tests.followers import Followers
from tests.harness import Harness
from tests.node_host import NodeHost, wait_until_remote
from tests.scenario import Comparison
from tests.tiny_oracle import make_tiny
from workers.config import WorkerConfig
from workers.kvcache.moves import MoveInjection
from workers.kvcache.page_pool import Safety
from workers.protocol import FetchHint

POLICIES = ("write_through", "write_through_selective", "write_back")
PAGE_SIZE = 4
NUM_SEEDS = 12


@pytest.fixture(scope="module")
def followers():
    with Followers(1) as followers:
        yield followers


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return str(folder), make_tiny(folder, (14, 23, 36, 36), common_len=9, seed=2)


@pytest.fixture(scope="module")
def comparison():
    comparison = Comparison()
    yield comparison
    comparison.finish()


def config_of(model, tp_size, num_pages, **more):
    return WorkerConfig(
        **more,
        model=model,
        dtype="float32",
        tp_size=tp_size,
        page_size=PAGE_SIZE,
        num_pages=num_pages,
        max_tokens_per_step=16,
        max_running_requests=2,
        kv_sanitizer=True,
        num_threads=1,
    )


def serve(harness, cases, turn, comparison, peer=None):
    """Serve all cases, twice each: the second time they come back from wherever they went.

    The router says that `peer` has their pages.
    """
    for again, (number, case) in itertools.product(range(2), enumerate(cases)):
        name = f"{turn}-{again}-{number}"
        hints = [] if peer is None else [FetchHint(peer, len(case.prompt_ids) // PAGE_SIZE)]
        harness.submit(name, case.prompt_ids, max_tokens=len(case.token_ids), ignore_eos=True, hints=hints)
        if number % 2:
            harness.run()
    harness.run(max_steps=100_000)
    for name, got in harness.answers.items():
        if name.startswith(turn):
            case = cases[int(name[-1])]
            comparison.compare(name, got.token_ids, case.token_ids, case.margins)


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("policy", POLICIES)
def test_answers_are_the_oracles_from_a_pool_that_forgets_all_the_time(
    tiny, followers, comparison, policy, tp_size, depth
):
    model, cases = tiny
    with ArenaHost(num_slots=64) as host:
        for turn in ("first", "restarted"):
            with Harness(
                config_of(model, tp_size, num_pages=15, overlap_depth=depth),
                followers=followers if tp_size > 1 else None,
                host=host,
                write_policy=policy,
                incarnation=1 if turn == "first" else 2,
            ) as harness:
                serve(harness, cases, turn, comparison)
                pages = harness.idle_pages()
                assert pages["owned"] == pages["cached"], f"pages leaked: {pages}"
                stats = harness.tier.stats
                if (policy, turn) != ("write_through_selective", "first"):
                    assert stats.num_loaded_pages > 0, "nothing came back from the arena"
                assert stats.num_saved_pages > 0 or turn == "restarted"
                assert not stats.failed_loads and not stats.failed_saves
                if turn == "restarted":
                    found = harness.answers["restarted-0-0"].num_cached_tokens
                    assert found > 0, "a restarted worker finds the pages of the one before"
        assert host.leases.num_leased == 0
        assert host.store.num_writing == 0


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_answers_are_the_oracles_under_delays_failures_and_flipped_bits(
    tiny, followers, comparison, seed, tp_size
):
    model, cases = tiny
    injection = MoveInjection(
        seed, max_delay_s=0.003, failure_ratio=0.1, corruption_ratio=0.1, reorder_window=4
    )
    with (
        ArenaHost(num_slots=20, injection=injection) as host,
        Harness(
            config_of(model, tp_size, num_pages=15, overlap_depth=seed % 2),
            followers=followers if tp_size > 1 else None,
            host=host,
            write_policy=POLICIES[seed % 3],
        ) as harness,
    ):
        serve(harness, cases, "only", comparison)
        pages = harness.idle_pages()
        assert pages["owned"] == pages["cached"], f"pages leaked: {pages}"
        assert host.leases.num_leased == 0
        assert host.store.num_writing == 0
        host.store.check()


FETCHES_ALL = Safety(weighs_fetches=False)
"""Tiny models compute faster than anybody fetches."""


def serve_on(host, config, cases, followers, turn, comparison, peer=None, *, is_stored=False):
    """Serve on a node and return the harness, whose figures are still to be read.

    `is_stored`: not before it knows that the store has the prompts' pages.
    """
    with Harness(
        config,
        followers=followers if config.tp_size > 1 else None,
        host=host,
        safety=FETCHES_ALL,
        incarnation=2,
    ) as harness:
        namespace = harness.engine.namespace.digest()
        stored = (
            [page_keys(namespace, case.prompt_ids, PAGE_SIZE) for case in cases] if host.has_store else []
        )
        for keys in stored if is_stored else []:
            wait_until_remote(harness.client, keys)
        serve(harness, cases, turn, comparison, peer)
        pages = harness.idle_pages()
        assert pages["owned"] == pages["cached"], f"pages leaked: {pages}"
        for keys in stored:
            wait_until_remote(harness.client, keys)
        return harness


def origins(harness):
    return {origin for origin, count in harness.scheduler.stats.prefix_tokens.items() if count}


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("policy", ["wait_complete", "timeout", "best_effort"])
def test_answers_are_the_oracles_with_pages_from_a_peer(
    tiny, followers, comparison, tmp_path, policy, tp_size
):
    model, cases = tiny
    network = InProcessNetwork()
    config = config_of(model, tp_size, 15, prefetch_policy=policy, prefetch_timeout_s=20.0)
    with NodeHost(tmp_path / "a", network) as owner, NodeHost(tmp_path / "b", network) as reader:
        first = serve_on(owner, config, cases, followers, "first", comparison)
        assert "peer" not in origins(first)
        second = serve_on(reader, config, cases, followers, "second", comparison, owner.endpoint)
        assert not second.tier.stats.failed_loads
        if policy != "best_effort":  # which waits for nothing: all may be computed before anything has come
            assert second.prefetcher.stats.fetched_pages["peer"] > 0
            assert "peer" in origins(second)
            assert second.answers["second-0-0"].num_cached_tokens > 0


@pytest.mark.parametrize("tp_size", [1, 2])
def test_answers_are_the_oracles_with_pages_from_disk(tiny, followers, comparison, tmp_path, tp_size):
    model, cases = tiny
    config = config_of(model, tp_size, 15, prefetch_policy="timeout", prefetch_timeout_s=20.0)
    store = f"disk:{tmp_path / 'store'}?gb=0.1"
    for turn in ("first", "second"):
        with NodeHost(tmp_path / turn, store=store) as host:  # its arena goes with it
            harness = serve_on(host, config, cases, followers, turn, comparison, is_stored=turn == "second")
        assert ("remote" in origins(harness)) == (turn == "second")
    assert any(answer.num_cached_tokens > 0 for answer in harness.answers.values())


class BadWire(InProcessTransfer):
    """Of some pages a bit flips."""

    def read(self, segment, runs, timeout_s):
        batch = super().read(segment, runs, timeout_s)
        for run in runs:
            if zlib.crc32(run.into[:8]) % 4 == 0:
                run.into[0] ^= 1
        return batch


def test_answers_are_the_oracles_with_pages_over_a_bad_wire(tiny, followers, comparison, tmp_path):
    model, cases = tiny
    network = InProcessNetwork()
    config = config_of(model, 1, 15, prefetch_policy="timeout", prefetch_timeout_s=20.0)
    with (
        NodeHost(tmp_path / "a", network, transfer=BadWire) as owner,
        NodeHost(tmp_path / "b", network, transfer=BadWire) as reader,
    ):
        serve_on(owner, config, cases, followers, "first", comparison)
        second = serve_on(reader, config, cases, followers, "second", comparison, owner.endpoint)
        assert second.prefetcher.stats.failed_pages["peer", "corrupt"] > 0
