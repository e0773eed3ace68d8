"""Metrics of an API process: requests, latencies and tokens as clients see them, and the router's placements.

All is written on the event loop and read by whoever scrapes `/metrics`.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from cache_service.metrics import SECONDS_BUCKETS, MetricLabels
from cluster.api.ports import RequestSummary
from cluster.router.cache_feed import CacheFeedStats
from workers.protocol import ReplicaId

LABELS = ("model", "node")


class ApiMetrics:
    """Declares one API process's metrics: the API's RequestRecorder, the router's PlacementRecorder."""

    def __init__(self, model: str, node: str) -> None:
        self._registry = CollectorRegistry()
        self._labels = (model, node)
        self._requests = self._counter("eyrie_requests", "Requests ended, by finish reason.", "finish_reason")
        self._answers = self._counter("eyrie_http_answers", "HTTP answers.", "route", "status")
        self._placements = self._counter("eyrie_router_placements", "Requests sent to a replica.", "replica")
        self._pages = self._counter(
            "eyrie_router_prompt_pages", "Whole prompt pages of the requests placed.", "replica"
        )
        self._held_pages = self._counter(
            "eyrie_router_held_pages", "Those of them that the index took for held there.", "replica"
        )
        self._hints = self._counter(
            "eyrie_router_hints",
            "Places to fetch from that requests were told: a peer's arena or the remote store.",
            "kind",
        )
        self._losses = self._counter(
            "eyrie_replica_losses", "Losses of a replica, failed restarts included.", "replica"
        )
        self._restarts = self._counter("eyrie_replica_restarts", "Restarts that serve again.", "replica")
        self._ttft_s = self._seconds("eyrie_time_to_first_token_seconds", "Arrival to first token.")
        self._inter_token_s = self._seconds("eyrie_inter_token_seconds", "One token to the next.")
        self._duration_s = self._seconds("eyrie_request_seconds", "Arrival to last token.")
        self._prompt_tokens = self._counter("eyrie_request_prompt_tokens", "Prompt tokens of ended requests.")
        self._cached_tokens = self._counter("eyrie_request_cached_tokens", "Those of them found in a cache.")
        self._generated_tokens = self._counter("eyrie_request_generated_tokens", "Tokens given to clients.")

    def watch(self, num_index_gaps: Callable[[], int], num_ready_replicas: Callable[[], int]) -> None:
        """Read the router's state at each scrape."""
        gaps = Gauge(
            "eyrie_router_index_gaps",
            "Snapshots asked for because KV events were missing.",
            LABELS,
            registry=self._registry,
        )
        gaps.labels(*self._labels).set_function(num_index_gaps)
        ready = Gauge("eyrie_ready_replicas", "Replicas that take requests.", LABELS, registry=self._registry)
        ready.labels(*self._labels).set_function(num_ready_replicas)

    def watch_caches(self, read: Callable[[], Sequence[CacheFeedStats]]) -> None:
        """Read at each scrape what the router has of the CacheServers."""
        self._registry.register(_CacheFeedCollector(self._labels, read))

    def replica_lost(self, replica_id: ReplicaId) -> None:
        """Count the loss of a replica, or a restart that failed."""
        self._losses.labels(*self._labels, replica_id).inc()

    def replica_restarted(self, replica_id: ReplicaId) -> None:
        """Count a replica that serves again."""
        self._restarts.labels(*self._labels, replica_id).inc()

    # RequestRecorder

    def first_token(self, latency_s: float) -> None:
        """Observe one time to first token."""
        self._ttft_s.observe(latency_s)

    def next_tokens(self, latency_s: float, num_tokens: int) -> None:
        """Observe one step's gap, shared by its tokens."""
        for _ in range(num_tokens):
            self._inter_token_s.observe(latency_s / num_tokens)

    def finished(self, summary: RequestSummary) -> None:
        """Count one ended request."""
        self._requests.labels(*self._labels, summary.finish_reason).inc()
        self._duration_s.observe(summary.duration_s)
        self._prompt_tokens.labels(*self._labels).inc(summary.prompt_len)
        self._cached_tokens.labels(*self._labels).inc(summary.cached_len)
        self._generated_tokens.labels(*self._labels).inc(summary.generated_len)

    def answered(self, route: str, status: int) -> None:
        """Count one HTTP answer."""
        self._answers.labels(*self._labels, route, str(status)).inc()

    def exposition(self) -> tuple[bytes, str]:
        """Return all of it as text, and the text's content type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    # PlacementRecorder

    def placed(self, replica_id: ReplicaId, num_pages: int, num_held_pages: int) -> None:
        """Count one placement."""
        self._placements.labels(*self._labels, replica_id).inc()
        self._pages.labels(*self._labels, replica_id).inc(num_pages)
        self._held_pages.labels(*self._labels, replica_id).inc(num_held_pages)

    def hinted(self, kind: Literal["peer", "remote"]) -> None:
        """Count one hint."""
        self._hints.labels(*self._labels, kind).inc()

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, (*LABELS, *labels), registry=self._registry)

    def _seconds(self, name: str, text: str) -> Histogram:
        histogram = Histogram(name, text, LABELS, buckets=SECONDS_BUCKETS, registry=self._registry)
        return histogram.labels(*self._labels)


class _CacheFeedCollector(Collector):
    """One series a CacheServer; `cache_node` is its node, `node` is where the router is."""

    def __init__(self, labels: tuple[str, str], read: Callable[[], Sequence[CacheFeedStats]]) -> None:
        self._labels = MetricLabels(LABELS, labels)
        self._read = read

    def collect(self) -> Iterable[Metric]:
        feeds = self._read()
        for name, text, values in (
            (
                "eyrie_router_cache_heard",
                "1 while the node's CacheServer speaks; else its pages count for nothing.",
                {feed.node: float(feed.is_heard) for feed in feeds},
            ),
            (
                "eyrie_router_relocations",
                "Relocation counter applied.",
                {feed.node: feed.counter for feed in feeds if feed.counter is not None},
            ),
            (
                "eyrie_router_relocation_lag",
                "Relocations known to miss.",
                {feed.node: feed.lag for feed in feeds if feed.lag is not None},
            ),
            (
                "eyrie_router_host_pages",
                "Pages known in the node's arena.",
                {feed.node: feed.num_host_pages for feed in feeds},
            ),
            (
                "eyrie_router_remote_pages",
                "Pages that the node told to be in the remote store.",
                {feed.node: feed.num_remote_pages for feed in feeds},
            ),
        ):
            yield self._labels.gauges(name, text, "cache_node", values)
        yield self._labels.counters(
            "eyrie_router_cache_restarts",
            "Incarnations of the node's CacheServer after the first.",
            "cache_node",
            {feed.node: feed.num_restarts for feed in feeds},
        )
        resyncs = CounterMetricFamily(
            "eyrie_router_resyncs",
            "Questions for what was missed, by how they were answered.",
            labels=(*self._labels.names, "cache_node", "outcome"),
        )
        for feed in feeds:
            for outcome, count in feed.resyncs.items():
                resyncs.add_metric((*self._labels.values, feed.node, outcome), count)
        yield resyncs
