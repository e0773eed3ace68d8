"""Metrics of one rank: histograms written by the step loop's thread, the rest read when scraped.

Rank 0 has requests, tokens, pages and the time of a step; every rank counts how its steps ran.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cache_service.metrics import SECONDS_BUCKETS
from workers.engine.graph_guard import EagerReason, Outcome
from workers.inbox import Inbox
from workers.kvcache.manager import KVCacheManager
from workers.plan import BatchPlan, Mode
from workers.protocol import LoadReport
from workers.scheduler.stats import SchedulerStats

StepCounts = Mapping[tuple[Mode, Outcome], int]
ReasonCounts = Mapping[tuple[Mode, EagerReason], int]

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
    load: LoadReport = field(default_factory=lambda: LoadReport(0, 0, 0, 0, 0, 0, 0.0))


def count_steps(
    registry: CollectorRegistry, labels: RankLabels, graph_steps: StepCounts, eager_steps: ReasonCounts
) -> None:
    """Declare what every rank has on `registry`: the engine's own counters, read when scraped.

    They are by (mode, outcome) and by (mode, reason).
    """
    registry.register(_StepCollector(labels, graph_steps, eager_steps))


class LeaderMetrics:
    """Declares rank 0's metrics on `registry`; the step loop's StepRecorder."""

    def __init__(self, registry: CollectorRegistry, labels: RankLabels, leader: LeaderSources) -> None:
        self._leader = leader
        self._step_s = Histogram(
            "eyrie_step_seconds",
            "One step of the engine, plan broadcast and sampling included.",
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
        """Observe one committed step and the admissions in it."""
        if plan.slots:
            self._step_s.labels(*self._labels.values, plan.mode).observe(duration_s)
        for queue_s in self._leader.requests.queue_s:
            self._queue_s.observe(queue_s)

    def loaded(self, load: LoadReport) -> None:
        """Keep the newest load for the next scrape."""
        self._leader.load = load


class _StepCollector(Collector):
    def __init__(
        self,
        labels: RankLabels,
        graph_steps: StepCounts,
        eager_steps: ReasonCounts,
    ) -> None:
        self._labels = labels
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
        return [graph, eager]


class _LeaderCollector(Collector):
    def __init__(self, labels: RankLabels, sources: LeaderSources) -> None:
        self._values = list(labels.values)
        self._sources = sources

    def collect(self) -> Iterable[Metric]:
        yield from self._requests()
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
        ):
            yield self._counter(name, text, count)

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
