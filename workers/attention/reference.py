"""ReferenceAttention: paged attention in plain torch, on CPU and GPU; the oracle of every other backend.

Softmax and both products run in float32. A row's sums do not depend on its neighbours' lengths: a decode row
is padded to a length chosen from its own, an extend row is computed by itself.
"""

from copy import copy
from dataclasses import dataclass, replace

import numpy as np
import torch

from workers.attention.backend import AttentionLayer
from workers.engine.forward_batch import ForwardBatch
from workers.kvcache.kv_pool import KVPool
from workers.plan import Mode

_MIN_PADDED_LEN = 64
"""Of decode rows; a multiple of every page size."""
_MAX_QUERIES = 256
"""Of one row at a time: bounds the scores in memory."""


@dataclass(frozen=True)
class _Rows:
    """Rows of the same number of queries, attended at once: decode rows of one padded length, or part of an
    extend row. Token i of row r is token tokens[r, i] of the batch."""

    tokens: torch.Tensor
    """[rows, queries] int64"""
    pages: torch.Tensor
    """[rows, columns] int64: column c holds positions c * page_size .. (c + 1) * page_size - 1"""
    first_place: torch.Tensor
    """[rows, 1] int64: the place of each row's first query, in a chain its position"""
    tree: "_Nodes | None" = None


@dataclass(frozen=True)
class _Nodes:
    """Of queries [rows, queries] that are a tree's, int64 each."""

    positions: torch.Tensor
    visible: torch.Tensor
    """See TokenTree"""
    first_number: torch.Tensor
    """[rows, 1]: the place of each row's number 0"""


class ReferenceAttention:
    """See AttentionBackend. Holds views of the pool, and the current step's plan."""

    def __init__(self, pool: KVPool) -> None:
        self._page_size = pool.page_size
        self._layers = [pool.layer(index) for index in range(pool.num_layers)]
        self._rows: list[_Rows] = []
        self._masks: dict[int | None, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._write_pages = torch.zeros(0, dtype=torch.int64)
        self._write_offsets = torch.zeros(0, dtype=torch.int64)
        self._late: ForwardBatch | None = None

    captured_modes: frozenset[Mode] = frozenset()

    def plan(self, batch: ForwardBatch) -> None:
        """Choose the groups of rows; masks follow with the first layer of each window."""
        self._write_pages = batch.out_locations // self._page_size
        self._write_offsets = batch.out_locations % self._page_size
        self._masks = {}
        starts = batch.host_query_starts.astype(np.int64)
        lens = np.diff(starts)
        decode_rows = np.flatnonzero(lens == 1)
        padded_lens = _padded_lens(batch.host_context_lens[decode_rows])
        self._rows = [
            self._plan_rows(batch, decode_rows[padded_lens == length], 0, 1, int(length))
            for length in np.unique(padded_lens)
        ]
        for row in np.flatnonzero(lens > 1):
            first_position = int(batch.host_context_lens[row]) - int(lens[row])
            for first in range(0, int(lens[row]), _MAX_QUERIES):
                stop = min(first + _MAX_QUERIES, int(lens[row]))
                self._rows.append(self._plan_rows(batch, np.array([row]), first, stop, first_position + stop))

    def begin(self) -> None:
        """Plan a pass' batch, whose lengths are known by now; else do nothing: `plan` has."""
        if self._late is not None:
            self.plan(replace(self._late, host_context_lens=self._late.context_lens.cpu().numpy()))

    def for_passes(self, batch: ForwardBatch) -> "ReferenceAttention":
        """Return attention for passes over `batch`, whose lengths it waits for."""
        attention = copy(self)
        attention._late = batch
        return attention

    def forward(
        self, layer: AttentionLayer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """See AttentionBackend; the result is a fresh tensor."""
        pool_k, pool_v = self._layers[layer.index]
        self.write(layer, k, v)
        masks = self._masks.get(layer.sliding_window)
        if masks is None:
            masks = [self._mask(rows, layer.sliding_window) for rows in self._rows]
            self._masks[layer.sliding_window] = masks
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for rows, (visible, unseen) in zip(self._rows, masks, strict=True):
            out[rows.tokens] = _attend(layer, q[rows.tokens], pool_k, pool_v, rows.pages, visible, unseen)
        return out.view(q.shape[0], -1)

    def write(self, layer: AttentionLayer, k: torch.Tensor, v: torch.Tensor) -> None:
        """See WritingBackend."""
        pool_k, pool_v = self._layers[layer.index]
        pool_k[self._write_pages, self._write_offsets] = k
        pool_v[self._write_pages, self._write_offsets] = v

    def _plan_rows(
        self, batch: ForwardBatch, rows: np.ndarray, first: int, stop: int, padded_len: int
    ) -> _Rows:
        """Plan queries first .. stop - 1 of `rows` over the row's positions 0 .. padded_len - 1."""
        device = batch.token_ids.device
        tokens = batch.host_query_starts[rows].astype(np.int64)[:, None] + np.arange(first, stop)
        query_lens = np.diff(batch.host_query_starts)[rows]
        first_places = (batch.host_context_lens[rows] - query_lens).astype(np.int64)[:, None]
        num_columns = -(-padded_len // self._page_size)
        pages = batch.page_rows[torch.from_numpy(rows).to(device), :num_columns].long()
        if pages.shape[1] < num_columns:
            pages = torch.nn.functional.pad(pages, (0, num_columns - pages.shape[1]))  # dummy pages
        of_rows = torch.from_numpy(tokens).to(device)
        places = torch.from_numpy(first_places).to(device)
        nodes = None
        if batch.tree is not None:
            first_number = places - batch.tree.num_before
            nodes = _Nodes(batch.positions[of_rows], batch.tree.visible[of_rows], first_number)
        return _Rows(of_rows, pages, places + first, nodes)

    def _mask(self, rows: _Rows, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return visible [rows, queries, keys] and unseen [rows, keys], what no query of the row sees."""
        device = rows.pages.device
        keys = torch.arange(rows.pages.shape[1] * self._page_size, device=device)
        positions = rows.first_place + torch.arange(rows.tokens.shape[1], device=device)
        visible = keys <= positions[:, :, None]
        if rows.tree is not None:
            numbers = (keys - rows.tree.first_number)[:, None]  # [rows, 1, keys]
            sees = rows.tree.visible[:, :, None] >> numbers.clamp(0, 63) & 1 > 0
            visible &= (numbers < 0) | sees & (numbers < 64)
            positions = rows.tree.positions
        if window is not None:
            # Of a tree's places only its root and what is before it may be out of a window.
            visible &= keys > positions[:, :, None] - window
        return visible, ~visible.any(dim=1)


def _attend(
    layer: AttentionLayer,
    q: torch.Tensor,
    pool_k: torch.Tensor,
    pool_v: torch.Tensor,
    pages: torch.Tensor,
    visible: torch.Tensor,
    unseen: torch.Tensor,
) -> torch.Tensor:
    """Return softmax(scale * q k^T + mask) v, like q: [rows, queries, num_heads, head_dim]."""
    num_rows, num_queries = q.shape[:2]
    group_size = layer.num_heads // layer.num_kv_heads
    # [rows, columns, page_size, kv_heads, head_dim] -> [rows, kv_heads, keys, head_dim]
    k = pool_k[pages].flatten(1, 2).transpose(1, 2).float()
    v = pool_v[pages].flatten(1, 2).transpose(1, 2).float()
    # What no query may see can be NaN (poison, freed pages left behind a window), and 0 * NaN is NaN.
    v = v.masked_fill(unseen[:, None, :, None], 0.0)
    # [rows, queries, heads, head_dim] -> [rows, kv_heads, group * queries, head_dim]
    grouped = q.float().view(num_rows, num_queries, layer.num_kv_heads, group_size, layer.head_dim)
    grouped = grouped.permute(0, 2, 3, 1, 4).flatten(2, 3)
    scores = torch.matmul(grouped, k.transpose(2, 3)) * layer.scale
    scores = scores.view(num_rows, layer.num_kv_heads, group_size, num_queries, -1)
    scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
    weights = torch.softmax(scores, dim=-1).flatten(2, 3)
    out = torch.matmul(weights, v).view(num_rows, layer.num_heads, num_queries, layer.head_dim)
    return out.transpose(1, 2).to(q.dtype)


def _padded_lens(context_lens: np.ndarray) -> np.ndarray:
    """Return the power of two >= each length, at least _MIN_PADDED_LEN: a function of the row alone."""
    lens = np.maximum(context_lens.astype(np.int64), _MIN_PADDED_LEN)
    padded: np.ndarray = np.int64(1) << np.ceil(np.log2(lens)).astype(np.int64)
    return padded
