"""GraphRunner and staging: static inputs, pads, the ring, failed captures."""

from collections.abc import Callable

import pytest
import torch

from tests.unit.engine_plans import PlanLog, generate, tiny_engine
from workers.engine.copies import Fence, InlineCopies
from workers.engine.graph_guard import Bucket
from workers.engine.graph_runner import GraphRunner
from workers.engine.last_tokens import LastTokens
from workers.engine.mechanisms import ALL_ON, Mechanisms
from workers.engine.model_runner import ModelRunner
from workers.engine.staging import NUM_STAGING_SETS, BucketInputs, Stager
from workers.kvcache.kv_pool import DUMMY_PAGE, KVPool
from workers.kvcache.layout import target_only
from workers.kvcache.page_table import PageTable
from workers.plan import BatchPlan, SetRow

CPU = torch.device("cpu")
PAGES_PER_ROW, PAGE_SIZE, NUM_PAGES = 4, 4, 30


class DelayedStream:
    """A CopyStream that does nothing until a fence is waited for: a compute stream far behind the host."""

    def __init__(self) -> None:
        self.pending: list[Callable[[], object]] = []

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self.pending.append(lambda: target.copy_(source))

    def take(self, target: torch.Tensor, source: torch.Tensor, index: torch.Tensor) -> None:
        self.pending.append(lambda: target.copy_(source[index]))

    def fence(self) -> Fence:
        return DelayedFence(self, len(self.pending))

    def run(self, num_operations: int) -> None:
        for operation in self.pending[:num_operations]:
            operation()
        self.pending = [lambda: None] * num_operations + self.pending[num_operations:]


class DelayedFence:
    def __init__(self, stream: DelayedStream, place: int) -> None:
        self.stream, self.place = stream, place

    def synchronize(self) -> None:
        self.stream.run(self.place)


def decode_bucket(size: int, mechanisms: Mechanisms = ALL_ON) -> BucketInputs:
    return BucketInputs(Bucket("decode", size), size, PAGE_SIZE, PAGES_PER_ROW, CPU, mechanisms)


def staged(log: PlanLog, plan: BatchPlan, table: PageTable) -> BatchPlan:
    for op in plan.ops:
        if isinstance(op, SetRow):
            table.set_row(op)
    return plan


def read_while_delayed(mechanisms: Mechanisms, num_steps: int) -> list[tuple[list[int], list[list[int]]]]:
    """Stage decode steps on a stream that is behind, reading the static inputs on the stream after each."""
    stream, log = DelayedStream(), PlanLog(PAGE_SIZE, NUM_PAGES)
    table = PageTable(2, PAGES_PER_ROW, PAGE_SIZE, NUM_PAGES, checked=True)
    stager = Stager(table, 16, CPU, stream, mechanisms)
    bucket = decode_bucket(2, mechanisms)
    log.open(0, list(range(1, 16)))
    found: list[tuple[list[int], list[list[int]]]] = []
    for _ in range(num_steps):
        batch, _ = stager.stage_bucket(staged(log, log.plan(s0=1), table), bucket)
        stream.pending.append(
            lambda batch=batch: found.append((batch.token_ids.tolist(), batch.page_rows.tolist()))
        )
    stream.run(len(stream.pending))
    return found


def test_a_pass_reads_what_was_staged_for_it_though_the_host_runs_ahead() -> None:
    assert read_while_delayed(ALL_ON, 10) == [
        ([step + 1, 0], [list(range(1, step // 4 + 2)), [0] * (step // 4 + 1)]) for step in range(10)
    ]


def test_awaited_tokens_are_taken_behind_the_copies_and_before_the_pass() -> None:
    """The host stages three steps, the first of known tokens, while the stream has not begun the first."""
    stream, log = DelayedStream(), PlanLog(PAGE_SIZE, NUM_PAGES)
    table = PageTable(2, PAGES_PER_ROW, PAGE_SIZE, NUM_PAGES, checked=True)
    last_tokens = LastTokens(2, CPU, stream)
    stager = Stager(table, 16, CPU, stream, last_tokens=last_tokens)
    bucket = decode_bucket(2)
    log.open(0, [7])
    log.open(1, [8])
    found: list[list[int]] = []

    def sample(slots: list[int], token_ids: torch.Tensor) -> None:
        found.append(token_ids.tolist())
        last_tokens.token_ids[slots] = token_ids + 10

    for slots in ([0, 1], [1, 0], [0, 1]):
        plan = log.plan_ahead(*slots) if found or stream.pending else log.plan(s0=1, s1=1)
        batch, _ = stager.stage_bucket(staged(log, plan, table), bucket)
        stream.pending.append(lambda slots=slots, tokens=batch.token_ids: sample(slots, tokens))
    assert found == []
    stream.run(len(stream.pending))
    assert found == [[7, 8], [18, 17], [27, 28]]


def test_without_the_ring_the_test_above_fails() -> None:
    found = read_while_delayed(Mechanisms(rings_staging=False), 10)
    assert found != read_while_delayed(ALL_ON, 10)


def test_a_set_is_written_again_only_after_its_copy() -> None:
    stream, log = DelayedStream(), PlanLog(PAGE_SIZE, NUM_PAGES)
    table = PageTable(2, PAGES_PER_ROW, PAGE_SIZE, NUM_PAGES, checked=True)
    bucket = decode_bucket(1)
    stager = Stager(table, 16, CPU, stream)
    log.open(0, list(range(1, 16)))
    for _ in range(NUM_STAGING_SETS):
        stager.stage_bucket(staged(log, log.plan(s0=1), table), bucket)
    assert bucket.static.token_ids.tolist() == [0]  # nothing was waited for
    stager.stage_bucket(staged(log, log.plan(s0=1), table), bucket)
    assert bucket.static.token_ids.tolist() == [1]  # the first copy had to be done, no other


def test_eager_and_bucket_staging_agree() -> None:
    log = PlanLog(PAGE_SIZE, NUM_PAGES)
    table = PageTable(3, PAGES_PER_ROW, PAGE_SIZE, NUM_PAGES, checked=True)
    stager = Stager(table, 32, CPU, InlineCopies())
    log.open(0, list(range(6)))
    log.open(2, list(range(40, 49)))
    extend, slots = stager.stage_eager(staged(log, log.plan(s2=5, s0=4), table), "extend")
    assert slots.tolist() == [2, 0]
    assert extend.token_ids.tolist() == [40, 41, 42, 43, 44, 0, 1, 2, 3]
    assert extend.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    assert extend.query_starts.tolist() == [0, 5, 9]
    assert extend.context_lens.tolist() == [5, 4]
    assert extend.page_rows.tolist() == [[1, 2], [3, 0]]
    assert extend.out_locations.tolist() == [4, 5, 6, 7, 8, 12, 13, 14, 15]
    plan = staged(log, log.plan(s2=1, s0=1), table)
    eager, _ = stager.stage_eager(plan, "decode")
    padded, slots = stager.stage_bucket(plan, decode_bucket(4))
    assert slots.tolist() == [2, 0, 3, 3]
    assert (padded.num_real_rows, padded.num_rows, padded.bucket) == (2, 4, Bucket("decode", 4))
    for name in ("token_ids", "positions", "context_lens", "out_locations"):
        assert torch.equal(getattr(padded, name)[:2], getattr(eager, name))
    assert torch.equal(padded.page_rows[:2, :2], eager.page_rows)
    assert padded.query_starts.tolist() == [0, 1, 2, 3, 4]
    assert padded.token_ids[2:].tolist() == padded.positions[2:].tolist() == [0, 0]
    assert padded.context_lens[2:].tolist() == [1, 1]
    assert padded.out_locations[2:].tolist() == [0, 0]
    assert not padded.page_rows[2:].any()


def test_rows_of_one_token_are_staged_first_and_samples_keep_the_plan_s_order() -> None:
    log = PlanLog(PAGE_SIZE, NUM_PAGES)
    table = PageTable(3, PAGES_PER_ROW, PAGE_SIZE, NUM_PAGES, checked=True)
    stager = Stager(table, 32, CPU, InlineCopies())
    for slot in range(3):
        log.open(slot, list(range(20 * slot, 20 * slot + 8)))
    stager.stage_eager(staged(log, log.plan(s0=7, s2=7), table), "extend")
    plan = staged(log, log.plan(s1=8, s2=1, s0=1), table)
    assert (plan.mode, plan.sampled) == ("mixed", [0, 1, 2])
    eager, eager_slots = stager.stage_eager(plan, "mixed")
    bucket = BucketInputs(Bucket("mixed", 13), 3, PAGE_SIZE, PAGES_PER_ROW, CPU)
    padded, slots = stager.stage_bucket(plan, bucket)
    assert eager_slots.tolist() == [2, 0, 1] and slots.tolist() == [2, 0, 1, 3]
    assert (padded.bucket, padded.num_real_rows, padded.num_samples) == (Bucket("mixed", 13), 3, 3)
    for batch in (eager, padded):
        assert batch.token_ids[:10].tolist() == [47, 7, 20, 21, 22, 23, 24, 25, 26, 27]
        assert batch.positions[:10].tolist() == [7, 7, *range(8)]
        assert batch.query_starts[:4].tolist() == [0, 1, 2, 10]
        assert batch.context_lens[:3].tolist() == [8, 8, 8]
        assert batch.sample_indices[:3].tolist() == [9, 0, 1]  # rows s1, s2, s0
        assert batch.host_query_starts.tolist() == batch.query_starts.tolist()
        assert batch.host_context_lens.tolist() == batch.context_lens.tolist()
    assert torch.equal(padded.page_rows[:3, :2], eager.page_rows)
    assert torch.equal(padded.out_locations[:10], eager.out_locations)


def test_a_mixed_bucket_s_pads_are_one_row_on_the_dummy_page_whatever_was_staged_before() -> None:
    log = PlanLog(PAGE_SIZE, NUM_PAGES)
    table = PageTable(3, PAGES_PER_ROW, PAGE_SIZE, NUM_PAGES, checked=True)
    stager = Stager(table, 32, CPU, InlineCopies())
    bucket = BucketInputs(Bucket("mixed", 20), 3, PAGE_SIZE, PAGES_PER_ROW, CPU)
    assert bucket.static.max_columns == 5  # columns for 20 pad tokens
    for slot in range(3):
        log.open(slot, list(range(1, 15)))
    for _ in range(NUM_STAGING_SETS):
        batch, _ = stager.stage_bucket(staged(log, log.plan(s0=1, s1=1, s2=2), table), bucket)
    batch, slots = stager.stage_bucket(staged(log, log.plan(s1=3), table), bucket)
    assert slots.tolist() == [1, 3, 3, 3]
    assert batch.query_starts.tolist() == [0, 3, 20, 20, 20]
    assert batch.context_lens.tolist() == [6, 17, 0, 0]
    assert batch.page_rows.shape == (4, 5) and batch.num_columns.tolist() == [5]
    assert not batch.token_ids[3:].any() and not batch.positions[3:].any()
    assert not batch.out_locations[3:].any() and not batch.page_rows[1:].any()
    assert batch.num_samples == 0 and not batch.sample_indices.any()


class CountingCopies(InlineCopies):
    def __init__(self) -> None:
        self.num_bytes: list[int] = []

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self.num_bytes.append(source.nbytes)
        super().copy(target, source)


@pytest.mark.parametrize("mode", ["decode", "mixed"])
def test_of_page_rows_a_step_copies_no_more_than_its_longest_takes(mode: str) -> None:
    pages_per_row, num_pages = 500, 1000
    table = PageTable(2, pages_per_row, PAGE_SIZE, num_pages, checked=True)
    copies = CountingCopies()
    stager = Stager(table, 16, CPU, copies)
    bucket = BucketInputs(Bucket(mode, 8), 2, PAGE_SIZE, pages_per_row, CPU)  # type: ignore[arg-type]
    log = PlanLog(PAGE_SIZE, num_pages)
    log.open(0, [1] * 9)
    log.open(1, [2] * 30)
    lens = {"s0": 1} if mode == "decode" else {"s0": 5}
    small, _ = stager.stage_bucket(staged(log, log.plan(**lens), table), bucket)
    assert small.page_rows.shape[1] == small.num_columns.item() == (1 if mode == "decode" else 2)
    assert small.page_rows[0].tolist() == [1, 2][: small.page_rows.shape[1]]
    log.num_computed[1] = 27  # as if its first pages had been computed
    log.plan(s1=1)
    plan = log.plan(s1=1) if mode == "decode" else log.plan(s1=2)
    table.set_row(SetRow(1, 0, log.pages[1], [], []))
    large, _ = stager.stage_bucket(plan, bucket)
    assert large.page_rows.shape[1] == large.num_columns.item() == 8
    assert large.page_rows[0].tolist() == log.pages[1]
    assert not large.page_rows[1:].any()
    num_rows = large.num_rows
    assert copies.num_bytes[1] - copies.num_bytes[0] == 4 * num_rows * (8 - small.page_rows.shape[1])
    assert large.max_columns == pages_per_row
    assert large.page_rows.data_ptr() == small.page_rows.data_ptr()


def test_an_eager_batch_is_its_step_s_own() -> None:
    log = PlanLog(PAGE_SIZE, NUM_PAGES)
    table = PageTable(1, PAGES_PER_ROW, PAGE_SIZE, NUM_PAGES, checked=True)
    stager = Stager(table, 16, CPU, InlineCopies())
    log.open(0, list(range(1, 16)))
    batches = [
        stager.stage_eager(staged(log, log.plan(s0=1), table), "decode")[0]
        for _ in range(2 * NUM_STAGING_SETS)
    ]
    assert [batch.token_ids.item() for batch in batches] == [1, 2, 3, 4, 5, 6]


class CountingModel:
    """Logits that name the token, the step and the buffer they came from; fails for one batch size."""

    def __init__(self, failing_size: int | None = None) -> None:
        self.addresses: list[int] = []
        self.failing_size = failing_size

    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor, attention: object) -> torch.Tensor:
        if token_ids.shape[0] == self.failing_size:
            raise RuntimeError("no such kernel")
        self.addresses.append(token_ids.data_ptr())
        return torch.stack([token_ids, positions], dim=1).float()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


class NoAttention:
    captured_modes: frozenset[str] = frozenset()

    def plan(self, batch: object) -> None:
        pass

    def begin(self) -> None:
        pass


def graph_runner(model: CountingModel, sizes: tuple[int, ...]) -> GraphRunner:
    pool = KVPool(target_only(1, PAGE_SIZE, 1, 8, "float32"), NUM_PAGES, CPU)
    buckets = [Bucket("decode", size) for size in sizes]
    return GraphRunner(ModelRunner(model, NoAttention(), pool), buckets, PAGES_PER_ROW, 3, CPU)


def test_replays_read_the_same_addresses_and_return_logits_of_their_own() -> None:
    model, log = CountingModel(), PlanLog(PAGE_SIZE, NUM_PAGES)
    graphs = graph_runner(model, (1, 3))
    assert graphs.capture() == []
    table = PageTable(3, PAGES_PER_ROW, PAGE_SIZE, NUM_PAGES, checked=True)
    stager = Stager(table, 16, CPU, InlineCopies())
    log.open(0, list(range(10, 25)))
    log.open(1, list(range(50, 65)))
    found = []
    for step in range(6):
        lens = {"s0": 1, "s1": 1} if step % 2 else {"s0": 1}
        plan = staged(log, log.plan(**lens), table)
        batch, _ = stager.stage_bucket(plan, graphs.inputs(Bucket("decode", 3)))
        found.append(graphs.replay(batch))
    assert len(set(model.addresses)) == 2  # the two buckets
    assert [logits.tolist() for logits in found] == [
        [[10 + step, step]] + ([[50 + step // 2, step // 2]] if step % 2 else []) for step in range(6)
    ]


def test_pads_leave_the_dummy_page_zero() -> None:
    engine = tiny_engine(kv_sanitizer=False, graph_batch_sizes=(6,))
    generate(engine, [[1, 2], [3, 4, 5]], 6)
    assert engine.graph_steps["decode", "replay"] == 5
    assert not engine._pool.data[DUMMY_PAGE].any()


def test_pad_tokens_of_a_mixed_bucket_leave_the_dummy_page_zero() -> None:
    engine = tiny_engine(kv_sanitizer=False, graph_token_sizes=(16,))
    generate(engine, [[1, 2], [3, 4, 5]], 2)
    assert engine.graph_steps["extend", "replay"] == 1
    assert not engine._pool.data[DUMMY_PAGE].any()


def test_a_failed_capture_is_reported_and_the_others_stand(caplog: pytest.LogCaptureFixture) -> None:
    graphs = graph_runner(CountingModel(failing_size=2), (1, 2, 4))
    assert graphs.capture() == [Bucket("decode", 2)]
    assert "no such kernel" in caplog.text
