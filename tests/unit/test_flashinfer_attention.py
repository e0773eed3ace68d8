"""FlashInferAttention over a fake of the library: what is planned for which kernels, captured or not."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.unit.flashinfer_fakes import FakeLibrary
from tests.unit.test_graph_runner import DelayedStream
from tests.unit.test_reference_attention import HEAD_DIM, NUM_HEADS, NUM_KV_HEADS, PagedRows, layer
from workers.attention.flashinfer import FlashInferAttention
from workers.attention.flashinfer_kernels import HeadShape, PlanLimits
from workers.attention.planner import PlanChangedError
from workers.attention.pool_kernels import TorchPoolKernels
from workers.attention.row_pages import RowPages, host_page_starts
from workers.engine.copies import CopyStream, InlineCopies
from workers.engine.forward_batch import ForwardBatch
from workers.engine.graph_guard import Bucket
from workers.engine.mechanisms import ALL_ON, Mechanisms
from workers.engine.staging import BucketInputs, Stager
from workers.kvcache.kv_pool import DUMMY_PAGE, KVPool
from workers.kvcache.layout import target_only
from workers.kvcache.page_table import PageTable
from workers.layers.rotary import rotate
from workers.plan import BatchPlan, RelocationVersion, SetRow

CPU = torch.device("cpu")
MAX_ROWS, MAX_TOKENS = 8, 400
# Rows of one token come first, as they are staged.
MIXES = {
    "decode": ([1, 5, 64, 65, 300], [1, 1, 1, 1, 1]),
    "extend": ([7, 90, 300], [7, 33, 290]),
    "mixed": ([9, 128, 33, 70], [1, 1, 33, 6]),
    "multi-token": ([9, 128, 33, 70], [1, 3, 4, 6]),
}


def library_for(pool: KVPool, copies: CopyStream, has_long: bool = True) -> FakeLibrary:
    dtype = pool.layer(0)[0].dtype
    return FakeLibrary(HeadShape(NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, pool.page_size, dtype), copies, has_long)


def attention_over(
    pool: KVPool,
    windows: tuple[int | None, ...] = (None,),
    copies: CopyStream | None = None,
    has_long: bool = True,
    mechanisms: Mechanisms = ALL_ON,
    max_verified: int = 0,
) -> tuple[FlashInferAttention, FakeLibrary]:
    copies = copies or InlineCopies()
    library = library_for(pool, copies, has_long)
    layers = [layer(window) for window in windows]
    attention = FlashInferAttention(
        pool,
        layers,
        library,
        copies,
        max_rows=MAX_ROWS,
        max_tokens=MAX_TOKENS,
        max_verified=max_verified,
        mechanisms=mechanisms,
    )
    return attention, library


@pytest.mark.parametrize("has_long", [True, False])
@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("window", [None, 1, 8, 100])
@pytest.mark.parametrize("mix", MIXES)
def test_equals_the_reference(mix: str, window: int | None, page_size: int, has_long: bool) -> None:
    rows, same = (PagedRows(*MIXES[mix], page_size) for _ in range(2))
    attention, _ = attention_over(rows.pool, (window,), has_long=has_long)
    attention.plan(rows.batch)
    attention.begin()
    found = attention.forward(layer(window), *rows.new_tokens())
    torch.testing.assert_close(found, same.attend(window), rtol=1e-5, atol=1e-5)
    assert torch.equal(rows.pool.data, same.pool.data)


def test_each_layer_is_computed_with_its_own_window() -> None:
    rows, same = (PagedRows(*MIXES["mixed"], 16) for _ in range(2))
    attention, library = attention_over(rows.pool, (None, 8))
    attention.plan(rows.batch)
    attention.begin()
    for window in (None, 8):
        found = attention.forward(layer(window), *rows.new_tokens())
        torch.testing.assert_close(found, same.attend(window), rtol=1e-5, atol=1e-5)
    assert [len(made.plans) for made in library.made] == [1, 1, 1, 1]


@pytest.mark.parametrize("mix", MIXES)
def test_rotates_and_writes_as_two_steps_do(mix: str) -> None:
    rows, same = (PagedRows(*MIXES[mix], 16) for _ in range(2))
    q, k, v = rows.new_tokens()
    angles = torch.randn(len(q), 1, HEAD_DIM // 2, generator=torch.Generator().manual_seed(1))
    cos, sin = angles.cos(), angles.sin()
    outs = []
    for own, unrotated in ((rows, True), (same, False)):
        attention, _ = attention_over(own.pool)
        attention.plan(own.batch)
        attention.begin()
        if unrotated:
            outs.append(attention.forward_unrotated(layer(None), q.clone(), k, v, cos, sin))
        else:
            outs.append(attention.forward(layer(None), rotate(q, cos, sin), rotate(k, cos, sin), v))
    assert torch.equal(*outs)
    assert torch.equal(rows.pool.data, same.pool.data)


@pytest.mark.parametrize(
    ("mix", "has_long", "short", "long"),
    [
        ("decode", True, [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)], []),
        ("extend", True, [], [(0, 7), (7, 40), (40, 330)]),
        ("mixed", True, [(0, 1), (1, 2)], [(2, 35), (35, 41)]),
        ("multi-token", True, [(0, 1), (1, 4), (4, 8), (8, 14)], []),
        ("mixed", False, [(0, 1), (1, 2), (2, 35), (35, 41)], []),
    ],
)
def test_short_and_long_rows_have_kernels_of_their_own(
    mix: str, has_long: bool, short: list[tuple[int, int]], long: list[tuple[int, int]]
) -> None:
    rows = PagedRows(*MIXES[mix], 16)
    attention, library = attention_over(rows.pool, has_long=has_long)
    attention.plan(rows.batch)
    attention.begin()
    attention.forward(layer(None), *rows.new_tokens())
    assert library.kernels("short").runs == short
    assert [run for made in library.made if made.name == "long" for run in made.runs] == long
    for made in library.made:
        for plan in made.plans:
            assert plan.num_tokens == plan.query_starts[-1] - plan.query_starts[0]
            assert not plan.is_captured


def test_only_what_can_be_captured_has_buckets() -> None:
    pool = PagedRows(*MIXES["decode"], 16).pool
    assert attention_over(pool)[0].captured_modes == {"decode", "verify", "extend", "mixed"}
    assert attention_over(pool, has_long=False)[0].captured_modes == {"decode", "verify"}


class Staged:
    """A page table of four slots of 64 tokens in a pool, and plans over it."""

    page_size, pages_per_row, max_slots = 4, 16, 4

    def __init__(self, copies: CopyStream | None = None) -> None:
        num_pages = self.pages_per_row * self.max_slots
        layout = target_only(2, self.page_size, NUM_KV_HEADS, HEAD_DIM, "float32")
        self.pool = KVPool(layout, num_pages, CPU)
        self.table = PageTable(self.max_slots, self.pages_per_row, self.page_size, num_pages, checked=True)
        self.stager = Stager(self.table, 64, CPU, copies or InlineCopies())
        for slot in range(self.max_slots):
            pages = [1 + slot + self.max_slots * column for column in range(self.pages_per_row)]
            self.table.set_row(SetRow(slot, 0, pages, [], []))
        random = torch.Generator().manual_seed(0)
        for half in self.pool.layer(1):
            half[1:] = torch.randn(half[1:].shape, generator=random)

    def bucket(self, mode: str, size: int) -> BucketInputs:
        bucket = Bucket(mode, size)  # type: ignore[arg-type]
        return BucketInputs(bucket, self.max_slots, self.page_size, self.pages_per_row, CPU)

    def plan(self, **rows: tuple[int, int]) -> BatchPlan:
        """`s2=(5, 3)`: three tokens of slot 2 from position 5 on; all rows are sampled."""
        slots = [int(name[1:]) for name in rows]
        lens = [length for _, length in rows.values()]
        starts = [start for start, _ in rows.values()]
        tokens = list(range(sum(lens)))
        version = RelocationVersion(0, 0)
        return BatchPlan(1, version, [], slots, starts, lens, tokens, list(range(len(slots))))


def compared(staged: Staged, attention: FlashInferAttention, plan: BatchPlan, inputs: BucketInputs):
    """Attend a plan in its bucket and eager, by another attention; return both outputs of its real tokens."""
    num_tokens = len(plan.token_ids)
    q, k, v = (
        torch.randn(inputs.bucket.size, heads, HEAD_DIM, generator=torch.Generator().manual_seed(heads))
        for heads in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)
    )
    before = staged.pool.data.clone()
    outs = []
    eager, _ = attention_over(staged.pool)
    for backend, batch in (
        (attention, staged.stager.stage_bucket(plan, inputs)[0]),
        (eager, staged.stager.stage_eager(plan, plan.mode)[0]),
    ):
        staged.pool.data.copy_(before)
        tokens = slice(batch.num_tokens)
        backend.plan(batch)
        backend.begin()
        outs.append(backend.forward(layer(None), q[tokens], k[tokens], v[tokens])[:num_tokens].clone())
        staged.pool.zero_dummy_page()
    return outs


def test_a_decode_bucket_s_plan_has_one_size() -> None:
    staged = Staged()
    attention, library = attention_over(staged.pool)
    inputs = staged.bucket("decode", 4)
    for plan in (
        staged.plan(s0=(9, 1)),
        staged.plan(s3=(40, 1), s1=(0, 1), s0=(10, 1), s2=(63, 1)),
        staged.plan(s2=(7, 1), s1=(8, 1)),
    ):
        found, expected = compared(staged, attention, plan, inputs)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    plans = library.kernels("short").plans
    assert len(plans) == 3 and all(plan.is_captured and plan.num_tokens == 4 for plan in plans)
    assert all(plan.query_starts.tolist() == [0, 1, 2, 3, 4] for plan in plans)
    assert [plan.context_lens.tolist() for plan in plans] == [[10, 1, 1, 1], [41, 1, 11, 64], [8, 9, 1, 1]]
    assert [plan.page_starts.tolist()[-1] for plan in plans] == [6, 11 + 1 + 3 + 16, 2 + 3 + 2]
    assert library.kernels("short").limits[-1] == PlanLimits(4, 4, is_captured=True)
    assert library.kernels("short").overlaps == {True}
    assert not library.kernels("long").plans


def test_a_mixed_bucket_s_plans_have_one_size_each() -> None:
    staged = Staged()
    attention, library = attention_over(staged.pool)
    inputs = staged.bucket("mixed", 24)
    for plan in (
        staged.plan(s0=(9, 1), s1=(3, 20)),
        staged.plan(s3=(0, 8), s1=(23, 1), s0=(10, 1), s2=(12, 2)),  # staged in another order
        staged.plan(s2=(0, 24)),
        staged.plan(s2=(24, 2)),
    ):
        found, expected = compared(staged, attention, plan, inputs)
        order = plan_order(plan)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert order == sorted(order)
    short, long = library.kernels("short"), library.kernels("long")
    assert all(plan.is_captured and plan.num_tokens == 4 for plan in short.plans)
    assert all(plan.is_captured and plan.num_tokens == 24 for plan in long.plans)
    assert [plan.query_starts.tolist() for plan in short.plans] == [
        [0, 1, 1, 1, 1],
        [0, 1, 2, 2, 2],
        [0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0],
    ]
    assert [plan.query_starts.tolist() for plan in long.plans] == [
        [1, 21, 21, 21, 21],
        [2, 10, 12, 12, 12],
        [0, 24, 24, 24, 24],
        [0, 2, 2, 2, 2],
    ]
    assert [plan.context_lens.tolist() for plan in long.plans] == [
        [23, 0, 0, 0],
        [8, 14, 0, 0],
        [24, 0, 0, 0],
        [26, 0, 0, 0],
    ]
    assert short.overlaps == {False}  # it may have no row, and then waits for nothing
    assert short.limits[-1] == PlanLimits(4, 4, is_captured=True)
    assert long.limits[-1] == PlanLimits(4, 24, is_captured=True)


def test_passes_are_planned_once_and_read_their_lengths_on_the_device() -> None:
    staged = Staged()
    attention, library = attention_over(staged.pool)
    plan = staged.plan(s3=(39, 1), s1=(2, 1), s0=(62, 1))
    batch, _ = staged.stager.stage_eager(plan, "decode")
    passes = attention.for_passes(replace(batch, host_context_lens=np.ones(3, dtype=np.int32)))
    other_passes = attention.for_passes(replace(batch, context_lens=torch.ones(3, dtype=torch.int32)))
    num_plans = len(library.kernels("short").plans)
    for ahead in range(2):
        other_passes.begin()  # in the same room
        later = staged.plan(s3=(39 + ahead, 1), s1=(2 + ahead, 1), s0=(62 + ahead, 1))
        eager, _ = staged.stager.stage_eager(later, "decode")
        batch.context_lens.copy_(eager.context_lens)
        batch.out_locations.copy_(eager.out_locations)
        q, k, v = (torch.randn(3, heads, HEAD_DIM) for heads in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS))
        passes.begin()
        found = passes.forward(layer(None), q, k, v)
        other, _ = attention_over(staged.pool)
        other.plan(eager)
        other.begin()
        torch.testing.assert_close(found, other.forward(layer(None), q, k, v), rtol=1e-5, atol=1e-5)
    assert len(library.kernels("short").plans) == num_plans


def plan_order(plan: BatchPlan) -> list[bool]:
    return sorted(length > 1 for length in plan.lens)


def test_pad_tokens_of_a_mixed_bucket_are_nobody_s() -> None:
    staged = Staged()
    attention, _ = attention_over(staged.pool)
    inputs = staged.bucket("mixed", 16)
    batch, slots = staged.stager.stage_bucket(staged.plan(s1=(5, 3)), inputs)
    assert slots.tolist() == [1, 4, 4, 4, 4]
    attention.plan(batch)
    attention.begin()
    q, k, v = (torch.ones(16, heads, HEAD_DIM) for heads in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS))
    before = staged.pool.data.clone()
    out = attention.forward(layer(None), q, k, v)
    assert out[:3].any() and not out[3:].any()
    changed = (staged.pool.data != before).any(dim=1).nonzero().flatten().tolist()
    assert changed == [DUMMY_PAGE, staged.table.rows[1, 1]]


def test_a_plan_that_no_graph_was_captured_with_is_refused() -> None:
    staged = Staged()
    attention, library = attention_over(staged.pool)
    inputs = staged.bucket("decode", 2)
    attention.plan(staged.stager.stage_bucket(staged.plan(s0=(9, 1)), inputs)[0])
    library.kernels("short").info[0] = 8
    with pytest.raises(PlanChangedError, match=r"found \[8\], allowed is \[7\]"):
        attention.plan(staged.stager.stage_bucket(staged.plan(s0=(10, 1)), inputs)[0])


@pytest.mark.parametrize("page_size", [1, 4, 64])
def test_rows_pages_lie_where_the_host_says(page_size: int) -> None:
    random = np.random.default_rng(0)
    context_lens = np.array([0, 1, page_size, 5 * page_size, 5 * page_size - 1, 0], dtype=np.int32)
    page_rows = random.integers(0, 100, (6, 5), dtype=np.int32)
    batch = replace(
        PagedRows([1], [1], page_size).batch,
        host_context_lens=context_lens,
        context_lens=torch.from_numpy(context_lens),
        page_rows=torch.from_numpy(page_rows),
    )
    pages = RowPages.room(6, 5, CPU)
    for _ in range(2):  # whatever it held before
        TorchPoolKernels().line_up_pages(
            batch.page_rows,
            batch.num_columns,
            batch.max_columns,
            batch.context_lens,
            page_size,
            pages.starts,
            pages.pages,
            pages.last_page_lens,
        )
    starts = host_page_starts(batch, page_size)
    assert pages.starts.tolist() == starts.tolist()
    for row, length in enumerate(context_lens):
        num_pages = -(-int(length) // page_size)
        assert starts[row + 1] - starts[row] == num_pages
        assert pages.pages[starts[row] : starts[row + 1]].tolist() == page_rows[row, :num_pages].tolist()
        if length:
            assert (num_pages - 1) * page_size + int(pages.last_page_lens[row]) == length


def context_lens_attended(mechanisms: Mechanisms, bucket: Bucket | None) -> list[int]:
    """Plan six decode steps on a stream that is behind, each pass on the stream after its plan's copies."""
    stream = DelayedStream()
    staged = Staged()
    attention, library = attention_over(staged.pool, copies=stream, mechanisms=mechanisms)
    inputs = staged.bucket("decode", 2)
    kernels = library.kernels("short")
    found: list[int] = []

    def read(batch: ForwardBatch) -> None:
        part = attention._parts[None][0]
        stream.pending.append(lambda: found.append(read_context_len(part.memory.device, batch.num_rows)))

    for step in range(6):
        plan = staged.plan(s0=(10 + step, 1))
        stage = staged.stager.stage_eager(plan, "decode")
        batch = stage[0] if bucket is None else staged.stager.stage_bucket(plan, inputs)[0]
        attention.plan(batch)
        read(batch)
    stream.run(len(stream.pending))
    assert len(kernels.plans) == 6
    return found


def read_context_len(memory: torch.Tensor, num_rows: int) -> int:
    return int(memory.view(torch.int32)[3 + 2 * num_rows])


def check_that_each_pass_reads_its_own_plan(mechanisms: Mechanisms, bucket: Bucket | None) -> None:
    found = context_lens_attended(mechanisms, bucket)
    assert found == [11, 12, 13, 14, 15, 16], f"planned_lens: passes read {found}"


@pytest.mark.parametrize("bucket", [None, Bucket("decode", 2)])
def test_without_the_ring_a_pass_reads_a_later_step_s_plan(bucket: Bucket | None) -> None:
    check_that_each_pass_reads_its_own_plan(ALL_ON, bucket)
    with pytest.raises(AssertionError, match=r"planned_lens: passes read \[16, 16, 16, 16, 16, 16\]"):
        check_that_each_pass_reads_its_own_plan(Mechanisms(rings_staging=False), bucket)
