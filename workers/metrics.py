"""Metrics of one rank: histograms written by the step loop's thread, the rest read when scraped.

Rank 0 has requests, tokens, pages and the time of a step, and decides what moves; every rank counts how its
steps ran and what its own moves came to.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cache_service.metrics import SECONDS_BUCKETS, MetricLabels
from workers.engine.graph_guard import CaptureStats, EagerReason, Outcome, StepPart
from workers.engine.part_times import TimedPart
from workers.inbox import Inbox
from workers.kvcache.host_tier import HostTier
from workers.kvcache.manager import KVCacheManager
from workers.kvcache.moves import MoveStats
from workers.kvcache.prefetcher import Prefetcher
from workers.plan import BatchPlan, Mode
from workers.protocol import LoadReport
from workers.scheduler.stats import SchedulerStats

StepCounts = Mapping[tuple[StepPart, Outcome], int]
PartSeconds = Mapping[tuple[Mode, TimedPart], float]
ReasonCounts = Mapping[tuple[StepPart, EagerReason], int]

LABELS = ("model", "replica", "rank", "node")


@dataclass(frozen=True)
class RankLabels:
    """Where a rank's figures come from."""

    model: str
    replica: str
    rank: int
    node: str

    @property
    def values(self) -> tuple[str, str, str, str]:
        """In the order of LABELS."""
        return (self.model, self.replica, str(self.rank), self.node)


@dataclass
class LeaderSources:
    """What rank 0's metrics read."""

    requests: SchedulerStats
    cache: KVCacheManager
    inbox: Inbox
    page_bytes: int
    """Of a page on this rank."""
    load: LoadReport = field(default_factory=lambda: LoadReport(0, 0, 0, 0, 0, 0, 0.0))


@dataclass
class TierSources:
    """What a rank's metrics of the cache tier read; the last two are rank 0's."""

    moves: MoveStats
    tier: HostTier | None = None
    prefetcher: Prefetcher | None = None


def count_tier(registry: CollectorRegistry, labels: RankLabels, sources: TierSources) -> None:
    """Declare what a rank that is attached to a host cache has on `registry`."""
    registry.register(_TierCollector(labels, sources))


def count_steps(
    registry: CollectorRegistry,
    labels: RankLabels,
    graph_steps: StepCounts,
    eager_steps: ReasonCounts,
    capture: CaptureStats,
    part_seconds: PartSeconds,
) -> None:
    """Declare what every rank has on `registry`: the engine's own counters, read when scraped.

    They are by (mode, outcome), by (mode, reason) and by (mode, part); `capture` is the start's.
    """
    registry.register(_StepCollector(labels, graph_steps, eager_steps, capture, part_seconds))


class LeaderMetrics:
    """Declares rank 0's metrics on `registry`; the step loop's StepRecorder."""

    def __init__(self, registry: CollectorRegistry, labels: RankLabels, leader: LeaderSources) -> None:
        self._leader = leader
        self._step_s = Histogram(
            "eyrie_step_seconds",
            "From a step's launch, or the end of the one before, until its tokens are there.",
            (*LABELS, "mode"),
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
        self._labels = labels
        self._queue_s = Histogram(
            "eyrie_queue_seconds",
            "A request's arrival at the worker to its first admission.",
            LABELS,
            buckets=SECONDS_BUCKETS,
            registry=registry,
        ).labels(*labels.values)
        registry.register(_LeaderCollector(labels, leader))

    def stepped(self, plan: BatchPlan, duration_s: float) -> None:
        """Observe one committed step and the admissions since the last."""
        if plan.slots:
            self._step_s.labels(*self._labels.values, plan.mode).observe(duration_s)
        for queue_s in self._leader.requests.queue_s:
            self._queue_s.observe(queue_s)
        self._leader.requests.queue_s.clear()

    def loaded(self, load: LoadReport) -> None:
        """Keep the newest load for the next scrape."""
        self._leader.load = load


class _StepCollector(Collector):
    def __init__(
        self,
        labels: RankLabels,
        graph_steps: StepCounts,
        eager_steps: ReasonCounts,
        capture: CaptureStats,
        part_seconds: PartSeconds,
    ) -> None:
        self._part_seconds = part_seconds
        self._labels = labels
        self._capture = capture
        self._graph_steps = graph_steps
        self._eager_steps = eager_steps

    def collect(self) -> Iterable[Metric]:
        graph = CounterMetricFamily(
            "eyrie_graph_steps", "Steps by how they ran.", labels=[*LABELS, "mode", "outcome"]
        )
        eager = CounterMetricFamily(
            "eyrie_graph_eager", "Eager steps by why no graph ran.", labels=[*LABELS, "mode", "reason"]
        )
        for (mode, outcome), count in dict(self._graph_steps).items():  # copies: the loop's thread adds keys
            graph.add_metric([*self._labels.values, mode, outcome], count)
        for (mode, reason), count in dict(self._eager_steps).items():
            eager.add_metric([*self._labels.values, mode, reason], count)
        parts = CounterMetricFamily(
            "eyrie_draft_seconds",
            "With a draft, what a step's parts took on the device: target, with draft_extend where that is"
            " part of its pass, accept, draft.",
            labels=[*LABELS, "mode", "kind"],
        )
        for (mode, part), seconds in dict(self._part_seconds).items():
            parts.add_metric([*self._labels.values, mode, part], seconds)
        gauge = MetricLabels(LABELS, self._labels.values).gauge
        return [
            graph,
            eager,
            parts,
            gauge("eyrie_graphs", "Steps prepared at the start.", self._capture.num_graphs),
            gauge("eyrie_graph_capture_seconds", "What preparing them took.", self._capture.seconds),
            gauge("eyrie_graph_bytes", "Device memory that they take.", self._capture.num_bytes),
        ]


class _LeaderCollector(Collector):
    def __init__(self, labels: RankLabels, sources: LeaderSources) -> None:
        self._values = list(labels.values)
        self._sources = sources

    def collect(self) -> Iterable[Metric]:
        yield from self._requests()
        yield from self._drafts(self._sources.requests)
        yield from self._pages()

    def _requests(self) -> Iterable[Metric]:
        stats, load = self._sources.requests, self._sources.load
        finished = CounterMetricFamily(
            "eyrie_worker_requests", "Requests ended, by finish reason.", labels=[*LABELS, "finish_reason"]
        )
        for reason, count in dict(stats.num_finished).items():
            finished.add_metric([*self._values, reason], count)
        yield finished
        refused = CounterMetricFamily(
            "eyrie_refusals", "Requests and messages turned away, by why.", labels=[*LABELS, "reason"]
        )
        for why, count in {**stats.num_refused, **self._sources.inbox.refusals}.items():
            refused.add_metric([*self._values, why], count)
        yield refused
        yield self._gauge("eyrie_running_requests", "Requests with a slot.", load.num_running)
        yield self._gauge("eyrie_waiting_requests", "Requests that wait for a slot.", load.num_waiting)
        for name, text, count in (
            ("eyrie_prompt_tokens", "Prompt tokens queued.", stats.num_prompt_tokens),
            ("eyrie_cached_tokens", "Prompt tokens found in the cache.", stats.num_cached_tokens),
            ("eyrie_generated_tokens", "Tokens sampled.", stats.num_generated_tokens),
            ("eyrie_preemptions", "Requests that lost their slot to go on later.", stats.num_preemptions),
            ("eyrie_unproven_rows", "Rows run again: a LOAD's verdict was late.", stats.num_unproven_rows),
        ):
            yield self._counter(name, text, count)
        prefix = CounterMetricFamily(
            "eyrie_prefix_tokens",
            "Prompt tokens by where their KV was found: device, host, host after a FETCH from a peer or from"
            " the remote store; or computed.",
            labels=[*LABELS, "origin"],
        )
        for origin, count in dict(stats.prefix_tokens).items():
            prefix.add_metric([*self._values, origin], count)
        yield prefix

    def _drafts(self, stats: SchedulerStats) -> Iterable[Metric]:
        drafts = CounterMetricFamily(
            "eyrie_drafts",
            "Drafted tokens that were verified, by place behind the known ones and by outcome.",
            labels=[*LABELS, "place", "outcome"],
        )
        for (place, outcome), count in dict(stats.num_drafts).items():
            drafts.add_metric([*self._values, str(place), outcome], count)
        yield drafts
        lengths = CounterMetricFamily(
            "eyrie_accept_lengths",
            "Rows that verified drafts, by where the most of the prompt's KV was found and by tokens kept:"
            " the right drafts and the token sampled behind them.",
            labels=[*LABELS, "origin", "length"],
        )
        for (origin, length), count in dict(stats.accept_lengths).items():
            lengths.add_metric([*self._values, origin, str(length)], count)
        yield lengths
        tokens = CounterMetricFamily(
            "eyrie_step_tokens",
            "Tokens that steps of a mode brought; by the count of eyrie_step_seconds: tokens a step.",
            labels=[*LABELS, "mode"],
        )
        for mode, count in dict(stats.step_tokens).items():
            tokens.add_metric([*self._values, mode], count)
        yield tokens
        steps = CounterMetricFamily(
            "eyrie_draft_steps",
            "Steps that sampled beside a draft, by how many tokens it guessed for each row; 0: it was off.",
            labels=[*LABELS, "length"],
        )
        for length, count in dict(stats.draft_steps).items():
            steps.add_metric([*self._values, str(length)], count)
        yield steps
        switches = CounterMetricFamily(
            "eyrie_draft_switches",
            "Times that `draft_tokens: auto` turned guessing on or off, and why.",
            labels=[*LABELS, "outcome", "reason"],
        )
        for switch, count in dict(stats.draft_switches).items():
            switches.add_metric([*self._values, *switch], count)
        yield switches

    def _pages(self) -> Iterable[Metric]:
        pages = self._sources.cache.stats()
        by_state = GaugeMetricFamily(
            "eyrie_kv_pages", "Pages of the device pool by state.", labels=[*LABELS, "state"]
        )
        for state, count in (
            ("free", pages.num_free_pages),
            ("owned", pages.num_owned_pages),
            ("quiescing", pages.num_quiescing_pages),
        ):
            by_state.add_metric([*self._values, state], count)
        yield by_state
        yield self._gauge("eyrie_kv_page_bytes", "Bytes of a page on one rank.", self._sources.page_bytes)
        yield self._gauge("eyrie_kv_cached_pages", "Owned pages in the prefix tree.", pages.num_cached_pages)
        yield self._counter("eyrie_kv_evictions", "Pages evicted from the tree.", pages.num_evictions)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=LABELS)
        family.add_metric(self._values, value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=LABELS)
        family.add_metric(self._values, value)
        return family


class _TierCollector(Collector):
    """Figures are copied before they are read: other threads add keys."""

    def __init__(self, labels: RankLabels, sources: TierSources) -> None:
        self._labels = MetricLabels(LABELS, labels.values)
        self._sources = sources

    def collect(self) -> Iterable[Metric]:
        yield from self._moves(self._sources.moves)
        tier, prefetcher = self._sources.tier, self._sources.prefetcher
        if tier is not None and prefetcher is not None:
            yield from self._decisions(tier, prefetcher)
            yield from self._fetches(prefetcher)

    def _moves(self, stats: MoveStats) -> Iterable[Metric]:
        moves = CounterMetricFamily(
            "eyrie_moves", "This rank's copies of pages that are over.", labels=[*LABELS, "kind", "outcome"]
        )
        for (kind, status), count in dict(stats.counts).items():
            moves.add_metric([*self._labels.values, kind, status.name.lower()], count)
        yield moves
        counters = self._labels.counters
        yield counters("eyrie_move_bytes", "Bytes copied by moves.", "kind", _figures(stats.num_bytes))
        yield counters(
            "eyrie_move_seconds", "Time that moves took, but for the queue.", "kind", _figures(stats.seconds)
        )
        copies, bounced = _figures(stats.num_copies), _figures(stats.num_bounced)
        waits = _figures(stats.num_waits)
        yield counters("eyrie_move_copies", "Copies that copy engines were given.", "kind", copies)
        yield counters("eyrie_bounced_pages", "Pages copied through a buffer: not pinned.", "kind", bounced)
        yield counters("eyrie_load_waits", "Steps behind LOADs in flight, by who waited.", "kind", waits)
        num_bytes = stats.num_pinned_bytes()
        yield self._labels.gauge("eyrie_pinned_bytes", "Of the arena, for a device's copies.", num_bytes)

    def _decisions(self, tier: HostTier, prefetcher: Prefetcher) -> Iterable[Metric]:
        stats, fetches = tier.stats, prefetcher.stats
        pages = CounterMetricFamily(
            "eyrie_tier_pages",
            "Pages saved, loaded and fetched, or not and why, on all ranks of the replica.",
            labels=[*LABELS, "kind", "outcome", "reason"],
        )

        def add(kind: str, outcome: str, count: int, reason: str = "") -> None:
            pages.add_metric([*self._labels.values, kind, outcome, reason], count)

        add("save", "done", stats.num_saved_pages)
        add("load", "done", stats.num_loaded_pages)
        add("fetch", "done", sum(dict(fetches.fetched_pages).values()))
        for kind, outcome, counts in (
            ("save", "failed", stats.failed_saves),
            ("load", "failed", stats.failed_loads),
            ("save", "skipped", stats.skipped_saves),
            ("fetch", "skipped", fetches.skipped_pages),
        ):
            for reason, count in dict(counts).items():
                add(kind, outcome, count, reason)
        failed_fetches: Counter[str] = Counter()
        for (_, reason), count in dict(fetches.failed_pages).items():
            failed_fetches[reason] += count
        for reason, count in failed_fetches.items():
            add("fetch", "failed", count, reason)
        yield pages
        yield self._labels.counter(
            "eyrie_tier_lost_pages", "Pages evicted from the device without a copy.", stats.num_lost_pages
        )
        yield self._labels.gauges(
            "eyrie_moves_in_flight",
            "Moves that some rank is at; pages that are being fetched.",
            "kind",
            {
                "save": tier.num_saves_in_flight,
                "load": tier.num_loads_in_flight,
                "fetch": prefetcher.num_pages_in_flight,
            },
        )

    def _fetches(self, prefetcher: Prefetcher) -> Iterable[Metric]:
        stats = prefetcher.stats
        for name, text, values in (
            ("eyrie_fetches", "FETCHes begun.", _figures(stats.num_fetches)),
            ("eyrie_fetched_pages", "Pages that FETCHes brought.", _figures(stats.fetched_pages)),
            ("eyrie_fetch_bytes", "Bytes of these.", _figures(stats.num_bytes)),
            ("eyrie_fetch_seconds", "Time from FETCHes to their answers.", _figures(stats.seconds)),
        ):
            yield self._labels.counters(name, text, "source", values)
        failed = CounterMetricFamily(
            "eyrie_fetch_failed_pages",
            "Pages that FETCHes did not bring, by source and why.",
            labels=[*LABELS, "source", "reason"],
        )
        for (kind, reason), count in dict(stats.failed_pages).items():
            failed.add_metric([*self._labels.values, kind, reason], count)
        yield failed


def _figures(values: Mapping[Any, float]) -> dict[str, float]:
    return {str(name): float(value) for name, value in dict(values).items()}
