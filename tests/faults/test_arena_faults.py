"""A worker dies in the middle of a copy; all of a full arena is leased: tokens stay right, nothing leaks."""

import multiprocessing
import time
from pathlib import Path
from typing import Literal

import pytest

from cache_service.page_records import Location
from tests.arena_host import ArenaHost
from tests.drafts import DRAFTS, is_perfect
from tests.harness import Harness, tiny_config, write_tiny_model
from tests.node_host import NodeFaults, NodeHost, NodePlace
from tests.unit.cache_nodes import eventually
from workers.kvcache.moves import Move, MoveInjection

PROMPT = list(range(30, 61))
OTHERS = [[number] * 21 for number in range(70, 76)]
NUM_PAGES = 24
"""Of the device: too few for all prompts."""
COPY_WAIT_S = 60.0


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(
    scope="module", params=[None, *(pytest.param(name, marks=pytest.mark.slow) for name in DRAFTS)], ids=str
)
def draft(request):
    """A draft's name; what its pages hold of it goes wherever they go."""
    return request.param


def answers(model, draft, host, incarnation, prompts=(PROMPT, *OTHERS)):
    """Serve prompts one after the other; return the harness and their tokens."""
    config = tiny_config(model, num_pages=NUM_PAGES, **DRAFTS.get(draft, {}))
    with Harness(config, host=host, incarnation=incarnation) as harness:
        for number, prompt in enumerate(prompts):
            harness.submit(str(number), prompt, max_tokens=6, ignore_eos=True)
            harness.run()
        harness.idle_pages()
        num_drafts = harness.scheduler.stats.num_drafts
        assert not is_perfect(draft) or {outcome for _, outcome in num_drafts} == {"accepted"}
        return harness, [harness.answers[str(number)].token_ids for number in range(len(prompts))]


@pytest.fixture(scope="module")
def expected(model):
    """The tokens without a draft."""
    return answers(model, None, None, 1)[1]


class Joined:
    """A node whose server is another process's, as a Harness takes it; its moves go wrong."""

    has_store = False

    def __init__(self, endpoint: str, injection: MoveInjection, has_pages: bool) -> None:
        self._endpoint = endpoint
        self._faults = NodeFaults(moves=injection)
        self._has_pages = has_pages

    def place(self, bundle_bytes: int, num_ranks: int) -> NodePlace:
        return NodePlace(self._endpoint, 99, self._faults)

    def cache_of(self, attached):
        eventually(lambda: attached.num_grants and (attached.num_known_pages or not self._has_pages))
        return attached


def work_until_killed(model: Path, draft: str | None, endpoint: str, kind: str, in_copy) -> None:
    """A worker that serves PROMPT, and stops in the middle of its first copy of this kind."""

    def during_copy(move: Move) -> None:
        if move.kind == kind:
            in_copy.set()
            time.sleep(600)

    host = Joined(endpoint, MoveInjection(0, during_copy=during_copy), has_pages=kind == "load")
    answers(model, draft, host, 2, [PROMPT])


def kill_in_copy(model, draft, host, kind: Literal["save", "load"]) -> None:
    """Kill a worker in a copy; the server sees what it holds, and then that nothing is held."""
    spawn = multiprocessing.get_context("spawn")
    in_copy = spawn.Event()
    worker = spawn.Process(
        target=work_until_killed, args=(model, draft, host.endpoint, kind, in_copy), daemon=True
    )
    worker.start()
    try:
        assert in_copy.wait(COPY_WAIT_S)
        eventually(lambda: host.stats().num_leased if kind == "load" else host.stats().num_writing)
        assert host.stats().num_readers == 1
    finally:
        worker.kill()
        worker.join()
    eventually(lambda: host.stats().num_readers == 0)
    eventually(lambda: host.stats().num_leased == 0)
    stats = host.stats()
    assert (stats.num_writing, stats.num_draining) == (0, 0)


def test_a_worker_killed_while_it_saves_leaves_no_half_page(tmp_path, model, draft, expected):
    with NodeHost(tmp_path / "node") as host:
        kill_in_copy(model, draft, host, "save")
        assert host.stats().num_ready == 0, "it never told of the page"
        harness, tokens = answers(model, draft, host, 3)
        assert tokens == expected
        assert harness.answers["0"].num_cached_tokens == 0
        assert harness.tier.stats.num_saved_pages > 0


def test_a_worker_killed_while_it_loads_takes_no_page_along(tmp_path, model, draft, expected):
    with NodeHost(tmp_path / "node") as host:
        assert answers(model, draft, host, 1)[1] == expected
        num_ready = host.stats().num_ready
        kill_in_copy(model, draft, host, "load")
        assert host.stats().num_ready >= num_ready
        harness, tokens = answers(model, draft, host, 3)
        assert tokens == expected
        assert harness.answers["0"].num_cached_tokens > 0
        assert harness.tier.stats.num_loaded_pages > 0 and not harness.tier.stats.failed_loads


def test_a_full_arena_with_everything_leased_costs_saves_only(model, draft, expected):
    new = [[number + 20 for number in prompt] for prompt in (PROMPT, *OTHERS)]
    with ArenaHost(num_slots=8) as host:
        assert answers(model, draft, host, 1)[1] == expected
        pages = list(host.store.stored())
        locations = [Location(page.slot, page.epoch) for page in pages]
        assert host.leases.acquire([page.key for page in pages], locations) == host.store.num_ready == 8
        second, tokens = answers(model, draft, host, 2, new)
        assert second.tier.stats.skipped_saves["no_grant"] > 0
        assert second.tier.stats.num_saved_pages == 0 and second.tier.stats.num_lost_pages > 0
        assert host.store.num_refused > 0
        assert tokens == answers(model, None, None, 1, new)[1]
        host.leases.release([location.slot for location in locations])
        third, tokens = answers(model, draft, host, 3)
        assert tokens == expected and third.tier.stats.num_saved_pages > 0


@pytest.mark.parametrize("policy", ["write_through", "write_back"])
def test_a_prompt_longer_than_the_grants_held_in_advance_is_saved_whole(tmp_path, model, policy):
    prompt = [40 + number % 60 for number in range(120)]
    config = tiny_config(model, num_pages=48, max_tokens_per_step=128)
    with (
        NodeHost(tmp_path / "node", arena_gb=0.0004) as host,
        Harness(config, host=host, incarnation=1, write_policy=policy) as harness,
    ):
        for name, tokens in (("0", prompt), ("1", prompt[::-1])):
            harness.submit(name, tokens, max_tokens=6, ignore_eos=True)
            harness.run()
            harness.idle_pages()
        stats = harness.tier.stats
        assert host.stats().num_slots // 8 < 30, "the grants in advance are fewer than the prompt's pages"
        assert stats.num_saved_pages >= (60 if policy == "write_through" else 12)
        assert stats.num_lost_pages == stats.skipped_saves.total() == 0
