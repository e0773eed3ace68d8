"""ForwardBatch: the inputs of one forward pass, staged for it alone (I3). Read by decoder and attention."""

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import torch

from workers.engine.graph_guard import Bucket
from workers.plan import Mode

IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True)
class TokenTree:
    """What the tokens of a batch's rows stand behind and see, where a row's last tokens are a tree's nodes.

    A row's numbers are its last places:  | num_before places | the row's tokens in the batch |
    """

    parents: torch.Tensor
    """[T] int64: the batch's token whose text each goes on; of a row's first token nothing is meant"""
    visible: torch.Tensor
    """[T] int64: bit n of a token: it sees number n of its row. It sees all places before these."""
    num_before: int

    @classmethod
    def room(cls, num_tokens: int, device: torch.device) -> Self:
        """Return a tree of so many tokens that all see their whole rows: whatever is seen is there."""
        parents = torch.zeros(num_tokens, dtype=torch.int64, device=device)
        return cls(parents, torch.full_like(parents, -1), num_before=0)


@dataclass(frozen=True)
class ForwardBatch:
    """B rows of T tokens; row r owns tokens query_starts[r] .. query_starts[r + 1] - 1.

    Rows of one token come first. Rows num_real_rows .. B - 1 are pads on the dummy page (I9): in a decode
    bucket each has one token; in a mixed one the first has all tokens that are left, the others none. Pad
    tokens have id 0 and position 0. With a bucket, the tensors are that bucket's static buffers, at the same
    addresses on every step; without one they belong to this step. The host arrays repeat two tensors for
    plans that must not synchronise.
    """

    mode: Mode
    bucket: Bucket | None
    num_real_rows: int
    num_samples: int
    """Of sample_indices; those behind are pads"""
    token_ids: torch.Tensor
    """[T] int64"""
    positions: torch.Tensor
    """[T] int64"""
    page_rows: torch.Tensor
    """[B, C] int32, C what the longest row takes; beyond a row's own pages: 0, the dummy page"""
    num_columns: torch.Tensor
    """[1] int32: C, on the device: of a bucket's steps each has its own"""
    max_columns: int
    """The most that C is at this address"""
    query_starts: torch.Tensor
    """[B + 1] int32"""
    slots: torch.Tensor
    """[B] int64: whose row it is, the dummy slot of pads"""
    context_lens: torch.Tensor
    """[B] int32: tokens of the row in the pool once this pass has written its own"""
    out_locations: torch.Tensor
    """[T] int64: page * page_size + offset of each token's KV"""
    sample_indices: torch.Tensor
    """[S] int64: tokens whose logits are wanted; in a decode bucket all T, in order"""
    host_query_starts: IntArray
    host_context_lens: IntArray
    tree: TokenTree | None = None
    """None: tokens see all before them, and positions are places. Else positions are texts'."""

    @property
    def num_tokens(self) -> int:
        """Count tokens, pads included."""
        return self.token_ids.shape[0]

    @property
    def num_rows(self) -> int:
        """Count rows, pads included."""
        return self.context_lens.shape[0]

    @property
    def max_context_len(self) -> int:
        """Return the longest row's context_len, read on the host."""
        return int(self.host_context_lens.max())
