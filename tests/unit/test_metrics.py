"""Metrics: what is counted is what happened; names and labels keep to the rules."""

import ast
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from cluster.api.ports import RequestSummary
from cluster.metrics import ApiMetrics
from tests.unit.fetch_fakes import PAGE_BYTES, Desk, prompt
from tests.unit.replica_threads import NAMESPACE
from tests.unit.tier_fakes import Bench, tokens
from workers.engine.graph_guard import CaptureStats
from workers.kvcache.manager import KVCacheManager
from workers.kvcache.moves import MoveStats
from workers.metrics import LeaderMetrics, LeaderSources, RankLabels, TierSources, count_steps, count_tier
from workers.move_board import MoveStatus
from workers.plan import BatchPlan, RelocationVersion
from workers.protocol import FetchHint, LoadReport, ReplicaId
from workers.scheduler.stats import SchedulerStats

ROOT = Path(__file__).resolve().parents[2]
CAPTURE = CaptureStats(num_graphs=9, seconds=1.5, num_bytes=4096)
PARTS = {("verify", "target"): 2.5, ("verify", "draft"): 0.5}
ALLOWED_LABELS = {
    "model", "replica", "rank", "node",
    "finish_reason", "route", "status", "mode", "outcome", "reason", "state", "le",
    "origin", "kind", "source", "place", "length",
}  # fmt: skip


class FakeInbox:
    def __init__(self):
        self.refusals = {"protocol_version": 2}


def value(text, name, **labels):
    found = [
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]
    assert len(found) == 1, (name, labels, found)
    return found[0]


@pytest.fixture
def api():
    metrics = ApiMetrics("tiny", "10.0.0.1")
    metrics.watch(lambda: 3, lambda: 2)
    metrics.first_token(0.2)
    metrics.next_tokens(0.03, 3)
    metrics.finished(RequestSummary("length", 1.5, prompt_len=40, generated_len=9, cached_len=32))
    metrics.finished(RequestSummary("stop", 0.5, prompt_len=10, generated_len=1, cached_len=0))
    metrics.answered("/v1/completions", 200)
    metrics.placed(ReplicaId("replica-1"), 5, 4)
    text, content_type = metrics.exposition()
    assert content_type.startswith("text/plain")
    return text.decode()


def tier_sources():
    moves = MoveStats()
    moves.finished("load", [MoveStatus.DONE], 1000, 0.25)
    moves.finished("save", [MoveStatus.FAILED_STALE], 1000, 0.5)
    moves.copied("save", 7, 2)
    moves.num_waits["stream"] = 6
    moves.num_pinned_bytes = lambda: 1 << 26
    bench = Bench()
    bench.run(0, tokens(13))
    stats = bench.tier.stats
    stats.num_saved_pages, stats.num_lost_pages = 3, 2
    stats.skipped_saves["no_grant"] = 4
    stats.failed_loads["corrupt"] = 5
    desk = Desk()
    desk.begin(prompt(10), [FetchHint("tcp://a", 10)])
    desk.remote.answer(1, num_first=6)
    desk.prefetcher.settle(0.1)
    desk.begin(prompt(3, 500))
    desk.begin(prompt(2, 1000), [FetchHint("tcp://b", 2)])
    return TierSources(moves, bench.tier, desk.prefetcher)


@pytest.fixture
def rank():
    registry = CollectorRegistry()
    stats = SchedulerStats()
    stats.num_finished["abort"] = 2
    stats.num_refused["queue_full"] = 7
    stats.num_preemptions, stats.num_unproven_rows = 1, 9
    stats.num_prompt_tokens, stats.num_generated_tokens = 100, 30
    stats.prompted(100, 60, {"device": 32, "host": 16, "peer": 12})
    stats.queue_s = [0.01, 0.02]
    cache = KVCacheManager(16, 16, NAMESPACE, 1)
    stats.verified(3, 2, "host")
    stats.verified(3, 4, "computed")
    stats.step_tokens["verify"], stats.draft_steps[3], stats.draft_switches["off", "loss"] = 8, 7, 6
    sources = LeaderSources(stats, cache, FakeInbox(), 4096)
    labels = RankLabels("tiny", "replica-0", 0, "10.0.0.1")
    count_steps(registry, labels, {("decode", "replay"): 5}, {("mixed", "mixed"): 4}, CAPTURE, PARTS)
    count_tier(registry, labels, tier_sources())
    metrics = LeaderMetrics(registry, labels, sources)
    metrics.stepped(BatchPlan(1, RelocationVersion(1, 0), [], [0], [0], [1], [5], [0]), 0.02)
    metrics.stepped(BatchPlan(2, RelocationVersion(1, 0), [], [], [], [], [], []), 0.0)
    metrics.loaded(LoadReport(3, 4, 0, 16, 16, 0, 0.02))
    return generate_latest(registry).decode()


def test_an_api_process_counts_what_clients_saw(api):
    assert value(api, "eyrie_requests_total", finish_reason="length") == 1
    assert value(api, "eyrie_requests_total", finish_reason="stop") == 1
    assert value(api, "eyrie_time_to_first_token_seconds_sum") == pytest.approx(0.2)
    assert value(api, "eyrie_inter_token_seconds_count") == 3
    assert value(api, "eyrie_inter_token_seconds_sum") == pytest.approx(0.03)
    assert value(api, "eyrie_request_seconds_sum") == pytest.approx(2.0)
    assert value(api, "eyrie_request_prompt_tokens_total") == 50
    assert value(api, "eyrie_request_cached_tokens_total") == 32
    assert value(api, "eyrie_request_generated_tokens_total") == 10
    assert value(api, "eyrie_http_answers_total", route="/v1/completions", status="200") == 1
    assert value(api, "eyrie_router_placements_total", replica="replica-1") == 1
    assert value(api, "eyrie_router_held_pages_total", replica="replica-1") == 4
    assert value(api, "eyrie_router_index_gaps") == 3
    assert value(api, "eyrie_ready_replicas") == 2


def test_a_leader_counts_what_its_scheduler_and_engine_did(rank):
    assert value(rank, "eyrie_worker_requests_total", finish_reason="abort") == 2
    assert value(rank, "eyrie_refusals_total", reason="queue_full") == 7
    assert value(rank, "eyrie_refusals_total", reason="protocol_version") == 2
    assert value(rank, "eyrie_running_requests") == 3
    assert value(rank, "eyrie_waiting_requests") == 4
    assert value(rank, "eyrie_prompt_tokens_total") == 100
    assert value(rank, "eyrie_cached_tokens_total") == 60
    assert value(rank, "eyrie_generated_tokens_total") == 30
    assert value(rank, "eyrie_preemptions_total") == 1
    assert value(rank, "eyrie_unproven_rows_total") == 9
    assert value(rank, "eyrie_kv_pages", state="free") == 16
    assert value(rank, "eyrie_kv_pages", state="owned") == 0
    assert value(rank, "eyrie_kv_page_bytes") == 4096
    assert value(rank, "eyrie_kv_evictions_total") == 0
    assert value(rank, "eyrie_graph_steps_total", mode="decode", outcome="replay") == 5
    assert value(rank, "eyrie_graph_eager_total", mode="mixed", reason="mixed") == 4
    assert value(rank, "eyrie_step_seconds_count", mode="decode") == 1, "steps without rows are no steps"


def test_a_leader_counts_what_its_tier_did(rank):
    origins = {"computed": 40, "device": 32, "host": 16, "peer": 12}
    for origin, count in origins.items():
        assert value(rank, "eyrie_prefix_tokens_total", origin=origin) == count
    assert value(rank, "eyrie_moves_total", kind="load", outcome="done") == 1
    assert value(rank, "eyrie_moves_total", kind="save", outcome="failed_stale") == 1
    assert value(rank, "eyrie_moves_total", kind="load", outcome="failed_torn") == 0
    assert value(rank, "eyrie_move_bytes_total", kind="load") == 1000
    assert value(rank, "eyrie_move_seconds_total", kind="save") == 0.5
    assert value(rank, "eyrie_move_copies_total", kind="save") == 7
    assert value(rank, "eyrie_bounced_pages_total", kind="save") == 2
    assert value(rank, "eyrie_load_waits_total", kind="stream") == 6
    assert value(rank, "eyrie_load_waits_total", kind="host") == 0
    assert value(rank, "eyrie_pinned_bytes") == 1 << 26
    pages = {
        ("save", "done", ""): 3,
        ("fetch", "done", ""): 6,
        ("load", "failed", "corrupt"): 5,
        ("save", "skipped", "no_grant"): 4,
        ("fetch", "failed", "timed_out"): 4,
        ("fetch", "skipped", "no_source"): 3,
    }
    for (kind, outcome, reason), count in pages.items():
        assert value(rank, "eyrie_tier_pages_total", kind=kind, outcome=outcome, reason=reason) == count
    assert value(rank, "eyrie_tier_lost_pages_total") == 2
    in_flight = {"save": 3, "load": 0, "fetch": 2}
    for kind, count in in_flight.items():
        assert value(rank, "eyrie_moves_in_flight", kind=kind) == count
    assert value(rank, "eyrie_fetches_total", source="peer") == 2
    assert value(rank, "eyrie_fetched_pages_total", source="peer") == 6
    assert value(rank, "eyrie_fetch_failed_pages_total", source="peer", reason="timed_out") == 4
    assert value(rank, "eyrie_fetch_bytes_total", source="peer") == 6 * PAGE_BYTES
    assert value(rank, "eyrie_fetch_seconds_total", source="peer") == pytest.approx(0.1)


def test_each_queue_time_is_observed_once(rank):
    assert value(rank, "eyrie_queue_seconds_count") == 2  # though two steps were told of
    assert value(rank, "eyrie_queue_seconds_sum") == pytest.approx(0.03)


@pytest.mark.parametrize("process", ["api", "rank"])
def test_names_and_labels_keep_to_the_rules(process, request):
    text = request.getfixturevalue(process)
    names = set()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            names.add(sample.name)
            assert sample.name.startswith("eyrie_")
            assert set(sample.labels) <= ALLOWED_LABELS, sample
            assert {"model", "node"} <= set(sample.labels), sample
    assert not [name for name in names if "milli" in name or name.endswith(("_ms", "_kb", "_mb"))]


def test_a_follower_declares_no_more_than_it_counts():
    registry = CollectorRegistry()
    labels = RankLabels("tiny", "replica-0", 1, "10.0.0.1")
    count_steps(registry, labels, {("decode", "replay"): 5}, {("mixed", "mixed"): 4}, CAPTURE, PARTS)
    families = text_string_to_metric_families(generate_latest(registry).decode())
    assert {family.name for family in families} == {
        "eyrie_graph_steps",
        "eyrie_graph_eager",
        "eyrie_draft_seconds",
        "eyrie_graphs",
        "eyrie_graph_capture_seconds",
        "eyrie_graph_bytes",
    }


def test_metrics_are_declared_in_metrics_files_only():
    for package in ("cluster", "workers", "cache_service", "deploy"):
        for file in (ROOT / package).rglob("*.py"):
            if file.name == "metrics.py":
                continue
            for node in ast.walk(ast.parse(file.read_text())):
                names = []
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("prometheus_client"):
                    names = [alias.name for alias in node.names]
                assert not {"Counter", "Gauge", "Histogram", "Summary", "Info"} & set(names), file


def test_drafts_are_counted_by_place_and_by_where_the_prompt_was_found(rank):
    assert value(rank, "eyrie_drafts_total", place="1", outcome="accepted") == 2
    assert value(rank, "eyrie_drafts_total", place="2", outcome="rejected") == 1
    assert value(rank, "eyrie_accept_lengths_total", origin="host", length="2") == 1
    assert value(rank, "eyrie_accept_lengths_total", origin="computed", length="4") == 1


def test_what_drafting_takes_brings_and_when_it_was_off_is_counted(rank):
    assert value(rank, "eyrie_draft_seconds_total", mode="verify", kind="target") == 2.5
    assert value(rank, "eyrie_draft_seconds_total", mode="verify", kind="draft") == 0.5
    assert value(rank, "eyrie_step_tokens_total", mode="verify") == 8
    assert value(rank, "eyrie_draft_steps_total", length="3") == 7
    assert value(rank, "eyrie_draft_switches_total", outcome="off", reason="loss") == 6
