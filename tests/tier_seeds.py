"""TierSeed: one number draws how a replica is served over the cache tier, and all that goes wrong meanwhile.

`play` serves the cases turn by turn, restarts what the draw says, compares every answer with the oracle's.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Literal, Self

from cache_service.client import Deadlines
from cache_service.in_process_transfer import InProcessNetwork
from cache_service.injected_pages import PageInjection
from cache_service.injection import ClientInjection, MessageInjection
from cache_service.messages import Found, Lookup, StatsReply
from cache_service.server_connection import Patience
from tests.drafts import is_perfect
from tests.followers import Followers
from tests.harness import Harness, bundle_bytes
from tests.node_host import NodeFaults, NodeHost
from tests.scenario import Case, Comparison
from tests.unit.cache_nodes import eventually
from workers.card import load_card
from workers.config import WorkerConfig
from workers.engine.mechanisms import ALL_ON, Mechanisms
from workers.kvcache.host_tier import WritePolicy
from workers.kvcache.moves import MoveInjection
from workers.kvcache.page_pool import Safety
from workers.kvcache.prefetcher import PrefetchPolicy
from workers.protocol import FetchHint

Source = Literal["host", "peer", "disk", "store"]
Restart = Literal["none", "stopped", "killed"]

WRITE_POLICIES: tuple[WritePolicy, ...] = ("write_through", "write_through_selective", "write_back")
PREFETCH_POLICIES: tuple[PrefetchPolicy, ...] = ("best_effort", "wait_complete", "timeout")
MAX_STEPS = 100_000
DRAFT_TOKENS = 3
SETTLE_S = 30.0
SHORT = Deadlines(grant_s=0.1, commit_s=0.3, report_s=2.0, resync_s=0.2)
HASTY = Patience(
    attach_s=0.3, reconnect_s=0.01, max_reconnect_s=0.05, idle_s=0.05, retry_s=0.05, max_retry_s=0.2
)
FETCHES_ALL = Safety(weighs_fetches=False)
"""Tiny models compute faster than anybody fetches."""


@dataclass
class TookPlace:
    """What has happened over all seeds, to see that something did."""

    num_seeds: int = 0
    counts: Counter[str] = field(default_factory=Counter)

    def note_harness(self, harness: Harness) -> None:
        tier, fetches, client = harness.tier.stats, harness.prefetcher.stats, harness.client
        assert client.subscriber is not None
        follower = client.subscriber.follower.stats
        self.counts.update(
            {
                "saved": tier.num_saved_pages,
                "loaded": tier.num_loaded_pages,
                "resyncs": follower.num_resyncs,
                "gaps": follower.num_gaps,
                "duplicates": follower.num_duplicates,
                "undecodable": client.subscriber.num_undecodable,
                "restarts seen": follower.num_restarts,
                "attached again": max(0, client.stats.num_attaches - 1),
                "breaker opened": client.connection.breaker.num_opened,
            }
        )
        drafts, name = harness.scheduler.stats.num_drafts, harness.config.draft
        for (_, outcome), count in drafts.items():
            self.counts[f"drafts {outcome}: {name}"] += count
        drafted = harness.scheduler.stats.prefix_tokens if name is not None else {}
        for name, counter in (
            ("load failed:", tier.failed_loads),
            ("save failed:", tier.failed_saves),
            ("save skipped:", tier.skipped_saves),
            ("fetched:", fetches.fetched_pages),
            ("fetch failed:", fetches.failed_pages),
            ("prefix:", harness.scheduler.stats.prefix_tokens),
            ("prefix with a draft:", drafted),
            ("commit:", client.stats.commits),
            ("miss:", client.stats.misses),
            ("call:", client.connection.calls),
            ("call", client.connection.injected.counts if client.connection.injected else {}),
            ("broadcast", client.subscriber.injected.counts if client.subscriber.injected else {}),
        ):
            for reason, count in counter.items():
                words = reason if isinstance(reason, tuple) else (reason,)
                self.counts[" ".join([name, *map(str, words)])] += count

    def note_peers(self, node: NodeHost) -> None:
        for words, count in node.peer_messages().items():
            self.counts[" ".join(["peer call", *words])] += count

    def note_node(self, stats: StatsReply) -> None:
        for count in stats.counts:
            self.counts[f"node: {count.name} {count.reason}".strip()] += count.value


@dataclass(frozen=True)
class TierSeed:
    """One draw."""

    seed: int
    tp_size: int
    page_size: int
    write_policy: WritePolicy
    prefetch_policy: PrefetchPolicy
    prefetch_timeout_s: float
    source: Source
    restart: Restart
    """Of the CacheServer, in the midst of a turn."""
    is_restarted_between: bool
    """The CacheServer, between two turns."""
    num_spare_pages: int
    """What the pool has beyond the longest request's pages."""
    is_tight: bool
    """The arena holds less than all pages."""
    faults: NodeFaults
    safety: Safety = FETCHES_ALL
    mechanisms: Mechanisms = ALL_ON
    """Of the engine; those of its mover are the node's."""
    overlap_depth: int = 0
    draft: str | None = None
    draft_topk: int = 1

    @classmethod
    def draw(cls, seed: int, sources: Sequence[Source], page_sizes: Sequence[int]) -> Self:
        random = Random(seed)
        source = random.choice(sources)
        restarts: list[Restart] = ["none", "none", "none", "stopped", "stopped", "killed"]
        restart = random.choice(restarts)
        if source in ("peer", "store") and restart == "killed":
            restart = "stopped"
        return cls(
            seed,
            random.choice((1, 2)),
            random.choice(page_sizes),
            random.choice(WRITE_POLICIES),
            random.choice(PREFETCH_POLICIES),
            random.choice((0.05, 0.2)),
            source,
            restart,
            random.random() < 0.3,
            random.randrange(1, 8),
            random.random() < 0.3,
            _faults(seed, random),
            overlap_depth=random.choice((0, 1)),
            draft=random.choice((None, None, "self", "random-eagle3")),
            draft_topk=random.choice((1, 2)),
        )

    def play(
        self,
        cases: Sequence[Case],
        folder: Path,
        followers: Followers,
        comparison: Comparison,
        took_place: TookPlace,
        store: str | None = None,
        **options: object,
    ) -> None:
        """Serve all cases in three turns. `store` is the address for the source of that name."""
        _Play(self, cases, folder, followers, comparison, took_place, store, options).run()


def _faults(seed: int, random: Random) -> NodeFaults:
    """Draw how much goes wrong: of each kind nothing in some seeds, a lot in others."""

    def some(max_ratio: float) -> float:
        return random.choice((0.0, max_ratio / 4, max_ratio))

    def of_messages(name: str, ratio: float, duplicate_ratio: float = 0.3) -> MessageInjection:
        return MessageInjection(
            seed=random.randrange(1 << 30),
            delay_ratio=some(0.5),
            max_delay_s=0.02,
            loss_ratio=some(ratio),
            duplicate_ratio=some(duplicate_ratio),
            damage_ratio=some(ratio / 2),
        )

    return NodeFaults(
        MoveInjection(
            seed,
            max_delay_s=random.choice((0.0, 0.001, 0.004)),
            failure_ratio=some(0.15),
            corruption_ratio=some(0.15),
            reorder_window=random.choice((0, 4)),
        ),
        ClientInjection(of_messages("calls", 0.1), of_messages("broadcasts", 0.3)),
        PageInjection(
            seed,
            max_delay_s=random.choice((0.0, 0.02)),
            failure_ratio=some(0.2),
            corruption_ratio=some(0.2),
            late_ratio=some(0.3),
            max_late_s=0.1,
        ),
        of_messages("peers", 0.1, duplicate_ratio=0.0),  # nobody sends a peer a call again
        SHORT,
        HASTY,
    )


class _Play:
    """The turns of one draw."""

    def __init__(
        self,
        draw: TierSeed,
        cases: Sequence[Case],
        folder: Path,
        followers: Followers,
        comparison: Comparison,
        took_place: TookPlace,
        store: str | None,
        options: dict[str, object],
    ) -> None:
        self._draw = draw
        self._cases = cases
        self._folder = folder
        self._followers = followers
        self._comparison = comparison
        self._took_place = took_place
        self._random = Random(f"turns/{draw.seed}")
        self._network = InProcessNetwork() if draw.source == "peer" else None
        self._store = f"disk:{folder / 'store'}?gb=0.25" if draw.source == "disk" else store
        drafts = {"draft": draw.draft, "draft_tokens": DRAFT_TOKENS, "draft_topk": draw.draft_topk}
        window = WorkerConfig(**drafts).draft_window
        sizes = sorted(
            -(-(len(case.prompt_ids) + len(case.token_ids) + window) // draw.page_size) for case in cases
        )
        chosen: dict[str, object] = {
            "dtype": "float32",
            "tp_size": draw.tp_size,
            "page_size": draw.page_size,
            "num_pages": sizes[-1] + draw.num_spare_pages,  # it forgets all the time
            "max_tokens_per_step": 16,
            "max_running_requests": 2,
            "overlap_depth": draw.overlap_depth,
            **drafts,
            "kv_sanitizer": True,
            "num_threads": 1,
            "prefetch_policy": draw.prefetch_policy,
            "prefetch_timeout_s": draw.prefetch_timeout_s,
        }
        self._config = WorkerConfig(**(chosen | options))  # type: ignore[arg-type]
        num_slots = sizes[-1] + 4 if draw.is_tight else 4 * sum(sizes)
        page_bytes = bundle_bytes(self._config, load_card(self._config.model)) * draw.tp_size
        self._arena_gb = (num_slots * (page_bytes + 192) + 20_480) / (1 << 30)

    def run(self) -> None:
        self._took_place.num_seeds += 1
        with self._node("a") as first:
            self._serve(first, "saving", self._draw.restart)
            if self._draw.is_restarted_between:
                first.down()
                first.up()
            self._serve(first, "back", "none")  # by another worker
            if self._draw.source == "peer":
                with self._node("b") as second:
                    self._serve(second, "peer", "none", [first.endpoint])
                    self._took_place.note_peers(second)
                    self._settle(second)
            self._settle(first)
        if self._draw.source in ("disk", "store"):
            with self._node("c") as third:
                self._serve(third, self._draw.source, "none", [None])
                self._settle(third)

    def _node(self, name: str) -> NodeHost:
        return NodeHost(
            self._folder / name,
            self._network,
            self._store,
            arena_gb=self._arena_gb,
            faults=self._draw.faults,
            is_process=self._draw.restart == "killed" and name == "a",
        )

    def _serve(
        self, node: NodeHost, turn: str, restart: Restart, elsewhere: Sequence[str | None] = ()
    ) -> None:
        """Serve all cases twice; the router says that all pages are `elsewhere`, None being the store."""
        draw = self._draw
        with Harness(
            self._config,
            followers=self._followers if draw.tp_size > 1 else None,
            host=node,
            write_policy=draw.write_policy,
            safety=draw.safety,
            mechanisms=draw.mechanisms,
            incarnation=self._random.randrange(1, 1 << 30),
        ) as harness:
            if None in elsewhere:
                eventually(lambda: node.stats().store)
            for again in range(2):
                self._serve_all(harness, node, f"{turn}-{again}", restart if not again else "none", elsewhere)
            pages = harness.idle_pages()
            assert pages["owned"] == pages["cached"], f"seed {draw.seed}: pages leaked: {pages}"
            assert pages["quiescing"] == 0, f"seed {draw.seed}: {pages}"
            assert harness.client.leases.num_leased == 0, f"seed {draw.seed}: leases are left"
            assert harness.engine.num_sanitized_steps > 0 or not self._config.kv_sanitizer
            outcomes = {outcome for _, outcome in harness.scheduler.stats.num_drafts}
            assert not is_perfect(draw.draft) or outcomes == {"accepted"}, (
                f"seed {draw.seed}: a perfect draft lost some of its own on the way: {outcomes}"
            )
            self._took_place.note_harness(harness)
            _calm_down(harness)

    def _serve_all(
        self,
        harness: Harness,
        node: NodeHost,
        name: str,
        restart: Restart,
        elsewhere: Sequence[str | None],
    ) -> None:
        order = list(enumerate(self._cases))
        self._random.shuffle(order)
        num_until_down = self._random.randrange(len(order))
        for place, (number, case) in enumerate(order):
            num_pages = len(case.prompt_ids) // self._draw.page_size
            harness.submit(
                f"{name}-{number}",
                case.prompt_ids,
                max_tokens=len(case.token_ids),
                ignore_eos=True,
                hints=[FetchHint(place, num_pages) for place in elsewhere],
            )
            if self._random.random() < 0.5:
                self._step(harness, self._random.randrange(1, 8))
            if restart != "none" and place == num_until_down:
                node.down()
                self._step(harness, self._random.randrange(20))
                node.up()
        harness.run(MAX_STEPS)
        for number, case in order:
            answer = harness.answers[f"{name}-{number}"]
            assert answer.finish_reason == "length"
            self._comparison.compare(
                f"seed {self._draw.seed} {name}-{number}", answer.token_ids, case.token_ids, case.margins
            )

    def _step(self, harness: Harness, num_steps: int) -> None:
        for _ in range(num_steps):
            if harness.scheduler.has_requests:
                harness.step()

    def _settle(self, node: NodeHost) -> None:
        """See that the node holds nothing for anybody once all have left and all is put."""
        end_s = time.monotonic() + SETTLE_S
        while (held := _held(stats := node.stats())) or (node.has_store and not stats.store):
            assert time.monotonic() < end_s, f"seed {self._draw.seed}: the node holds {held}: {stats}"
            time.sleep(0.01)
        self._took_place.note_node(stats)


def _calm_down(harness: Harness) -> None:
    """Have the client leave for sure: a server cannot tell one whose farewell is lost from one that hangs."""
    connection = harness.client.connection
    if connection.injected is not None:
        connection.injected.stop()  # what is late still comes, before the answer to this
    eventually(lambda: isinstance(connection.ask_and_wait(Lookup([]), 1.0), Found))


def _held(stats: StatsReply) -> dict[str, int]:
    """Return what a node holds for anybody, by name."""
    names = ("num_readers", "num_writing", "num_draining", "num_lingering", "num_lent", "num_fetches")
    held = {name: getattr(stats, name) for name in (*names, "num_put_waiting")}
    return {name: num for name, num in held.items() if num}
