"""Rehearsal: two steps that never were, to capture a bucket with one and to try it with the other.

They are staged as real ones are, over pages that nobody owns yet, and differ in all that inputs hold.
"""

import torch

from workers.engine.copies import copies_to
from workers.engine.forward_batch import ForwardBatch
from workers.engine.staging import BucketInputs, Stager
from workers.kvcache.kv_pool import KVPool
from workers.kvcache.page_table import PageTable
from workers.plan import BatchPlan, RelocationVersion, SetRow

_NUM_SHORT_ROWS = 2


class Rehearsal:
    """Stages the two steps of each bucket. Lives as long as a capture."""

    def __init__(self, pool: KVPool, max_slots: int, pages_per_row: int, device: torch.device) -> None:
        self._max_slots = max_slots
        self._page_size = pool.page_size
        self._num_pages = min(pages_per_row, pool.num_pages)
        self._table = PageTable(max_slots, pages_per_row, pool.page_size, pool.num_pages, checked=False)
        for slot in range(max_slots):
            first = slot * self._num_pages
            pages = [(first + column) % pool.num_pages + 1 for column in range(self._num_pages)]
            self._table.set_row(SetRow(slot, 0, pages, [], []))
        self._stager = Stager(self._table, 1, device, copies_to(device))

    def first(self, inputs: BucketInputs) -> ForwardBatch:
        """Return a step that fills the bucket, as far as slots do: rows at their beginning."""
        if inputs.bucket.mode == "decode":
            num_rows = min(inputs.bucket.size, self._max_slots)
            return self._stage(inputs, list(range(num_rows)), 0, [1] * num_rows, token_id=0)
        if inputs.tree is not None:
            num_rows = max(1, min(self._max_slots, inputs.bucket.size // inputs.samples_per_row))
            lens = [self._longest(min(inputs.samples_per_row, inputs.bucket.size), 0)] * num_rows
            return self._stage(inputs, list(range(num_rows)), 0, lens, token_id=0)
        num_short = min(_NUM_SHORT_ROWS, self._max_slots, inputs.bucket.size - 1) - 1
        lens = [1] * num_short + [self._longest(inputs.bucket.size - num_short, 0)]
        return self._stage(inputs, list(range(len(lens))), 0, lens, token_id=0)

    def second(self, inputs: BucketInputs) -> ForwardBatch:
        """Return a step of fewer rows, on other slots, with a page before them where a row has two."""
        start = self._page_size if self._num_pages > 1 else 0
        if inputs.bucket.mode == "decode":
            num_rows = max(1, min(inputs.bucket.size, self._max_slots) - 1)
            lens = [1] * num_rows
        elif inputs.tree is not None:
            num_rows = min(_NUM_SHORT_ROWS, self._max_slots, inputs.bucket.size - 1)
            longest = min(inputs.samples_per_row, inputs.bucket.size - num_rows + 1)
            lens = [1] * (num_rows - 1) + [self._longest(longest, start)]
        else:
            num_short = min(_NUM_SHORT_ROWS, self._max_slots - 1, inputs.bucket.size - 2)
            lens = [1] * num_short + [self._longest(max(2, (inputs.bucket.size - num_short) // 2), start)]
        slots = [self._max_slots - 1 - row for row in range(len(lens))]
        return self._stage(inputs, slots, start, lens, token_id=1)

    def _longest(self, num_tokens: int, start: int) -> int:
        return min(num_tokens, self._num_pages * self._page_size - start)

    def _stage(
        self, inputs: BucketInputs, slots: list[int], start: int, lens: list[int], token_id: int
    ) -> ForwardBatch:
        plan = BatchPlan(
            step=0,
            relocation_version=RelocationVersion(0, 0),
            ops=[],
            slots=slots,
            starts=[start] * len(slots),
            lens=lens,
            token_ids=[token_id] * sum(lens),
            sampled=list(range(len(slots))),
        )
        batch, _ = self._stager.stage_bucket(plan, inputs)
        if batch.tree is not None:  # chains, as rows that share pages have to be: each writes the same
            words = [(1 << number + 1) - 1 for length in lens for number in range(length)]
            batch.tree.visible[: len(words)].copy_(torch.tensor(words))
        inputs.has_rows = False  # these are no step's
        return batch
