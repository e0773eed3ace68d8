"""KVSanitizer: each of its checks fires for its own fault, and none for an honest run."""

from collections.abc import Callable

import pytest
import torch

from tests.unit.engine_plans import PlanLog
from workers.engine.copies import InlineCopies
from workers.engine.graph_guard import Bucket
from workers.engine.staging import BucketInputs, Stager
from workers.kvcache.kv_pool import DUMMY_PAGE, KVPool
from workers.kvcache.layout import target_only
from workers.kvcache.page_table import PageTable
from workers.kvcache.sanitizer import KVSanitizer, SanitizerError
from workers.parallel import TPPeerLostError
from workers.plan import BatchPlan, CloseSlot, CompletePages, FreePages, OwnPages, SetRow

CPU = torch.device("cpu")
MAX_SLOTS, PAGES_PER_ROW, PAGE_SIZE, NUM_PAGES = 4, 8, 4, 20


class Rank:
    """All of an engine but the model: table, staging and sanitizer; its forward pass writes zeros."""

    def __init__(self) -> None:
        self.log = PlanLog(PAGE_SIZE, NUM_PAGES)
        self.pool = KVPool(target_only(1, PAGE_SIZE, 1, 8, "float32"), NUM_PAGES, CPU)
        self.table = PageTable(MAX_SLOTS, PAGES_PER_ROW, PAGE_SIZE, NUM_PAGES, checked=False)
        self.stager = Stager(self.table, 32, CPU, InlineCopies())
        self.bucket = BucketInputs(Bucket("decode", 3), 3, PAGE_SIZE, PAGES_PER_ROW, CPU)
        self.sanitizer = KVSanitizer(self.pool, MAX_SLOTS, PAGES_PER_ROW)

    def apply(self, plan: BatchPlan) -> None:
        for op in plan.ops:
            if isinstance(op, SetRow):
                self.table.set_row(op)
            elif isinstance(op, CloseSlot):
                self.table.close_slot(op)
        self.sanitizer.apply(plan.ops)

    def step(
        self, plan: BatchPlan, corrupt: Callable[[torch.Tensor, torch.Tensor], None] | None = None
    ) -> None:
        """Run a plan; `corrupt` may change the staged page rows and locations."""
        self.apply(plan)
        if plan.mode == "decode":
            batch, slots = self.stager.stage_bucket(plan, self.bucket)
        else:
            batch, slots = self.stager.stage_eager(plan, plan.mode)
        if corrupt:
            corrupt(batch.page_rows, batch.out_locations)
        self.sanitizer.check_inputs(batch, slots)
        for half in self.pool.layer(0):
            half[batch.out_locations // PAGE_SIZE, batch.out_locations % PAGE_SIZE] = 0.0
        self.sanitizer.check_outputs(
            torch.zeros(len(plan.sampled), 7), [plan.slots[row] for row in plan.sampled]
        )
        for row in plan.sampled:
            self.log.tokens[plan.slots[row]].append(1)


@pytest.fixture
def rank() -> Rank:
    """A rank whose slot 0 has run six tokens and slot 1 nine."""
    rank = Rank()
    rank.log.open(0, [1, 2, 3, 4, 5, 6])
    rank.log.open(1, list(range(9)))
    rank.step(rank.log.plan(s0=6, s1=9))
    return rank


def fails(check: str) -> pytest.RaisesExc[SanitizerError]:
    return pytest.RaisesExc(SanitizerError, check=lambda error: error.check == check)


def test_an_honest_run_passes(rank: Rank) -> None:
    log = rank.log
    for _ in range(9):
        rank.step(log.plan(s0=1, s1=1))
    log.complete(0)
    log.open(2, log.tokens[0])
    log.share(2, log.pages[0][:2])
    rank.step(log.plan(s0=1, s1=1, s2=8))
    log.close(1)
    rank.step(log.plan(s0=1, s2=1))
    log.open(1, list(range(30)))
    rank.step(log.plan(s1=30, s0=1))
    assert rank.sanitizer.num_steps == 13


def test_an_error_names_slot_page_expected_and_found(rank: Rank) -> None:
    page = rank.log.pages[1][0]

    def corrupt(rows: torch.Tensor, _: torch.Tensor) -> None:
        rows[1, 0] = 19

    with pytest.raises(SanitizerError) as caught:
        rank.step(rank.log.plan(s0=1, s1=1), corrupt)
    error = caught.value
    assert (error.check, error.slot, error.page) == ("staged_row", 1, page)
    assert (error.expected, error.found) == (str(page), "19")
    assert str(error) == f"staged_row: slot 1, page {page}: expected {page}, found 19"


def test_freed_pages_are_poisoned(rank: Rank) -> None:
    pages = rank.log.pages[1]
    rank.pool.data[pages] = 1
    rank.log.close(1)
    rank.step(rank.log.plan(s0=1))
    assert all(rank.pool.is_poisoned(page) for page in pages)


def test_pages_nobody_has_written_are_poisoned() -> None:
    rank = Rank()
    rank.log.open(0, [1, 2])
    rank.apply(rank.log.plan(s0=2))
    assert all(rank.pool.is_poisoned(page) for page in range(1, NUM_PAGES + 1))


def test_own_free(rank: Rank) -> None:
    page = rank.log.pages[0][0]
    with fails("own_free"):
        rank.sanitizer.apply([OwnPages([page], [5])])


def test_own_the_dummy_page(rank: Rank) -> None:
    with fails("own_free"):
        rank.sanitizer.apply([OwnPages([DUMMY_PAGE], [5])])


def test_the_first_generation_of_a_page_is_above_zero(rank: Rank) -> None:
    with fails("generation_rises"):
        rank.sanitizer.apply([OwnPages([rank.log.free[-1]], [0])])


def test_generation_rises(rank: Rank) -> None:
    page = rank.log.pages[0][0]
    rank.log.close(0)
    rank.step(rank.log.plan(s1=1))
    with fails("generation_rises"):
        rank.sanitizer.apply([OwnPages([page], [rank.log.generations[page]])])


def test_free_page_untouched(rank: Rank) -> None:
    rank.pool.data[rank.log.free[-1], 5] = 0
    rank.log.open(2, [1])
    with fails("free_page_untouched"):
        rank.step(rank.log.plan(s2=1))


def test_free_owned(rank: Rank) -> None:
    for page in (rank.log.free[0], DUMMY_PAGE):
        with fails("free_owned"):
            rank.sanitizer.apply([FreePages([page])])


def test_freed_page_in_row(rank: Rank) -> None:
    rank.log.give_back(rank.log.pages[1][-1:])
    with fails("freed_page_in_row"):
        rank.step(rank.log.plan(s0=1))


def test_complete_owned(rank: Rank) -> None:
    with fails("complete_owned"):
        rank.sanitizer.apply([CompletePages([rank.log.free[0]], [bytes(16)])])


def test_complete_written(rank: Rank) -> None:
    with fails("complete_written"):
        rank.sanitizer.apply([CompletePages([rank.log.pages[0][1]], [bytes(16)])])


def test_dummy_page_zero(rank: Rank) -> None:
    rank.pool.data[DUMMY_PAGE, 9] = 1
    with fails("dummy_page_zero"):
        rank.step(rank.log.plan(s0=1, s1=1))


@pytest.mark.parametrize("place", ["row", "location", "len"])
def test_pad_rows(rank: Rank, place: str) -> None:
    def corrupt(rows: torch.Tensor, locations: torch.Tensor) -> None:
        if place == "row":
            rows[2, -1] = 3
        elif place == "location":
            locations[2] = 3 * PAGE_SIZE
        else:
            rank.bucket.static.context_lens[2] = 4

    with fails("pad_rows"):
        rank.step(rank.log.plan(s0=1, s1=1), corrupt)


@pytest.mark.parametrize("mode", ["decode", "mixed"])
def test_staged_row(rank: Rank, mode: str) -> None:
    def corrupt(rows: torch.Tensor, _: torch.Tensor) -> None:
        rows[0, :2] = rows[0, [1, 0]]

    if mode == "mixed":
        rank.log.open(2, [1, 2])
        plan = rank.log.plan(s0=1, s1=1, s2=2)
    else:
        plan = rank.log.plan(s0=1, s1=1)
    with fails("staged_row"):
        rank.step(plan, corrupt)


def test_page_owned_for_a_row_never_set(rank: Rank) -> None:
    rank.log.open(2, [1, 2, 3])
    plan = rank.log.plan(s2=3)
    plan.ops[:] = [op for op in plan.ops if not isinstance(op, SetRow)]
    with fails("page_owned"):
        rank.step(plan)


def test_generation(rank: Rank) -> None:
    log = rank.log
    pages = log.pages[0]
    log.ops += [FreePages(list(pages)), OwnPages(list(pages), [9] * len(pages))]
    with fails("generation"):
        rank.step(log.plan(s0=1))


def test_page_complete(rank: Rank) -> None:
    rank.log.open(2, [1, 2, 3, 4, 5])
    rank.log.share(2, rank.log.pages[0][:1])
    with fails("page_complete"):
        rank.step(rank.log.plan(s2=1))


def test_page_key(rank: Rank) -> None:
    rank.log.complete(0)
    rank.log.open(2, [1, 2, 3, 5, 5])
    rank.log.share(2, rank.log.pages[0][:1])
    with fails("page_key"):
        rank.step(rank.log.plan(s2=1))


def test_page_written(rank: Rank) -> None:
    rank.log.open(2, [1, 2, 3, 4, 5])
    rank.log.num_computed[2] = 3  # three tokens are skipped
    with fails("page_written"):
        rank.step(rank.log.plan(s2=2))


def test_write_location(rank: Rank) -> None:
    def corrupt(_: torch.Tensor, locations: torch.Tensor) -> None:
        locations[1] += 1

    with fails("write_location"):
        rank.step(rank.log.plan(s0=1, s1=1), corrupt)


def test_write_owned(rank: Rank) -> None:
    rank.log.complete(0)
    rank.log.open(2, [1, 2, 3, 4, 5])
    rank.log.share(2, rank.log.pages[0][:1])
    rank.log.num_computed[2] = 3  # its last token again: inside the shared page
    with fails("write_owned"):
        rank.step(rank.log.plan(s2=2))


def test_write_owner(rank: Rank) -> None:
    log = rank.log
    log.open(2, [1, 2, 3, 4, 5, 6])
    log.num_computed[2], log.pages[2] = 5, list(log.pages[0])
    log.ops.append(SetRow(2, 0, log.pages[0][:1], [1], []))
    log.ops.append(SetRow(0, 0, log.pages[0][:1], [1], []))
    log.ops.append(SetRow(2, 1, log.pages[0][1:], [1], []))
    with fails("write_owner"):
        rank.step(log.plan(s0=1, s2=1))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_finite_logits(rank: Rank, value: float) -> None:
    logits = torch.zeros(2, 7)
    logits[1, 3] = value
    with pytest.raises(SanitizerError) as caught:
        rank.sanitizer.check_outputs(logits, [0, 1])
    assert (caught.value.check, caught.value.slot) == ("finite_logits", 1)


def test_logits_that_a_lost_rank_has_spoilt_are_no_finding() -> None:
    def lost() -> None:
        raise TPPeerLostError("rank 1 is gone")

    pool = KVPool(target_only(1, PAGE_SIZE, 1, 8, "float32"), NUM_PAGES, CPU)
    sanitizer = KVSanitizer(pool, MAX_SLOTS, PAGES_PER_ROW, check_peers=lost)
    sanitizer.check_outputs(torch.zeros(2, 7), [0, 1])
    with pytest.raises(TPPeerLostError, match="rank 1 is gone"):
        sanitizer.check_outputs(torch.full((2, 7), float("nan")), [0, 1])
