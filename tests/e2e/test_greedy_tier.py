"""Greedy tokens do not depend on the cache tier, whatever comes back from it, late, broken or not at all."""

import itertools
import zlib

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from cache_service.in_process_transfer import InProcessNetwork, InProcessTransfer
from cache_service.keys import page_keys
from tests.arena_host import ArenaHost
from tests.followers import Followers
from tests.harness import TINY_CONFIG, Harness, write_tiny_model
from tests.node_host import NodeHost, wait_until_remote
from tests.oracle.make_oracle import greedy_tokens
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
    """A random two-layer model in a folder, and answers of transformers' own."""
    folder = write_tiny_model(tmp_path_factory.mktemp("tiny"))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**TINY_CONFIG), dtype=torch.float32).eval()
    model.save_pretrained(folder)
    write_tiny_model(folder)
    generator = torch.Generator().manual_seed(2)
    common = torch.randint(3, 256, (22,), generator=generator).tolist()
    cases = []
    for prompt_len in (5, 14, 27, 27):
        prompt = common[:9] + torch.randint(3, 256, (prompt_len,), generator=generator).tolist()
        cases.append((prompt, greedy_tokens(model, prompt, 8)[0]))
    return str(folder), cases


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


def serve(harness, cases, turn, peer=None):
    """Serve all cases, twice each: the second time they come back from wherever they went.

    The router says that `peer` has their pages.
    """
    for again, (number, (prompt, answer)) in itertools.product(range(2), enumerate(cases)):
        name = f"{turn}-{again}-{number}"
        hints = [] if peer is None else [FetchHint(peer, len(prompt) // PAGE_SIZE)]
        harness.submit(name, prompt, max_tokens=len(answer), ignore_eos=True, hints=hints)
        if number % 2:
            harness.run()
    harness.run(max_steps=100_000)
    for name, got in harness.answers.items():
        if name.startswith(turn):
            assert got.token_ids == cases[int(name[-1])][1], name


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("policy", POLICIES)
def test_answers_are_the_oracles_from_a_pool_that_forgets_all_the_time(tiny, followers, policy, tp_size):
    model, cases = tiny
    with ArenaHost(num_slots=64) as host:
        for turn in ("first", "restarted"):
            with Harness(
                config_of(model, tp_size, num_pages=15),
                followers=followers if tp_size > 1 else None,
                host=host,
                write_policy=policy,
                incarnation=1 if turn == "first" else 2,
            ) as harness:
                serve(harness, cases, turn)
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
def test_answers_are_the_oracles_under_delays_failures_and_flipped_bits(tiny, followers, seed, tp_size):
    model, cases = tiny
    injection = MoveInjection(
        seed, max_delay_s=0.003, failure_ratio=0.1, corruption_ratio=0.1, reorder_window=4
    )
    with (
        ArenaHost(num_slots=20, injection=injection) as host,
        Harness(
            config_of(model, tp_size, num_pages=15),
            followers=followers if tp_size > 1 else None,
            host=host,
            write_policy=POLICIES[seed % 3],
        ) as harness,
    ):
        serve(harness, cases, "only")
        pages = harness.idle_pages()
        assert pages["owned"] == pages["cached"], f"pages leaked: {pages}"
        assert host.leases.num_leased == 0
        assert host.store.num_writing == 0
        host.store.check()


FETCHES_ALL = Safety(weighs_fetches=False)
"""Tiny models compute faster than anybody fetches."""


def serve_on(host, config, cases, followers, turn, peer=None):
    """Serve on a node and return the harness, whose figures are still to be read."""
    with Harness(
        config,
        followers=followers if config.tp_size > 1 else None,
        host=host,
        safety=FETCHES_ALL,
        incarnation=2,
    ) as harness:
        serve(harness, cases, turn, peer)
        pages = harness.idle_pages()
        assert pages["owned"] == pages["cached"], f"pages leaked: {pages}"
        if host.has_store:
            for prompt, _ in cases:
                namespace = harness.engine.namespace.digest()
                wait_until_remote(harness.client, page_keys(namespace, prompt, PAGE_SIZE))
        return harness


def origins(harness):
    return {origin for origin, count in harness.scheduler.stats.prefix_tokens.items() if count}


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("policy", ["wait_complete", "timeout", "best_effort"])
def test_answers_are_the_oracles_with_pages_from_a_peer(tiny, followers, tmp_path, policy, tp_size):
    model, cases = tiny
    network = InProcessNetwork()
    config = config_of(model, tp_size, 15, prefetch_policy=policy, prefetch_timeout_s=20.0)
    with NodeHost(tmp_path / "a", network) as owner, NodeHost(tmp_path / "b", network) as reader:
        first = serve_on(owner, config, cases, followers, "first")
        assert "peer" not in origins(first)
        second = serve_on(reader, config, cases, followers, "second", owner.endpoint)
        assert second.prefetcher.stats.fetched_pages["peer"] > 0
        assert not second.tier.stats.failed_loads
        if policy != "best_effort":
            assert "peer" in origins(second)
            assert second.answers["second-0-0"].num_cached_tokens > 0


@pytest.mark.parametrize("tp_size", [1, 2])
def test_answers_are_the_oracles_with_pages_from_disk(tiny, followers, tmp_path, tp_size):
    model, cases = tiny
    config = config_of(model, tp_size, 15, prefetch_policy="timeout", prefetch_timeout_s=20.0)
    store = f"disk:{tmp_path / 'store'}?gb=0.1"
    for turn in ("first", "second"):
        with NodeHost(tmp_path / turn, store=store) as host:  # its arena goes with it
            harness = serve_on(host, config, cases, followers, turn)
        assert ("remote" in origins(harness)) == (turn == "second")
    assert harness.answers["second-0-0"].num_cached_tokens > 0


class BadWire(InProcessTransfer):
    """Of some pages a bit flips."""

    def read(self, segment, runs, timeout_s):
        batch = super().read(segment, runs, timeout_s)
        for run in runs:
            if zlib.crc32(run.into[:8]) % 4 == 0:
                run.into[0] ^= 1
        return batch


def test_answers_are_the_oracles_with_pages_over_a_bad_wire(tiny, followers, tmp_path):
    model, cases = tiny
    network = InProcessNetwork()
    config = config_of(model, 1, 15, prefetch_policy="timeout", prefetch_timeout_s=20.0)
    with (
        NodeHost(tmp_path / "a", network, transfer=BadWire) as owner,
        NodeHost(tmp_path / "b", network, transfer=BadWire) as reader,
    ):
        serve_on(owner, config, cases, followers, "first")
        second = serve_on(reader, config, cases, followers, "second", owner.endpoint)
        assert second.prefetcher.stats.failed_pages["peer", "corrupt"] > 0
