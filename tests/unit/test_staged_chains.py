"""Rows that verify as many drafts each are staged as any others are, by fewer steps."""

import numpy as np
import pytest
import torch

from workers.engine.copies import InlineCopies
from workers.engine.graph_guard import Bucket
from workers.engine.staged_tokens import DraftIds, are_chains
from workers.engine.staging import BucketInputs, Stager
from workers.kvcache.page_table import PageTable
from workers.plan import BatchPlan, RelocationVersion, SetRow

CPU = torch.device("cpu")
PAGE_SIZE, MAX_SLOTS, VOCAB_SIZE, MAX_DRAFTS = 4, 4, 1000, 5


def plan_of(slots, starts, num_drafts, sampled=None, num_awaited=0):
    num_rows = len(slots)
    return BatchPlan(
        1,
        RelocationVersion(1, 1),
        [],
        slots,
        starts,
        [1 + num for num in num_drafts],
        [7 * (row + 1) for row in range(num_awaited, num_rows)],
        list(range(num_rows)) if sampled is None else sampled,
        num_awaited,
        num_drafts if any(num_drafts) else [],
    )


def stager():
    table = PageTable(MAX_SLOTS, 8, PAGE_SIZE, MAX_SLOTS * 8, checked=True)
    for slot in range(MAX_SLOTS):
        table.set_row(SetRow(slot, 0, [1 + 8 * slot + column for column in range(8)], [], []))
    return Stager(table, 32, CPU, InlineCopies(), draft_ids=DraftIds(VOCAB_SIZE, MAX_DRAFTS))


def staged(plan, fill):
    """What a staging set holds that was full of something else."""
    host = BucketInputs(Bucket("verify", 24), MAX_SLOTS, PAGE_SIZE, 8, CPU).ring.acquire()
    host.data.fill_(0x55)
    host.start_array[0] = 0
    slots = fill(stager(), host, plan)
    return slots.tolist(), host.data.clone()


@pytest.mark.parametrize("num_drafts", [1, 3, 5])
@pytest.mark.parametrize("slots", [[2], [3, 0], [1, 3, 2, 0]])
def test_even_chains_are_staged_as_any_rows(slots, num_drafts):
    plan = plan_of(slots, [5, 0, 11, 3][: len(slots)], [num_drafts] * len(slots))
    assert are_chains(plan)
    fast_slots, fast = staged(plan, Stager._fill_chains)
    slots, wanted = staged(plan, Stager._fill)
    assert fast_slots == slots
    assert torch.equal(fast, wanted)


def test_what_is_no_even_chain_is_told():
    assert not are_chains(plan_of([0, 1], [5, 5], [0, 0]))
    assert not are_chains(plan_of([0, 1], [5, 5], [2, 1]))
    assert not are_chains(plan_of([0, 1], [5, 5], [2, 2], sampled=[0]))


def test_drafts_are_named_by_slot_and_number():
    plan = plan_of([2, 1], [5, 5], [0, 3])
    inputs = BucketInputs(Bucket("mixed", 8), MAX_SLOTS, PAGE_SIZE, 8, CPU)
    batch, _ = stager().stage_bucket(plan, inputs)
    first = VOCAB_SIZE + MAX_DRAFTS
    wanted = [7, 14, first, first + 1, first + 2, 0, 0, 0]
    assert batch.token_ids.tolist() == wanted
    assert np.array_equal(batch.host_query_starts[:3], [0, 1, 5])
