"""DraftRunner: the prepared passes of DraftLoops, one for each bucket of rows. Used by the Speculator.

On CUDA a prepared pass is a captured graph, on CPU a recording of its launches; see GraphRunner.
"""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import numpy as np
import torch

from workers.engine.cuda_graphs import PassGraphs
from workers.engine.graph_guard import EagerReason, GraphGuard
from workers.engine.graph_runner import can_go_on, failed_anywhere, graphs_of
from workers.engine.part_times import PartTimes
from workers.engine.recording import Arena, Recording, RecordingError, RecordingKernels
from workers.plan import CloseSlot, SetRow
from workers.speculative.acceptance import VerifiedRows
from workers.speculative.draft_loop import DraftLoop
from workers.speculative.loop_inputs import LoopParts

logger = logging.getLogger(__name__)

Prepared = Callable[[], None]


class DraftRunner:
    """Loops of `sizes` rows, the largest of which holds any step's, and their passes for drafts of `lengths`.

    `reason`: why no pass is prepared, None where they are. `kernels` record them, on CPU in a group of one;
    `graphs`: the device's where None.
    """

    def __init__(
        self,
        parts: LoopParts,
        sizes: Sequence[int],
        lengths: Sequence[int],
        guard: GraphGuard,
        times: PartTimes,
        reason: EagerReason | None,
        kernels: RecordingKernels | None,
        graphs: PassGraphs | None = None,
    ) -> None:
        self._parts = parts
        self._lengths = lengths
        self._guard = guard
        self.times = times
        self._kernels = kernels
        self._reason = reason
        self._loops = [DraftLoop(size, parts) for size in sorted(sizes)]
        self._device = parts.state.drafts.device
        self._graphs = graphs or graphs_of(self._device, parts.group)
        self._arena = Arena()
        self._prepared: dict[tuple[int, int], Prepared] = {}
        """By size and how far ahead is drafted; 0: accept"""

    def loop_for(self, num_rows: int) -> DraftLoop:
        """Return the smallest loop that holds so many rows."""
        return next(loop for loop in self._loops if loop.size >= num_rows)

    @property
    def _sizes(self) -> list[int]:
        """Sizes to be prepared, in an order that is equal on every rank."""
        return [] if self._reason else [loop.size for loop in reversed(self._loops)]

    def accept(self, loop: DraftLoop) -> None:
        """Find out what was right in the rows that were staged."""
        self._prepared.get((loop.size, 0), loop.accept)()
        self.times.ended("accept")

    def draft(self, loop: DraftLoop, draft_len: int) -> None:
        """Draft behind the rows that were accepted, and count how."""
        prepared = self._prepared.get((loop.size, draft_len))
        if prepared is None:
            self._guard.count("draft", self._reason or "capture_failed")
            loop.draft(draft_len)
        else:
            self._guard.count("draft", None)
            prepared()
        if loop.has_pads:
            self._parts.pool.zero_dummy_page()
        self.times.ended("draft")

    def prepare(self) -> None:
        """Prepare every size, the largest first; one that failed on any rank is given up on every rank (I1).

        All ranks call it together. It writes to pages that nobody owns yet.
        """
        started_s = time.monotonic()
        failed = []
        with self._graphs.capturing() if self._graphs else nullcontext():
            for loop in [self.loop_for(size) for size in self._sizes]:
                try:
                    self._prepare(loop)
                except RuntimeError as error:
                    if not can_go_on(error, self._parts.group.size == 1):
                        raise
                    logger.exception("capture of drafting failed", extra={"rows": loop.size})
                    failed.append(loop.size)
        self._parts.pool.zero_dummy_page()
        for size in failed_anywhere(self._sizes, failed, self._parts.group, self._device):
            for key in [key for key in self._prepared if key[0] == size]:
                del self._prepared[key]
        seconds = time.monotonic() - started_s
        logger.info("prepared drafting", extra={"passes": len(self._prepared), "seconds": seconds})

    def close(self) -> None:
        """Let go of the prepared passes."""
        self._prepared.clear()
        if self._graphs is not None:
            self._graphs.close()

    def _prepare(self, loop: DraftLoop) -> None:
        max_depth = self._parts.state.max_depth
        num_rows = min(loop.size, self._parts.table.max_slots)
        self._rehearse(loop, num_rows, position=1, token_id=0)
        accept = self._prepare_pass(loop.accept)
        drafting = {num: self._prepare_pass(partial(loop.draft, num)) for num in self._lengths}
        # They must repeat what is computed, from other inputs than those they were prepared with.
        found = []
        for passes in (accept, drafting[max_depth]), (loop.accept, partial(loop.draft, max_depth)):
            self._rehearse(loop, max(1, num_rows - 1), position=self._parts.table.page_size, token_id=1)
            for compute in passes:
                compute()
            state, slots = self._parts.state, slice(self._parts.table.max_slots)  # not what pads leave
            found.append((loop.num_right.clone(), state.drafts[slots].clone(), state.fields[slots].clone()))
        if not all(torch.equal(replayed, computed) for replayed, computed in zip(*found, strict=True)):
            raise RecordingError(f"drafting for {loop.size} rows: a replay differs from the draft")
        self._prepared |= {(loop.size, num): run for num, run in ({0: accept} | drafting).items()}

    def _prepare_pass(self, compute: Prepared) -> Prepared:
        if self._graphs is not None:
            return self._graphs.capture(compute)
        compute()
        if self._kernels is None:
            return compute
        with Recording(self._kernels, self._arena) as recording:
            compute()
        return recording.replay

    def _rehearse(self, loop: DraftLoop, num_rows: int, *, position: int, token_id: int) -> None:
        """Stage rows that never were, with what they carry and bring, over pages that nobody owns yet."""
        parts, max_drafts = self._parts, self._parts.state.max_drafts
        table = parts.table
        parts.state.rehearse()
        num_pages = -(-(position + 2 * max_drafts) // table.page_size)
        if num_pages > table.pages_per_row:  # a table of one page
            position, num_pages = 1, table.pages_per_row
        # No page is two rows': what one writes the other would read, the second time.
        num_rows = max(1, min(num_rows, table.num_pages // num_pages))
        slots = range(num_rows)
        for slot in slots:
            pages = [(slot * num_pages + column) % table.num_pages + 1 for column in range(num_pages)]
            table.set_row(SetRow(slot, 0, pages, [], []))
        rows = VerifiedRows(
            np.arange(num_rows), np.full(num_rows, position), np.full(num_rows, max_drafts, dtype=np.int64)
        )
        places = (num_rows, max_drafts + 1)
        chosen = torch.full(places, token_id, dtype=torch.int64, device=self._device)
        features = parts.state.carried.new_full((1, parts.state.carried.shape[1]), 0.5 * token_id)
        try:
            loop.stage(rows, chosen, features, np.zeros(places, dtype=np.int64))
        finally:
            for slot in slots:
                table.close_slot(CloseSlot(slot))
