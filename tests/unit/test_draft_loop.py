"""A DraftLoop's static inputs say nothing of a step before: what is not staged points nowhere (I9)."""

import numpy as np
import pytest
import torch

from workers.engine.copies import InlineCopies
from workers.engine.sampler import greedy_tokens
from workers.kvcache.kv_pool import DUMMY_PAGE, KVPool
from workers.kvcache.layout import target_only
from workers.kvcache.page_table import PageTable
from workers.parallel import TPGroup
from workers.plan import SetRow
from workers.speculative.acceptance import VerifiedRows
from workers.speculative.draft_loop import DraftLoop
from workers.speculative.draft_state import DraftState
from workers.speculative.loop_inputs import LoopParts

CPU = torch.device("cpu")
PAGE_SIZE, NUM_PAGES, PAGES_PER_ROW = 2, 40, 10
NUM_SLOTS, NUM_DRAFTS = 4, 3


@pytest.fixture
def table():
    table = PageTable(NUM_SLOTS, PAGES_PER_ROW, PAGE_SIZE, NUM_PAGES, checked=True)
    for slot in range(NUM_SLOTS):
        first = 1 + slot * PAGES_PER_ROW
        table.set_row(SetRow(slot, 0, list(range(first, first + PAGES_PER_ROW)), [], []))
    return table


@pytest.fixture
def loop(table):
    pool = KVPool(target_only(1, PAGE_SIZE, 1, 1, "float32"), NUM_PAGES, CPU)
    state = DraftState(pool, NUM_SLOTS, NUM_DRAFTS, vocab_size=200)
    parts = LoopParts(
        draft=None,  # staging and accepting ask for no draft
        state=state,
        pool=pool,
        table=table,
        group=TPGroup.single(),
        copies=InlineCopies(),
        pass_attention=lambda batch: None,
        greedy_tokens=greedy_tokens,
    )
    return DraftLoop(NUM_SLOTS, parts)


def stage(loop, positions, token_id):
    """Stage rows of the first slots, each at its position and with all drafts."""
    num_rows = len(positions)
    rows = VerifiedRows(np.arange(num_rows), np.array(positions), np.full(num_rows, NUM_DRAFTS))
    chosen = torch.full((num_rows, NUM_DRAFTS + 1), token_id)
    loop.stage(rows, chosen, torch.zeros(1, 0), np.zeros((num_rows, NUM_DRAFTS + 1), dtype=np.int64))


def test_rows_and_pages_of_a_longer_step_before_are_gone(loop, table):
    stage(loop, [3, 13, 9, 1], token_id=7)
    assert (loop.inputs.pages != DUMMY_PAGE).sum() == NUM_SLOTS * PAGES_PER_ROW
    stage(loop, [1, 3], token_id=5)
    #   the second's window: places 3 .. 8, in pages 0 .. 4
    expected = np.zeros((NUM_SLOTS, PAGES_PER_ROW), dtype=np.int32)
    expected[:2, :5] = table.rows[:2, :5]
    assert np.array_equal(loop.inputs.pages.numpy(), expected)
    assert loop.inputs.chosen.tolist() == [[5] * 4, [5] * 4, [0] * 4, [0] * 4]
    stage(loop, [1, 13, 3], token_id=6)
    expected[:3] = table.rows[:3]
    assert np.array_equal(loop.inputs.pages.numpy(), expected)
    assert loop.inputs.chosen.tolist() == [[6] * 4] * 3 + [[0] * 4]


def test_what_follows_a_step_is_that_of_a_loop_that_staged_no_other(loop):
    stage(loop, [3, 13, 9, 1], token_id=7)
    loop.accept()
    stage(loop, [1, 3], token_id=0)
    loop.accept()
    assert loop.num_right.tolist() == [NUM_DRAFTS, NUM_DRAFTS, 0, 0]
    assert loop._token_ids.tolist() == [0, 0, 0, 0]
    assert loop._passes._locations[:, 2:].tolist() == [[0, 0]] * NUM_DRAFTS, "pads stay on the dummy page"
