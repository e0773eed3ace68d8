"""LoopInputs: the static device inputs of a DraftLoop, which its passes share."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from workers.attention.backend import AttentionBackend
from workers.engine.copies import CopyStream
from workers.engine.forward_batch import ForwardBatch, TokenTree
from workers.engine.sampler import GreedyKeys, GreedyTokens
from workers.engine.vocabulary_shard import greedy_keys
from workers.kvcache.kv_pool import KVPool
from workers.kvcache.page_table import PageTable
from workers.models.draft import DraftModel
from workers.parallel import TPGroup
from workers.speculative.draft_state import DraftState

PassAttention = Callable[[ForwardBatch], AttentionBackend]
"""Returns attention that needs no plan but this: for passes over the batch's rows, of as many tokens each,
whose lengths are known on the device alone."""


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
    greedy_keys: GreedyKeys = greedy_keys


class LoopInputs:
    """For `size` rows, each with a place for its own token and for each of its drafts."""

    def __init__(self, size: int, parts: LoopParts) -> None:
        state, table = parts.state, parts.table
        device, num_places = state.drafts.device, state.max_drafts + 1
        self.size = size
        self.page_size = table.page_size
        self.max_columns = table.pages_per_row
        self.numbers = torch.zeros(4 + num_places, size, dtype=torch.int64, device=device)
        self.slots, self.places, self.num_drafts, self.is_real = self.numbers[:4]
        """[rows] int64 each: the row's; the place of its first draft; what it brings; 0 of a pad, else 1"""
        self.features_at = self.numbers[4:].view(-1)
        self.pages = torch.zeros(size, self.max_columns, dtype=torch.int32, device=device)
        self.chosen = torch.zeros(size, num_places, dtype=torch.int64, device=device)
        """[rows, places] int64: Choices'"""
        self.features = state.carried.new_zeros(size * num_places, state.carried.shape[1])
        """Of each row's own token, then of each one's draft 0, ..., [places * rows, feature_size]"""
        self.row_numbers = torch.arange(size, device=device)
        self._first_columns = self.row_numbers * self.max_columns

    def locations(self, places: torch.Tensor) -> torch.Tensor:
        """Return page * page_size + offset of the rows' places, [..., rows] int64."""
        columns = places // self.page_size + self._first_columns
        pages = self.pages.view(-1).index_select(0, columns.reshape(-1)).view(places.shape)
        return torch.add(places % self.page_size, pages, alpha=self.page_size)  # in 64 bits

    def batch(
        self,
        positions: torch.Tensor,
        locations: torch.Tensor,
        context_lens: torch.Tensor,
        tree: TokenTree | None = None,
    ) -> ForwardBatch:
        """Return a pass over all rows, of as many tokens each: positions and locations [rows * tokens] int64,
        context_lens [rows] int32, which its pass reads where they are."""
        device, num_queries = positions.device, len(positions) // self.size
        starts = np.arange(self.size + 1, dtype=np.int32) * num_queries
        none = torch.zeros(0, dtype=torch.int64, device=device)
        return ForwardBatch(
            mode="decode",
            bucket=None,
            num_real_rows=self.size,
            num_samples=0,
            token_ids=torch.zeros_like(positions),
            positions=positions,
            page_rows=self.pages,
            num_columns=torch.tensor([self.max_columns], dtype=torch.int32, device=device),
            max_columns=self.max_columns,
            query_starts=torch.from_numpy(starts).to(device),
            slots=self.slots,
            context_lens=context_lens,
            out_locations=locations,
            sample_indices=none,
            host_query_starts=starts,
            host_context_lens=np.full(self.size, num_queries, dtype=np.int32),
            tree=tree,
        )
