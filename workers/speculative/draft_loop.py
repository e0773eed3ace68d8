"""DraftLoop: for rows whose tokens were just chosen, finds what was right and drafts what comes next.

All of it on the device, in two prepared passes without a look at the host:

    accept   which drafts of each row are right, its next token and place, the feature before it
    draft    passes of the draft, the first over the token chosen

    place     s       s+1  ...  p-1       p         p+1      ...
    token     own     right drafts        chosen    drafts: a chain or the tree's followed nodes
    entries   |--- DraftExtend's: final --|---- the loop's: provisional ----|
"""

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from workers.engine.copies import Fence
from workers.engine.forward_batch import ForwardBatch
from workers.engine.staging import StagingRing
from workers.kvcache.kv_pool import DUMMY_PAGE
from workers.speculative.acceptance import VerifiedRows
from workers.speculative.chain_passes import ChainPasses
from workers.speculative.loop_inputs import LoopInputs, LoopParts
from workers.speculative.tree_passes import TreePasses

IntArray = npt.NDArray[np.int64]


class DraftPasses(Protocol):
    """What drafts are to a DraftLoop; workers.speculative.chain_passes and tree_passes."""

    path: torch.Tensor | None
    """[rows, max_drafts] int64: which numbers were right, in order; None: the first ones"""

    def reach(self, num_drafts: int) -> int:
        """Return how many places drafting so many tokens writes, from that of the chosen token on."""
        ...

    def accept(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return how many drafts of each staged row were right, and the last one's number, 0 for none:
        [rows] int64 each."""
        ...

    def begin(self, places: torch.Tensor) -> None:
        """Go on from the chosen tokens' places, [rows] int64."""
        ...

    def draft(self, token_ids: torch.Tensor, feature: torch.Tensor, draft_len: int) -> None:
        """Draft so many tokens ahead of token_ids [rows] int64, each with the feature before it, and leave
        them where the slots' next step finds them."""
        ...

    def written(self, draft_len: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the locations that `draft` will write, [rows, places] int64, and each row's context_len in
        the last pass, [rows] int32."""
        ...


class _HostInputs:
    """A staging set: | slots | places | drafts | is real | features' places ... |, [rows] each; page rows."""

    def __init__(self, num_rows: int, num_places: int, max_columns: int, is_pinned: bool) -> None:
        self.numbers = torch.zeros(4 + num_places, num_rows, dtype=torch.int64, pin_memory=is_pinned)
        self.pages = torch.zeros(num_rows * max_columns, dtype=torch.int32, pin_memory=is_pinned)
        self.fence: Fence | None = None


class DraftLoop:
    """Static inputs for `size` rows, and what computes over them, at the same addresses on each step."""

    def __init__(self, size: int, parts: LoopParts) -> None:
        state = parts.state
        device = state.drafts.device
        num_places, is_pinned = state.max_drafts + 1, device.type == "cuda"
        self.size = size
        self.inputs = LoopInputs(size, parts)
        max_columns = self.inputs.max_columns
        self._parts = parts
        self._ring = StagingRing(lambda: _HostInputs(size, num_places, max_columns, is_pinned))
        self._passes: DraftPasses = (ChainPasses if state.topk == 1 else TreePasses)(self.inputs, parts)
        # accept writes, draft reads:
        self.num_right = torch.zeros(size, dtype=torch.int64, device=device)
        """[rows] int64"""
        self._places = torch.zeros(size, dtype=torch.int64, device=device)
        self._token_ids = torch.zeros(size, dtype=torch.int64, device=device)
        self._feature = state.carried.new_zeros(size, state.carried.shape[1])
        self._num_rows = self._num_columns = self._num_chosen = 0

    @property
    def has_pads(self) -> bool:
        """Tell whether the rows staged last are fewer than there is room for."""
        return self._num_rows < self.size

    @property
    def path(self) -> torch.Tensor | None:
        """See DraftPasses."""
        return self._passes.path

    def stage(self, rows: VerifiedRows, chosen: torch.Tensor, features: torch.Tensor, at: IntArray) -> None:
        """Take a step's rows: what was `chosen` [B, places that any row has], and of the step's features
        [tokens, feature_size] those `at` [B, places]: of each row's own last token and of its drafts."""
        parts, inputs, num_rows = self._parts, self.inputs, len(rows.slots)
        state = parts.state
        host = self._ring.acquire()
        numbers = host.numbers.numpy()
        numbers[:4, :num_rows] = rows.slots, rows.positions, rows.num_drafts, np.ones(num_rows)
        numbers[4:, :num_rows] = at.T
        numbers[:, num_rows:] = 0
        numbers[0, num_rows:] = parts.table.dummy_slot
        drafting = rows.num_drafts // state.topk + self._passes.reach(state.max_drafts)
        ends = rows.positions + np.maximum(rows.num_drafts, drafting)
        num_columns = -(-int(ends.max()) // parts.table.page_size)
        pages = host.pages[: self.size * num_columns].view(self.size, num_columns)
        parts.table.stage_rows(numbers[0], pages.numpy())
        parts.copies.copy(inputs.numbers, host.numbers)
        parts.copies.copy(inputs.pages[:, :num_columns], pages)
        # What the step before staged, and this one does not, points nowhere again (I9).
        num_chosen = chosen.shape[1]
        if num_columns < self._num_columns:
            inputs.pages[:, num_columns : self._num_columns].fill_(DUMMY_PAGE)
        if num_rows < self._num_rows or num_chosen < self._num_chosen:
            inputs.chosen.zero_()
        inputs.chosen[:num_rows, :num_chosen].copy_(chosen)
        torch.index_select(features, 0, inputs.features_at, out=inputs.features)
        host.fence = parts.copies.fence()
        self._num_rows, self._num_columns, self._num_chosen = num_rows, num_columns, num_chosen

    def accept(self) -> None:
        """Find out what was right, and where each row goes on."""
        inputs, carried = self.inputs, self._parts.state.carried
        num_right, last = self._passes.accept()
        self.num_right.copy_(num_right)
        torch.gather(inputs.chosen, 1, last[:, None], out=self._token_ids.view(-1, 1))
        at = torch.add(inputs.row_numbers, last, alpha=self.size)
        torch.index_select(inputs.features, 0, at, out=self._feature)
        carried.index_copy_(0, inputs.slots, self._feature)
        torch.mul(inputs.places + num_right, inputs.is_real, out=self._places)
        self._passes.begin(self._places)

    def draft(self, draft_len: int) -> None:
        """Draft so many tokens ahead for each row, and leave them where its slot's next step finds them."""
        self._passes.draft(self._token_ids, self._feature, draft_len)

    def passes(self, draft_len: int) -> tuple[ForwardBatch, IntArray]:
        """Return what `draft` will write as one batch, and the slots of its rows; for a sanitizer: waits."""
        inputs = self.inputs
        locations, context_lens = self._passes.written(draft_len)
        num_places = locations.shape[1]
        slots = inputs.slots.cpu().numpy()
        starts = np.arange(self.size + 1, dtype=np.int32) * num_places
        lens = context_lens.cpu().numpy().astype(np.int32)
        lens[self._num_rows :] = num_places  # of pads, as if they went on
        places = torch.from_numpy(lens - num_places)[:, None] + torch.arange(num_places)
        batch = ForwardBatch(
            mode="decode",
            bucket=None,
            num_real_rows=self._num_rows,
            num_samples=0,
            token_ids=torch.zeros(0, dtype=torch.int64),
            positions=places.view(-1),
            page_rows=inputs.pages[:, : self._num_columns],
            num_columns=torch.tensor([self._num_columns], dtype=torch.int32),
            max_columns=self._num_columns,
            query_starts=torch.from_numpy(starts),
            slots=inputs.slots,
            context_lens=torch.from_numpy(lens),
            out_locations=locations.reshape(-1),
            sample_indices=torch.zeros(0, dtype=torch.int64),
            host_query_starts=starts,
            host_context_lens=lens,
        )
        return batch, slots
