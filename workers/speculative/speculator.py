"""Speculator: one rank's draft beside its target. Owned by the Engine, in its thread.

A round is verify, draft-extend, draft. Verify is the target's own step: rows that decode bring the tokens
drafted for them, and the Sampler says how many were right. Then, for every row of the step, prefill chunks
too, draft-extend computes the draft's KV of what the row has computed, from the target's features, and the
draft goes on from there.

    place               s        s+1      ...   p-1        p         p+1 ...   p+k-1
    token               known    accepted       accepted   sampled   draft 1   draft k-1
    the entry's feature carried  of s           of p-2     of p-1    the draft's own
                        |------ computed by the target ---|
                        |-------------- draft-extend --------------||--- draft ---|

The entry at a place consumes the token there and the feature of the token before it, zeros for token 0: a
function of the tokens alone. Entries from p on are provisional: the next round's draft-extend begins at p.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from workers.attention.backend import AttentionBackend
from workers.engine.copies import CopyStream
from workers.engine.forward_batch import ForwardBatch
from workers.engine.sampler import Sampler
from workers.engine.staging import Stager
from workers.kvcache.kv_pool import KVPool
from workers.kvcache.page_table import PageTable
from workers.kvcache.sanitizer import KVSanitizer
from workers.models.draft import DraftModel
from workers.parallel import TPGroup
from workers.plan import BatchPlan, RelocationVersion
from workers.speculative.acceptance import Verified, VerifiedRow, accept

IntArray = npt.NDArray[np.int64]

_NO_VERSION = RelocationVersion(0, 0)
_UNKNOWN = -1


@dataclass(frozen=True)
class ComputedRow:
    """What a step came to for one of its rows: the tokens at `start` .. that the target has computed, and
    the one sampled behind them, if it was."""

    slot: int
    start: int
    token_ids: list[int]
    is_sampled: bool
    """Then the last of `token_ids` is the sampled one, which is not computed yet."""

    @property
    def num_computed(self) -> int:
        """Tokens with target KV and feature."""
        return len(self.token_ids) - self.is_sampled


class Speculator:
    """`drafts` [max_slots, max_drafts] int64 on the device: what each slot's next step verifies.

    `table`, `pool`: the target's. Its passes are staged by a Stager of their own.
    """

    def __init__(
        self,
        draft: DraftModel,
        attention: AttentionBackend,
        pool: KVPool,
        table: PageTable,
        group: TPGroup,
        copies: CopyStream,
        *,
        max_tokens: int,
        max_drafts: int,
    ) -> None:
        device = pool.data.device
        self._draft = draft
        self._attention = attention
        self._pool = pool
        self._table = table
        self._group = group
        self._copies = copies
        self._page_size = pool.page_size
        self._stager = Stager(table, max_tokens + table.max_slots, device, copies)
        self.drafts = torch.zeros(table.max_slots, max_drafts, dtype=torch.int64, device=device)
        # The feature of the token before each slot's next one, and the place of that one.
        self._carried = pool.tails.new_zeros(table.max_slots, pool.tails.shape[1])
        self._carried_to: IntArray = np.full(table.max_slots, _UNKNOWN, dtype=np.int64)

    def close(self, slot: int) -> None:
        """Forget what is carried for a slot: the next request begins on its own prefix."""
        self._carried_to[slot] = _UNKNOWN

    def put_drafts(self, plan: BatchPlan, batch: ForwardBatch, slots: IntArray) -> None:
        """Write the drafts that a staged step verifies into its token ids."""
        num_drafts = dict(zip(plan.slots, plan.num_drafts, strict=True))
        places: list[int] = []
        sources: list[int] = []
        for row, slot in enumerate(slots[: batch.num_real_rows].tolist()):
            if num := num_drafts[slot]:
                end = int(batch.host_query_starts[row + 1])
                places += range(end - num, end)
                sources += range(slot * self.drafts.shape[1], slot * self.drafts.shape[1] + num)
        index = self._copies.upload(np.array([places, sources], dtype=np.int64))
        batch.token_ids.index_copy_(0, index[0], self.drafts.view(-1).index_select(0, index[1]))

    def verify(
        self, plan: BatchPlan, logits: Tensor | None, sampler: Sampler | None
    ) -> tuple[list[ComputedRow], Verified | None]:
        """Return what a step came to, row by row, and on rank 0 what it sampled. Waits for the device.

        `logits` [samples, vocab] and `sampler` are rank 0's; the others learn the tokens from it.
        """
        verified = None
        # | how many | the tokens | for each sampled row
        told = torch.zeros(len(plan.sampled), 2 + self.drafts.shape[1], dtype=torch.int64)
        if plan.sampled and sampler is not None:
            assert logits is not None, "rank 0 has the logits of what is sampled"
            verified = Verified(accept(sampler, logits, self._verified_rows(plan), self._copies))
            for row, accepted in enumerate(verified.rows):
                told[row, : len(accepted.token_ids) + 1] = torch.tensor(
                    [len(accepted.token_ids), *accepted.token_ids]
                )
        if plan.sampled and self._group.size > 1:
            on_device = told.to(self._pool.data.device)
            self._group.broadcast(on_device)
            told = on_device.cpu()
        tokens = {row: told[i, 1 : 1 + int(told[i, 0])].tolist() for i, row in enumerate(plan.sampled)}
        rows, first = [], 0
        for row, (slot, start, length) in enumerate(zip(plan.slots, plan.starts, plan.lens, strict=True)):
            end = first + length - plan.drafts(row)
            known, first = plan.token_ids[first:end], end
            rows.append(ComputedRow(slot, start, known + tokens.get(row, []), row in tokens))
        return rows, verified

    def _verified_rows(self, plan: BatchPlan) -> list[VerifiedRow]:
        drafts = self.drafts.cpu().numpy()
        rows = []
        for row in plan.sampled:
            num = plan.drafts(row)
            position = plan.starts[row] + plan.lens[row] - num
            rows.append(VerifiedRow(plan.slots[row], position, drafts[plan.slots[row], :num]))
        return rows

    def follow(
        self,
        rows: Sequence[ComputedRow],
        features: Tensor,
        step: ForwardBatch,
        slots: IntArray,
        num_drafts: int,
        sanitizer: KVSanitizer | None,
    ) -> None:
        """Bring the draft up to what a step has computed, then draft `num_drafts` tokens for sampled rows.

        `features` [tokens, feature_size] are those of the staged `step`, whose rows are `slots`'.
        """
        if sanitizer is not None:
            for row in rows:
                sanitizer.rewind(row.slot, row.start + row.num_computed)
        firsts = dict(zip(slots.tolist(), step.host_query_starts.tolist(), strict=False))
        rows = sorted(rows, key=lambda row: len(row.token_ids) > 1)  # the order that staging keeps
        batch, slots = self._stage(rows)
        if sanitizer is not None:
            sanitizer.check_inputs(batch, slots, is_draft=True)
        self._load_carried(rows)
        inputs = self._inputs(rows, features, firsts)
        hidden = self._run(batch, inputs)
        self._keep(rows, features, firsts)
        sampled = [row for row in rows if row.is_sampled]
        if sampled and num_drafts:
            self._propose(sampled, hidden.index_select(0, batch.sample_indices), num_drafts, sanitizer)

    def _stage(self, rows: Sequence[ComputedRow]) -> tuple[ForwardBatch, IntArray]:
        plan = BatchPlan(
            step=0,
            relocation_version=_NO_VERSION,
            ops=[],
            slots=[row.slot for row in rows],
            starts=[row.start for row in rows],
            lens=[len(row.token_ids) for row in rows],
            token_ids=[token_id for row in rows for token_id in row.token_ids],
            sampled=[index for index, row in enumerate(rows) if row.is_sampled],
        )
        return self._stager.stage_eager(plan, plan.mode)

    def _run(self, batch: ForwardBatch, features: Tensor) -> Tensor:
        self._attention.plan(batch)
        self._attention.begin()
        return self._draft.forward(batch.token_ids, features, batch.positions, self._attention)

    def _load_carried(self, rows: Sequence[ComputedRow]) -> None:
        """Find the feature before each row that was opened since: its prefix' last page has it."""
        opened = [row for row in rows if self._carried_to[row.slot] != row.start]
        first = [row.slot for row in opened if row.start == 0]
        if first:
            self._carried.index_fill_(0, self._copies.upload(first), 0.0)
        behind = [row for row in opened if row.start]
        if not behind:
            return
        slots = np.array([row.slot for row in behind], dtype=np.int64)
        starts = np.array([row.start for row in behind], dtype=np.int64)
        assert not (starts % self._page_size).any(), f"slots {slots} begin inside a page, at {starts}"
        pages = self._table.rows[slots, starts // self._page_size - 1].astype(np.int64)
        tails = self._pool.tails.index_select(0, self._copies.upload(pages))
        self._carried.index_copy_(0, self._copies.upload(slots), tails)

    def _inputs(self, rows: Sequence[ComputedRow], features: Tensor, firsts: dict[int, int]) -> Tensor:
        """Return the feature before each token of the rows, [tokens, feature_size]."""
        #   | features of the step | carried, a row each |
        num_features = len(features)
        index: list[int] = []
        for place, row in enumerate(rows):
            first = firsts[row.slot]
            index.append(num_features + place)
            index += range(first, first + len(row.token_ids) - 1)
        carried = self._carried.index_select(0, self._copies.upload([row.slot for row in rows]))
        return torch.cat([features, carried]).index_select(0, self._copies.upload(index))

    def _keep(self, rows: Sequence[ComputedRow], features: Tensor, firsts: dict[int, int]) -> None:
        """Carry each row's last feature, and write those of pages' last tokens into their tails."""
        size = self._page_size
        carried: list[tuple[int, int]] = []
        tails: list[tuple[int, int]] = []
        for row in rows:
            first, end = firsts[row.slot] - row.start, row.start + row.num_computed
            carried.append((row.slot, first + end - 1))
            self._carried_to[row.slot] = end
            pages = range(row.start // size, end // size)
            tails += [
                (int(self._table.rows[row.slot, page]), first + (page + 1) * size - 1) for page in pages
            ]
        for target, pairs in ((self._carried, carried), (self._pool.tails, tails)):
            if pairs:
                index = self._copies.upload(np.array(pairs, dtype=np.int64).T.copy())
                target.index_copy_(0, index[0], features.index_select(0, index[1]))

    def _propose(
        self,
        rows: Sequence[ComputedRow],
        hidden: Tensor,
        num_drafts: int,
        sanitizer: KVSanitizer | None,
    ) -> None:
        """Draft tokens from the last entries' `hidden` [rows, hidden], one pass for each but the first."""
        index = self._copies.upload([row.slot for row in rows])
        for place in range(num_drafts):
            token_ids = self._next_tokens(hidden, len(rows))
            self.drafts[index, place] = token_ids
            if place + 1 < num_drafts:
                ends = [row.start + len(row.token_ids) + place for row in rows]
                batch, slots = self._stage(
                    [ComputedRow(row.slot, end, [0], True) for row, end in zip(rows, ends, strict=True)]
                )
                if sanitizer is not None:
                    sanitizer.check_inputs(batch, slots, is_draft=True)
                batch.token_ids.copy_(token_ids)
                hidden = self._run(batch, self._draft.next_feature(hidden))

    def _next_tokens(self, hidden: Tensor, num_rows: int) -> Tensor:
        """Return the likeliest token behind each row, [rows] int64, equal on every rank."""
        logits = self._draft.logits(hidden)
        if logits is None:
            token_ids = torch.empty(num_rows, dtype=torch.int64, device=hidden.device)
        else:
            token_ids = self._draft.target_ids(logits.float().argmax(dim=-1))
        self._group.broadcast(token_ids)
        return token_ids
