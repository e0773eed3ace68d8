"""Metrics of the cache tier, read when scraped: the CacheServer's own, and each worker's CacheClient's.

Also what the metrics of every process have in common.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cache_service.breaker import BREAKER_STATES
from cache_service.client import CacheClient
from cache_service.messages import StatsReply

SECONDS_BUCKETS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
)  # fmt: skip
"""The one table of buckets for durations."""

_SERVER_COUNTERS = {
    "calls": ("eyrie_cache_calls", "Calls of clients, by kind.", "call"),
    "refusals": ("eyrie_cache_refusals", "Calls turned away, by why.", "reason"),
    "refused_clients": ("eyrie_cache_refused_clients", "Connections with an unknown key.", None),
    "commits": ("eyrie_cache_commits", "Pages that clients offered, by what came of it.", "status"),
    "evicted": ("eyrie_cache_evictions", "Pages that made room for others.", None),
    "evictions_refused": ("eyrie_cache_evictions_refused", "Evictions that a lease refused.", None),
    "dropped": ("eyrie_cache_dropped_pages", "Pages dropped, by why.", "reason"),
    "recovered": ("eyrie_cache_recovered_pages", "Pages taken over from a former server.", None),
    "fetched": ("eyrie_cache_fetched_pages", "Pages that fetches asked for, by what came of it.", "status"),
    "fetches_refused": ("eyrie_cache_fetches_refused", "Fetches cut short at once, by why.", "reason"),
    "fetch_batches": ("eyrie_cache_fetch_batches", "Questions to peers and stores.", "source"),
    "fetch_bytes": ("eyrie_cache_fetched_bytes", "Bytes that came in whole pages, by where from.", "source"),
    "puts": ("eyrie_cache_put_pages", "Pages to be put into the store, by what came of it.", "status"),
    "put_batches": ("eyrie_cache_put_batches", "Calls that put pages.", None),
    "put_bytes": ("eyrie_cache_put_bytes", "Bytes that were put, of pages new to the store.", None),
    "gets": ("eyrie_cache_got_pages", "Pages that the store was asked for, by its answer.", "status"),
    "stores": ("eyrie_cache_stores", "Remote stores attached, detached, and not to be had.", "outcome"),
    "store_failures": ("eyrie_cache_store_failures", "Failures that the store told, by why.", "reason"),
    "remote_leases": ("eyrie_cache_remote_leases", "Leases given to peers, and those fenced.", "outcome"),
    "unconfirmed_corruption": (
        "eyrie_cache_unconfirmed_corruption",
        "Pages that peers found wrong and that are right here: wire or memory of theirs is at fault.",
        None,
    ),
}
"""Of StatsReply.counts: name -> metric, its text, and what its reason is called."""


@dataclass(frozen=True)
class MetricLabels:
    """Labels that all metrics of a process have."""

    names: tuple[str, ...]
    values: tuple[str, ...]

    def gauge(self, name: str, text: str, value: float) -> Metric:
        """Return a gauge of one sample."""
        family = GaugeMetricFamily(name, text, labels=self.names)
        family.add_metric(self.values, value)
        return family

    def counter(self, name: str, text: str, value: float) -> Metric:
        """Return a counter of one sample."""
        family = CounterMetricFamily(name, text, labels=self.names)
        family.add_metric(self.values, value)
        return family

    def gauges(self, name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
        """Return a gauge with one sample for each value of `label`."""
        family = GaugeMetricFamily(name, text, labels=(*self.names, label))
        for reason, value in values.items():
            family.add_metric((*self.values, reason), value)
        return family

    def counters(self, name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
        """Return a counter with one sample for each value of `label`."""
        family = CounterMetricFamily(name, text, labels=(*self.names, label))
        for reason, value in values.items():
            family.add_metric((*self.values, reason), value)
        return family


class CacheServerCollector(Collector):
    """What a CacheServer knows of its node; `read` returns its newest figures."""

    def __init__(self, node: str, read: Callable[[], StatsReply]) -> None:
        self._labels = MetricLabels(("node",), (node,))
        self._read = read

    def collect(self) -> Iterable[Metric]:
        """See Collector."""
        stats, labels = self._read(), self._labels
        yield labels.gauges(
            "eyrie_cache_slots",
            "Slots of the arena by state; unusable ones wait for their memory.",
            "state",
            {
                "unusable": stats.num_unusable,
                "free": stats.num_free,
                "writing": stats.num_writing,
                "ready": stats.num_ready,
                "draining": stats.num_draining,
            },
        )
        for name, text, value in (
            ("eyrie_cache_slot_bytes", "Bytes of a slot: one page of all ranks.", stats.slot_bytes),
            ("eyrie_cache_pinned_pages", "Pages that pins keep.", stats.num_pinned),
            ("eyrie_cache_leased_slots", "Slots that some process reads.", stats.num_leased),
            ("eyrie_cache_oldest_lease_seconds", "Longest a slot is seen leased.", stats.oldest_lease_s),
            ("eyrie_cache_readers", "Processes that have the arena mapped.", stats.num_readers),
            ("eyrie_cache_fetches", "Fetches under way.", stats.num_fetches),
            ("eyrie_cache_lingering_slots", "Slots that failed fetches may write.", stats.num_lingering),
            ("eyrie_cache_store_attached", "1 while there is a remote store.", float(bool(stats.store))),
            ("eyrie_cache_known_remote_pages", "Pages it is known to have.", stats.num_known_remote),
            ("eyrie_cache_waiting_puts", "Pages that wait to be put into it.", stats.num_put_waiting),
            ("eyrie_cache_lent_pages", "Pages that peers read.", stats.num_lent),
            ("eyrie_cache_relocation_counter", "Of the arena's relocation version.", stats.relocations),
            ("eyrie_cache_oldest_lent_seconds", "Age of a peer's oldest lease.", stats.oldest_lent_s),
        ):
            yield labels.gauge(name, text, value)
        yield labels.gauges(
            "eyrie_cache_peers",
            "Peers that are fetched from, and those of them left alone after failures.",
            "state",
            {"used": stats.num_peers - stats.num_peers_avoided, "avoided": stats.num_peers_avoided},
        )
        breakers = GaugeMetricFamily(
            "eyrie_cache_store_breaker",
            "1 for the state that the breaker of the store's calls is in.",
            labels=(*labels.names, "call", "state"),
        )
        for call, state in (("put", stats.put_breaker), ("get", stats.get_breaker)):
            for name in BREAKER_STATES if state is not None else ():
                breakers.add_metric((*labels.values, call, name), float(name == state))
        yield breakers
        yield labels.counters(
            "eyrie_cache_fetch_seconds",
            "Seconds that questions to peers and stores took.",
            "source",
            {count.reason: count.value / 1e6 for count in stats.counts if count.name == "fetch_us"},
        )
        put_us = sum(count.value for count in stats.counts if count.name == "put_us")
        yield labels.counter("eyrie_cache_put_seconds", "Seconds that calls took to put pages.", put_us / 1e6)
        for key, (name, text, label) in _SERVER_COUNTERS.items():
            counts = {count.reason: count.value for count in stats.counts if count.name == key}
            if label is None:
                yield labels.counter(name, text, sum(counts.values()))
            else:
                yield labels.counters(name, text, label, counts)


class CacheClientCollector(Collector):
    """What one worker has of the tier."""

    def __init__(self, labels: MetricLabels, client: CacheClient) -> None:
        self._labels = labels
        self._client = client

    def collect(self) -> Iterable[Metric]:
        """See Collector."""
        client, labels = self._client, self._labels
        stats, connection = client.stats, client.connection
        yield labels.counter("eyrie_cache_hits", "Pages leased to be read.", stats.num_hits)
        yield labels.counters(
            "eyrie_cache_misses",
            "Pages and slots that could not be had, by why.",
            "reason",
            dict(stats.misses),
        )
        yield labels.counters(
            "eyrie_cache_offered_pages", "Saved pages told to the server.", "outcome", dict(stats.commits)
        )
        calls = CounterMetricFamily(
            "eyrie_cache_client_calls", "Calls by how they ended.", labels=(*labels.names, "call", "outcome")
        )
        for (kind, outcome), count in dict(connection.calls).items():
            calls.add_metric((*labels.values, kind, outcome), count)
        yield calls
        state = connection.breaker.state
        yield labels.gauges(
            "eyrie_cache_breaker",
            "1 for the state that the breaker is in.",
            "state",
            {name: float(name == state) for name in BREAKER_STATES},
        )
        yield labels.counter(
            "eyrie_cache_breaker_opened", "Times the breaker opened.", connection.breaker.num_opened
        )
        yield labels.gauge("eyrie_cache_attached", "1 while the server is there.", connection.is_attached)
        yield labels.counter("eyrie_cache_connections_lost", "Connections lost.", connection.num_lost)
        yield labels.gauge("eyrie_cache_grants", "Slots held for coming pages.", client.num_grants)
        yield labels.gauge("eyrie_cache_known_pages", "Pages of the node heard of.", client.num_known_pages)
        yield from self._relocations()

    def _relocations(self) -> Iterable[Metric]:
        subscriber, labels = self._client.subscriber, self._labels
        if subscriber is None:
            return
        follower = subscriber.follower
        if follower.applied is not None:
            yield labels.gauge(
                "eyrie_cache_relocations", "Relocation counter applied.", follower.applied.counter
            )
        if follower.lag is not None:
            yield labels.gauge("eyrie_cache_relocation_lag", "Relocations known to miss.", follower.lag)
        yield labels.counters(
            "eyrie_cache_resyncs",
            "Questions for what was missed, by how they were answered.",
            "outcome",
            {
                "changes": follower.stats.num_resyncs - follower.stats.num_snapshots,
                "snapshot": follower.stats.num_snapshots,
                "failed": subscriber.num_failed_resyncs,
            },
        )
