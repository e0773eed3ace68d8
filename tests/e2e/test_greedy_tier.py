"""Greedy tokens do not depend on the cache tier, whatever comes back from it, late, broken or not at all."""

import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.arena_host import ArenaHost
from tests.followers import Followers
from tests.harness import TINY_CONFIG, Harness, write_tiny_model
from tests.oracle.make_oracle import greedy_tokens
from workers.config import WorkerConfig
from workers.kvcache.moves import MoveInjection

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


def config_of(model, tp_size, num_pages):
    return WorkerConfig(
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


def serve(harness, cases, turn):
    """Serve all cases, twice each: the second time they come back from wherever they went."""
    for again, (number, (prompt, answer)) in itertools.product(range(2), enumerate(cases)):
        name = f"{turn}-{again}-{number}"
        harness.submit(name, prompt, max_tokens=len(answer), ignore_eos=True)
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
