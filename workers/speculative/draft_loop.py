"""DraftLoop: for rows whose tokens were just chosen, finds what was right and drafts what comes next.

All of it on the device, in two prepared passes without a look at the host:

    accept   how many drafts of each row are right, its next token and place, the feature before it
    draft    one pass of the draft for each token, the first over the token chosen

    place     s       s+1  ...  p-1       p         p+1      ...   p+k-1
    token     own     right drafts        chosen    draft 1  ...   draft k-1
    entries   |--- DraftExtend's: final --|---- the loop's: provisional ----|
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from workers.attention.backend import AttentionBackend
from workers.engine.copies import CopyStream, Fence
from workers.engine.forward_batch import ForwardBatch
from workers.engine.sampler import GreedyTokens
from workers.engine.staging import StagingRing
from workers.kvcache.kv_pool import DUMMY_PAGE, KVPool
from workers.kvcache.page_table import PageTable
from workers.models.draft import DraftModel
from workers.parallel import TPGroup
from workers.speculative.acceptance import VerifiedRows, count_right
from workers.speculative.draft_state import DraftState

IntArray = npt.NDArray[np.int64]

PassAttention = Callable[[ForwardBatch], AttentionBackend]
"""Returns attention that needs no plan but this: for passes over the batch's rows, of one token each, whose
lengths are known on the device alone."""


class _HostInputs:
    """A staging set: | slots | places | drafts | is real | features' places ... |, [rows] each; page rows."""

    def __init__(self, num_rows: int, num_places: int, max_columns: int, is_pinned: bool) -> None:
        self.numbers = torch.zeros(4 + num_places, num_rows, dtype=torch.int64, pin_memory=is_pinned)
        self.pages = torch.zeros(num_rows * max_columns, dtype=torch.int32, pin_memory=is_pinned)
        self.fence: Fence | None = None


@dataclass(frozen=True)
class LoopParts:
    """What the loops of a rank have in common."""

    draft: DraftModel
    state: DraftState
    pool: KVPool
    table: PageTable
    group: TPGroup
    copies: CopyStream
    pass_attention: PassAttention
    greedy_tokens: GreedyTokens


class DraftLoop:
    """Static inputs for `size` rows, and what computes over them, at the same addresses on each step."""

    def __init__(self, size: int, parts: LoopParts) -> None:
        state, table = parts.state, parts.table
        device, max_drafts = state.drafts.device, state.max_drafts
        num_places, max_columns = max_drafts + 1, table.pages_per_row
        is_pinned = device.type == "cuda"
        self.size = size
        self._parts = parts
        self._ring = StagingRing(lambda: _HostInputs(size, num_places, max_columns, is_pinned))
        self._numbers = torch.zeros(4 + num_places, size, dtype=torch.int64, device=device)
        self._slots, self._places, self._num_drafts, self._is_real = self._numbers[:4]
        self._features_at = self._numbers[4:].view(-1)
        self._pages = torch.zeros(size, max_columns, dtype=torch.int32, device=device)
        self.chosen = torch.zeros(size, num_places, dtype=torch.int64, device=device)
        """[rows, places] int64: Choices'"""
        self._features = state.carried.new_zeros(size * num_places, state.carried.shape[1])
        # accept writes, draft reads:
        self.num_right = torch.zeros(size, dtype=torch.int64, device=device)
        """[rows] int64"""
        self._token_ids = torch.zeros(size, dtype=torch.int64, device=device)
        self._feature = state.carried.new_zeros(size, state.carried.shape[1])
        self._positions = torch.zeros(max_drafts, size, dtype=torch.int64, device=device)
        self._locations = torch.zeros(max_drafts, size, dtype=torch.int64, device=device)
        self._context_lens = torch.ones(max_drafts, size, dtype=torch.int32, device=device)
        self._row_numbers = torch.arange(size, device=device)
        self._ahead = torch.arange(max_drafts, device=device)[:, None]
        self._batches = self._make_batches(device, max_columns)
        self._attentions = [parts.pass_attention(batch) for batch in self._batches]
        self._num_rows = self._num_columns = 0

    @property
    def has_pads(self) -> bool:
        """Tell whether the rows staged last are fewer than there is room for."""
        return self._num_rows < self.size

    def stage(self, rows: VerifiedRows, chosen: torch.Tensor, features: torch.Tensor, at: IntArray) -> None:
        """Take a step's rows: what was `chosen` [B, places], and of the step's features [tokens,
        feature_size] those `at` [B, places]: of each row's own last token and of its drafts."""
        parts, num_rows = self._parts, len(rows.slots)
        host = self._ring.acquire()
        numbers = host.numbers.numpy()
        numbers[:4, :num_rows] = rows.slots, rows.positions, rows.num_drafts, np.ones(num_rows)
        numbers[4:, :num_rows] = at.T
        numbers[:, num_rows:] = 0
        numbers[0, num_rows:] = parts.table.dummy_slot
        ends = rows.positions + rows.num_drafts + parts.state.max_drafts
        num_columns = -(-int(ends.max()) // parts.table.page_size)
        pages = host.pages[: self.size * num_columns].view(self.size, num_columns)
        parts.table.stage_rows(numbers[0], pages.numpy())
        parts.copies.copy(self._numbers, host.numbers)
        parts.copies.copy(self._pages[:, :num_columns], pages)
        # What the step before staged, and this one does not, points nowhere again (I9).
        self._pages[:, num_columns : self._num_columns].fill_(DUMMY_PAGE)
        self.chosen[num_rows : self._num_rows].zero_()
        self.chosen[:num_rows].copy_(chosen)
        torch.index_select(features, 0, self._features_at, out=self._features)
        host.fence = parts.copies.fence()
        self._num_rows, self._num_columns = num_rows, num_columns

    def accept(self) -> None:
        """Find out what was right, and where each row goes on."""
        state, page_size = self._parts.state, self._parts.table.page_size
        drafts = state.drafts.index_select(0, self._slots)
        num_right = count_right(self.chosen, drafts, self._num_drafts)
        self.num_right.copy_(num_right)
        self._token_ids.copy_(self.chosen.gather(1, num_right[:, None]).view(-1))
        #   features   | of each row's own token | of its draft 0 | ... |
        self._feature.copy_(self._features.index_select(0, num_right * self.size + self._row_numbers))
        state.carried.index_copy_(0, self._slots, self._feature)
        # Pads stay on the dummy page: a place further on would be another row's.
        positions = (self._places + num_right + self._ahead) * self._is_real
        columns = positions // page_size + self._row_numbers * self._pages.shape[1]
        pages = self._pages.view(-1).index_select(0, columns.view(-1)).view(positions.shape)
        self._positions.copy_(positions)
        self._locations.copy_(pages.long() * page_size + positions % page_size)
        self._context_lens.copy_(positions + 1)

    def draft(self, num_drafts: int) -> None:
        """Draft so many tokens for each row, and leave them where its slot's next step finds them."""
        model, drafted = self._parts.draft, []
        token_ids, feature = self._token_ids, self._feature
        for number in range(num_drafts):
            attention = self._attentions[number]
            attention.begin()
            hidden = model.forward(token_ids, feature, self._positions[number], attention)
            token_ids = self._next_tokens(hidden)
            drafted.append(token_ids)
            feature = model.next_feature(hidden)
        self._parts.state.drafts[:, :num_drafts].index_copy_(0, self._slots, torch.stack(drafted, dim=1))

    def passes(self, num_drafts: int) -> tuple[ForwardBatch, IntArray]:
        """Return what `draft` will write as one batch, and the slots of its rows; for a sanitizer: waits."""
        slots = self._slots.cpu().numpy()
        starts = np.arange(self.size + 1, dtype=np.int32) * num_drafts
        lens = self._context_lens[num_drafts - 1].cpu().numpy().astype(np.int32)
        lens[self._num_rows :] = num_drafts  # of pads, as if they went on
        batch = ForwardBatch(
            mode="decode",
            bucket=None,
            num_real_rows=self._num_rows,
            num_samples=0,
            token_ids=torch.zeros(0, dtype=torch.int64),
            positions=self._positions[:num_drafts].T.reshape(-1),
            page_rows=self._pages[:, : self._num_columns],
            num_columns=torch.tensor([self._num_columns], dtype=torch.int32),
            max_columns=self._num_columns,
            query_starts=torch.from_numpy(starts),
            slots=self._slots,
            context_lens=torch.from_numpy(lens),
            out_locations=self._locations[:num_drafts].T.reshape(-1),
            sample_indices=torch.zeros(0, dtype=torch.int64),
            host_query_starts=starts,
            host_context_lens=lens,
        )
        return batch, slots

    def _make_batches(self, device: torch.device, max_columns: int) -> list[ForwardBatch]:
        starts = np.arange(self.size + 1, dtype=np.int32)
        query_starts = torch.from_numpy(starts).to(device)
        num_columns = torch.tensor([max_columns], dtype=torch.int32, device=device)
        none = torch.zeros(0, dtype=torch.int64, device=device)
        return [
            ForwardBatch(
                mode="decode",
                bucket=None,
                num_real_rows=self.size,
                num_samples=0,
                token_ids=self._token_ids,
                positions=self._positions[number],
                page_rows=self._pages,
                num_columns=num_columns,
                max_columns=max_columns,
                query_starts=query_starts,
                slots=self._slots,
                context_lens=self._context_lens[number],
                out_locations=self._locations[number],
                sample_indices=none,
                host_query_starts=starts,
                host_context_lens=np.ones(self.size, dtype=np.int32),
            )
            for number in range(len(self._ahead))
        ]

    def _next_tokens(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the likeliest token behind each row, [rows] int64, equal on every rank."""
        model, parts = self._parts.draft, self._parts
        logits = model.logits(hidden)
        if logits is None:
            token_ids = torch.empty(self.size, dtype=torch.int64, device=hidden.device)
        else:
            token_ids = model.target_ids(parts.greedy_tokens(logits))
        parts.group.broadcast(token_ids)
        return token_ids
