"""Drafts do not depend on where a prefix came from: computed, on the device, from host, peer or disk.

`self`, the target as its own draft, is right always, as long as its own KV is there; `random-eagle3` guesses
from features, of which a page keeps its last token's.
"""

from dataclasses import dataclass

import pytest

from cache_service import disk_store
from cache_service.arena_safety import ArenaSafety
from cache_service.in_process_transfer import InProcessNetwork
from cache_service.keys import page_keys
from tests.followers import Followers
from tests.harness import Harness, tiny_config, write_tiny_model
from tests.node_host import NO_FAULTS, NodeFaults, NodeHost, wait_until_remote
from workers.engine.mechanisms import Mechanisms
from workers.kvcache.page_pool import Safety
from workers.kvcache.sanitizer_error import SanitizerError
from workers.protocol import FetchHint

PROMPTS = [
    [(11 * i + 5 * n) % 200 + 3 for i in range(length)] for n, length in enumerate((33, 18, 41, 50, 34))
]
"""Some end right behind a page of 16 tokens, others do not."""
NUM_TOKENS = 13
"""The first with the prompt, then three times four."""
ARENA_GB = 0.01
FETCHES_ALL = Safety(weighs_fetches=False)
"""Tiny models compute faster than anybody fetches."""


@pytest.fixture(scope="module")
def followers():
    with Followers(1) as followers:
        yield followers


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@dataclass(frozen=True)
class Served:
    """What one turn came to."""

    answers: list[list[int]]
    drafts: list[list[int]]
    """Of every round of every answer."""
    origins: dict[str, int]
    """Prompt tokens."""
    lengths: dict[int, int]
    """Rows that verified drafts by how many tokens that brought."""
    length_origins: set[str]


def serve(harness, hint=None):
    """Answer the prompts one by one; `hint`: where the router says that their pages are."""
    speculator, drafts, stats = harness.engine._speculator, [], harness.scheduler.stats
    advance = speculator.advance

    def noted(plan, *arguments):
        found = advance(plan, *arguments)
        drafts.extend(speculator._state.drafts[plan.slots[row]].tolist() for row in plan.sampled)
        return found

    speculator.advance = noted
    stats.prefix_tokens.clear()
    stats.accept_lengths.clear()
    names = [f"{len(harness.answers)}-{number}" for number in range(len(PROMPTS))]
    for name, prompt in zip(names, PROMPTS, strict=True):
        hints = [] if hint is None else [FetchHint(hint[0], len(prompt) // harness.config.page_size)]
        harness.submit(name, prompt, max_tokens=NUM_TOKENS, ignore_eos=True, hints=hints)
        harness.run(max_steps=100_000)
    harness.idle_pages()
    speculator.advance = advance
    lengths = {}
    for (_, length), count in stats.accept_lengths.items():
        lengths[length] = lengths.get(length, 0) + count
    return Served(
        [harness.answers[name].token_ids for name in names],
        drafts,
        {origin: count for origin, count in stats.prefix_tokens.items() if count},
        lengths,
        {origin for origin, _ in stats.accept_lengths},
    )


class Places:
    """Nodes and a store that hold what one rank, or two, have computed; serves from each."""

    def __init__(self, folder, config, followers, faults=NO_FAULTS):
        self._folder = folder
        self._config = config
        self._faults = faults
        self._followers = followers if config.tp_size > 1 else None
        self._network = InProcessNetwork()
        self._store = f"disk:{folder / 'store'}?gb=0.1"

    def node(self, name, *, is_stored=True):
        """Return a node of the network."""
        store = self._store if is_stored else None
        return NodeHost(self._folder / name, self._network, store, arena_gb=ARENA_GB, faults=self._faults)

    def harness(self, node):
        return Harness(
            self._config,
            host=node,
            followers=self._followers,
            safety=FETCHES_ALL,
            incarnation=2,
        )

    def keys(self, harness):
        namespace = harness.engine.namespace.digest()
        return [key for prompt in PROMPTS for key in page_keys(namespace, prompt, self._config.page_size)]

    def serve_all(self):
        """Return what each origin came to, by name."""
        found = {}
        with self.node("a") as node:
            with self.harness(node) as harness:
                found["computed"] = serve(harness)
                found["device"] = serve(harness)
                wait_until_remote(harness.client, self.keys(harness))
            with self.harness(node) as harness:
                found["host"] = serve(harness)
            with self.node("b", is_stored=False) as reader, self.harness(reader) as harness:
                found["peer"] = serve(harness, (node.endpoint,))
        with self.node("c") as node, self.harness(node) as harness:
            wait_until_remote(harness.client, self.keys(harness))
            found["remote"] = serve(harness, (None,))
        return found


def config_of(model, draft, page_size, tp_size=1, **options):
    given = {
        "max_tokens_per_step": 64,
        "attention_backend": "native",
        "page_size": page_size,
        "num_pages": 1024 // page_size,
        "prefetch_policy": "timeout",
        "prefetch_timeout_s": 20.0,
    }
    return tiny_config(model, draft=draft, tp_size=tp_size, **given | options)


@pytest.mark.parametrize("tp_size", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("topk", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("draft", ["self", "random-eagle3"])
def test_drafts_are_the_same_wherever_a_prefix_came_from(
    model, followers, tmp_path, draft, topk, page_size, tp_size
):
    config = config_of(model, draft, page_size, tp_size, draft_topk=topk)
    found = Places(tmp_path, config, followers).serve_all()
    computed = found.pop("computed")
    assert computed.origins == {"computed": sum(map(len, PROMPTS))}
    whole = sum((len(prompt) - 1) // page_size * page_size for prompt in PROMPTS)
    for origin, served in found.items():
        assert served.origins[origin] == whole, f"{origin}: {served.origins}"
        assert served.length_origins == {origin}
        assert served.answers == computed.answers, origin
        assert served.drafts == computed.drafts, origin
        assert served.lengths == computed.lengths, origin
        if draft == "self":
            assert served.lengths == {4: 3 * len(PROMPTS)}, f"{origin}: all drafts are right"


def spoil_arena(harness, part):
    arena, section = harness.client.arena, harness.engine.layout.section(part)
    bundles = arena.bundles(0)
    bundles[:, section.offset : section.offset + section.num_bytes] = 0


def spoil_store(folder, harness, part):
    section, num_bytes = harness.engine.layout.section(part), harness.engine.layout.bundle_bytes
    files = list(folder.glob("*.page"))
    assert files
    for file in files:
        record = bytearray(file.read_bytes())
        first = len(record) - num_bytes + section.offset
        record[first : first + section.num_bytes] = bytes(section.num_bytes)
        file.write_bytes(record)


ORIGINS = ("host", "peer", "remote")
PARTS = ("draft", "tail")


def serve_spoilt(model, folder, origin, part, *, verifies):
    """Return what was computed, and what came of its pages without their draft's part, by `origin`."""
    config = config_of(model, "random-eagle3", 4, kv_sanitizer=verifies)
    safety, mechanisms = ArenaSafety(verification=verifies), Mechanisms(verifies_loads=verifies)
    faults = NodeFaults(safety=safety, mechanisms=mechanisms)
    places = Places(folder, config, None, faults)
    with places.node("a") as node:
        with places.harness(node) as harness:
            computed = serve(harness)
            wait_until_remote(harness.client, places.keys(harness))
            spoil_arena(harness, part)
        if origin == "host":
            with places.harness(node) as harness:
                return computed, serve(harness), harness
        if origin == "peer":
            with places.node("b", is_stored=False) as reader, places.harness(reader) as harness:
                return computed, serve(harness, (node.endpoint,)), harness
    spoil_store(folder / "store", harness, part)
    with places.node("c") as node, places.harness(node) as harness:
        wait_until_remote(harness.client, places.keys(harness))
        return computed, serve(harness, (None,)), harness


def num_corrupt(harness, origin):
    if origin == "host":
        return harness.tier.stats.failed_loads["corrupt"]
    return harness.prefetcher.stats.failed_pages[origin, "corrupt"]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("origin", ORIGINS)
def test_pages_without_their_drafts_part_are_missed_and_computed_again(model, tmp_path, origin, part):
    computed, served, harness = serve_spoilt(model, tmp_path, origin, part, verifies=True)
    assert num_corrupt(harness, origin) > 0
    assert served.origins == computed.origins == {"computed": sum(map(len, PROMPTS))}
    assert served == computed


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("origin", ORIGINS)
def test_where_nobody_verifies_them_they_are_a_silent_loss(model, tmp_path, monkeypatch, origin, part):
    """Right answers, other drafts."""
    monkeypatch.setattr(disk_store, "verify", lambda result, layout, page: result)
    computed, served, _ = serve_spoilt(model, tmp_path, origin, part, verifies=False)
    assert served.length_origins == {origin}
    assert served.answers == computed.answers
    assert served.drafts != computed.drafts


def write_not(engine, part):
    """Take back what each draft-extend writes to a part of its pages."""
    extend, section = engine._draft.extend, engine.layout.section(part)
    run, written = extend.run, engine.pool.data[:, section.offset : section.offset + section.num_bytes]

    def taken_back(batch, features):
        before = written.clone()
        run(batch, features)
        written.copy_(before)

    extend.run = taken_back


@pytest.mark.parametrize("draft", ["self", "random-eagle3"])
@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_draft_extend_does_not_write_is_noticed(model, part, draft):
    with Harness(config_of(model, draft, 4, graphs=False)) as harness:
        write_not(harness.engine, part)
        with pytest.raises(SanitizerError, match=r"complete_parts: .* poison in (draft|tail)") as noticed:
            serve(harness)
        assert noticed.value.found == f"poison in {part}"


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_is_not_written_is_missed_where_pages_come_back(model, tmp_path, part):
    """Right answers, other drafts: what the sanitizer stands against."""
    config = config_of(model, "random-eagle3", 4, graphs=False, kv_sanitizer=False)
    places = Places(tmp_path, config, None)
    with places.node("a", is_stored=False) as node:
        with places.harness(node) as harness:
            computed = serve(harness)
        with places.harness(node) as harness:
            assert serve(harness).drafts == computed.drafts
    with places.node("b", is_stored=False) as node:
        with places.harness(node) as harness:
            write_not(harness.engine, part)
            serve(harness)
        with places.harness(node) as harness:
            served = serve(harness)
    assert served.length_origins == {"host"}
    assert served.answers == computed.answers
    assert served.drafts != computed.drafts
