"""Speculator: one rank's draft beside its target. Owned by the Engine, in its thread.

A round is verify, draft-extend, draft. Verify is the target's own step: rows that decode bring the tokens
drafted for them. Draft-extend is part of its pass (DraftExtend), for prefill chunks too. Then the Sampler
chooses, and a DraftLoop finds what was right and drafts on, behind every row that got a token.

    place               s        s+1      ...   p-1        p         p+1 ...   p+k-1
    token               known    accepted       accepted   chosen    draft 1   draft k-1
    the entry's feature carried  of s           of p-2     of p-1    the draft's own
                        |------- target and draft-extend --|-------- draft --------|

The entry at a place consumes the token there and the feature of the token before it, zeros for token 0: a
function of the tokens alone. Entries from p on are provisional: the next round begins at p.
Nothing here waits for the device but a sanitizer, and rows with penalties (see `choose`).
"""

from dataclasses import replace

import numpy as np
import numpy.typing as npt
from torch import Tensor

from workers.engine.copies import CopyStream, Fence
from workers.engine.forward_batch import ForwardBatch, TokenTree
from workers.engine.sampler import Sampler
from workers.kvcache.kv_pool import KVPool
from workers.kvcache.page_table import PageTable
from workers.kvcache.sanitizer import KVSanitizer
from workers.plan import BatchPlan
from workers.speculative.acceptance import HostTrees, Verified, VerifiedRows, choose
from workers.speculative.draft_loop import DraftLoop
from workers.speculative.draft_runner import DraftRunner
from workers.speculative.draft_state import DraftState
from workers.speculative.tree import DEPTH, PARENT, VISIBLE

IntArray = npt.NDArray[np.int64]


class Speculator:
    """`pool`, `table`: the target's."""

    def __init__(
        self,
        state: DraftState,
        runner: DraftRunner,
        pool: KVPool,
        table: PageTable,
        copies: CopyStream,
        sanitizer: KVSanitizer | None,
    ) -> None:
        self._state = state
        self._runner = runner
        self._pool = pool
        self._table = table
        self._copies = copies
        self._sanitizer = sanitizer
        self._is_carried = np.zeros(table.max_slots, dtype=np.bool_)
        self._trees: HostTrees | None = None
        """Of the step under way, where its sampler asks for them."""

    def close(self, slot: int) -> None:
        """Forget what is carried for a slot: the next request begins on its own prefix."""
        self._is_carried[slot] = False

    def begin(self, plan: BatchPlan, batch: ForwardBatch, slots: IntArray, sampler: Sampler) -> ForwardBatch:
        """Find what the staged step's rows carry into it, and what its trees are; begin to time it.

        Return the batch as it then is.
        """
        self._load_carried(plan)
        self._runner.times.begin(plan.mode)
        self._trees = None
        state = self._state
        if state.topk == 1 or not plan.num_drafts:
            return batch
        if not sampler.is_plain(np.array(plan.slots)[plan.sampled]).all():
            drafts, fields = self._copies.to_host(state.drafts), self._copies.to_host(state.fields)
            self._trees = HostTrees(drafts, fields, self._copies.fence())
        #   tokens of a row   | own | node 1 | node 2 | ... |
        #                           ^ end - num             ^ end
        rows = slots[: batch.num_real_rows]
        num_drafts = np.zeros(self._table.max_slots, dtype=np.int64)
        num_drafts[plan.slots] = plan.num_drafts
        nums = num_drafts[rows]
        ends = batch.host_query_starts[1 : len(rows) + 1].astype(np.int64)
        numbers = np.arange(nums.sum()) - np.repeat(np.cumsum(nums) - nums, nums)
        firsts = np.repeat(ends - nums, nums)
        sources = np.repeat(rows * state.max_drafts, nums) + numbers
        return self._grow(batch, self._copies.upload(np.stack([firsts + numbers, sources, firsts - 1])))

    def _grow(self, batch: ForwardBatch, index: Tensor) -> ForwardBatch:
        """Let a batch's tokens stand behind and see what they do in their trees.

        index [3, nodes] int64: the batch's tokens that are nodes, where their fields are, and the token of
        their row's own, number 0.
        """
        if batch.tree is None:
            batch = replace(batch, tree=TokenTree.room(batch.num_tokens, batch.token_ids.device))
        assert batch.tree is not None
        #   what no node is: the token before it; number 0, which sees itself. Pads see all of theirs.
        num_real = int(batch.host_query_starts[batch.num_real_rows])
        batch.tree.parents.zero_()
        batch.tree.visible[:num_real].fill_(1)
        batch.tree.visible[num_real:].fill_(-1)
        #   fields  [slots, NUM_FIELDS, max_drafts] -> [NUM_FIELDS, nodes]
        fields = self._state.fields.transpose(0, 1).flatten(1).index_select(1, index[1])
        batch.tree.parents.index_copy_(0, index[0], index[2] + fields[PARENT])
        batch.tree.visible.index_copy_(0, index[0], fields[VISIBLE])
        own = batch.positions.index_select(0, index[2])
        batch.positions.index_copy_(0, index[0], own + fields[DEPTH])
        return batch

    def advance(
        self,
        plan: BatchPlan,
        batch: ForwardBatch,
        slots: IntArray,
        logits: Tensor | None,
        sampler: Sampler,
        features: Tensor,
    ) -> tuple[Verified | None, Fence | None]:
        """Choose tokens for a step's sampled rows, and draft behind them: of a step that speculates.

        `logits` [samples, this rank's tokens]: every rank comes to the same tokens. `features` [tokens,
        feature_size] are those of the staged `batch`. The fence is behind what was chosen; drafting goes on
        behind it.
        """
        firsts = np.zeros(self._table.max_slots, dtype=np.int64)
        firsts[slots[: batch.num_real_rows]] = batch.host_query_starts[: batch.num_real_rows]
        starts, lens = np.array(plan.starts), np.array(plan.lens)
        nums = np.array(plan.num_drafts) if plan.num_drafts else np.zeros_like(lens)
        lasts = firsts[plan.slots] + lens - nums - 1  # each row's last known token in the batch
        of, nums = np.array(plan.sampled), nums[plan.sampled]
        rows = VerifiedRows(np.array(plan.slots)[of], (starts + lens)[of] - nums, nums)
        verified, loop = self._accept(rows, lasts[of], logits, sampler, features)
        fence = self._copies.fence()
        if self._sanitizer is not None:
            self._check(rows, loop, plan.draft_len)
        if plan.draft_len:
            self._runner.draft(loop, plan.draft_len)
        return verified, fence

    def _accept(
        self,
        rows: VerifiedRows,
        lasts: IntArray,
        logits: Tensor | None,
        sampler: Sampler,
        features: Tensor,
    ) -> tuple[Verified, DraftLoop]:
        loop = self._runner.loop_for(len(rows.slots))
        assert logits is not None, "what is sampled has logits"
        choices = choose(sampler, logits, rows, self._state.drafts, self._copies, self._trees)
        numbers = np.arange(self._state.max_drafts + 1)
        at = lasts[:, None] + np.minimum(numbers, rows.num_drafts[:, None])
        loop.stage(rows, choices.token_ids, features, at)
        self._runner.accept(loop)
        # A copy on the CPU, too: the next step writes there (I9).
        num_right = self._copies.to_host(loop.num_right[: len(rows.slots)].clone())
        path = None if loop.path is None else self._copies.to_host(loop.path[: len(rows.slots)].clone())
        return Verified(num_right, choices.to_host(self._copies), path), loop

    def _check(self, rows: VerifiedRows, loop: DraftLoop, num_drafts: int) -> None:
        """Tell the sanitizer what was wrong, and show it what is to be drafted; waits for the device."""
        assert self._sanitizer is not None
        num_right = loop.num_right.cpu().numpy()[: len(rows.slots)]
        for slot, end in zip(rows.slots.tolist(), (rows.positions + num_right).tolist(), strict=True):
            self._sanitizer.rewind(slot, end)
        if num_drafts:
            self._sanitizer.check_inputs(*loop.passes(num_drafts), is_draft=True)

    def _load_carried(self, plan: BatchPlan) -> None:
        """Find the feature before each row that was opened since: its prefix' last page has it."""
        opened = np.flatnonzero(~self._is_carried[plan.slots])
        if not opened.size:
            return
        slots, starts = np.array(plan.slots)[opened], np.array(plan.starts)[opened]
        self._is_carried[slots] = True
        size = self._table.page_size
        assert not (starts % size).any(), f"slots {slots} begin inside a page, at {starts}"
        if (is_first := starts == 0).any():
            self._state.carried.index_fill_(0, self._copies.upload(slots[is_first]), 0.0)
        if is_first.all():
            return
        slots, starts = slots[~is_first], starts[~is_first]
        pages = self._table.rows[slots, starts // size - 1].astype(np.int64)
        tails = self._pool.tails.index_select(0, self._copies.upload(pages))
        self._state.carried.index_copy_(0, self._copies.upload(slots), tails)
