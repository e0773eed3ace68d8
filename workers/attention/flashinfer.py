"""FlashInferAttention: paged attention by FlashInfer's kernels, on CUDA in float16 and bfloat16.

Rows of one token and rows of more are planned apart: in a mixed step the first need their contexts divided
among the processors, the others do not. Engine's thread.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

import numpy as np
import torch

from workers.attention.backend import AttentionLayer
from workers.attention.flashinfer_kernels import (
    HostRows,
    KernelLibrary,
    PagedKernels,
    PlanLimits,
)
from workers.attention.planned_rows import (
    captured_rows,
    max_long_rows,
    num_verified_rows,
    rows_between,
    verified_rows,
)
from workers.attention.planner import PlannedPart, Planner
from workers.attention.pool_kernels import PoolKernels, TorchPoolKernels
from workers.attention.row_pages import RowPages, host_page_starts
from workers.attention.tree_mask import TreeMask, row_bytes
from workers.engine.copies import CopyStream
from workers.engine.forward_batch import ForwardBatch, IntArray
from workers.engine.graph_guard import Bucket
from workers.engine.mechanisms import ALL_ON, Mechanisms
from workers.kvcache.kv_pool import KVPool
from workers.plan import Mode

MAX_SHORT_LEN = 16
"""Tokens. A batch without longer rows is left to the kernels for short rows, whose tiles hold no more."""


@dataclass(frozen=True)
class _Planners:
    """For one window: of a batch's short rows and, in mixed batches, its long ones."""

    short: Planner
    long: Planner | None


@dataclass(frozen=True)
class _BucketState:
    """What a captured graph reads and writes beside its static inputs."""

    pages: RowPages
    planners: dict[int | None, _Planners]
    out: torch.Tensor | None
    """Of a bucket whose pad tokens no kernel writes: they keep what they have, zeros at first"""
    mask: TreeMask | None


class FlashInferAttention:
    """See AttentionBackend. All `layers` have one shape; at most two windows among them.

    `max_rows` and `max_tokens` are the most of any batch, pads included; `max_verified` the tokens of the
    largest verify bucket.
    """

    def __init__(
        self,
        pool: KVPool,
        layers: Sequence[AttentionLayer],
        library: KernelLibrary,
        copies: CopyStream,
        *,
        max_rows: int,
        max_tokens: int,
        max_verified: int = 0,
        mechanisms: Mechanisms = ALL_ON,
        pool_kernels: PoolKernels | None = None,
        max_tree_tokens: int = 0,
    ) -> None:
        """`max_tree_tokens`: of a row that ends in a tree."""
        self._max_rows, self._max_tree_tokens = max_rows, max_tree_tokens
        self._pool = pool
        self._copies = copies
        self._is_ring = mechanisms.rings_staging
        self._pool_kernels = pool_kernels or TorchPoolKernels()
        self._out_shape = (layers[0].num_heads, layers[0].head_dim)
        windows = sorted({layer.sliding_window for layer in layers}, key=lambda window: window or 0)
        self._short = {window: library.short(window) for window in windows}
        self._long = {window: library.long(window) for window in windows}
        self._floats = self._float_workspace(max_rows, max_tokens, max_verified)
        limits = PlanLimits(max_rows, max_tokens, is_captured=False)
        self._eager = self._make_planners(limits, limits, always_has_rows=True)
        self._buckets: dict[Bucket, _BucketState] = {}
        self._pass_pages: dict[tuple[int, int], RowPages] = {}
        self._mask_bits = self._floats.new_empty(0)
        """Of all trees' masks: one pass after another uses it."""
        # The current pass:
        self._batch: ForwardBatch | None = None
        self._pages: RowPages | None = None
        self._out: torch.Tensor | None = None
        self._mask: TreeMask | None = None
        self._parts: dict[int | None, list[PlannedPart]] = {}

    @property
    def captured_modes(self) -> frozenset[Mode]:
        """Decode and verify; extend and mixed where there are kernels for long rows, which write in place."""
        if any(kernels is None for kernels in self._long.values()):
            return frozenset({"decode", "verify"})
        return frozenset({"decode", "verify", "extend", "mixed"})

    def plan(self, batch: ForwardBatch) -> None:
        """Plan every window's parts on the host; nothing waits for the device."""
        self._batch = batch
        page_starts = host_page_starts(batch, self._pool.page_size)
        if batch.bucket is None:
            self._pages, self._out, self._mask = _room_for_pages(batch), None, self._room_for_mask(batch)
            short, long = self._eager_rows(batch, page_starts)
            planners = self._eager
        else:
            state = self._buckets.get(batch.bucket)
            if state is None:
                state = self._buckets[batch.bucket] = self._make_bucket(batch)
            self._pages, self._out, planners = state.pages, state.out, state.planners
            self._mask = state.mask
            if batch.bucket.mode == "decode":
                short, long = rows_between(batch, page_starts, 0, batch.num_rows), None
            elif batch.bucket.mode == "verify":
                short, long = verified_rows(batch, page_starts), None
            else:
                short, long = captured_rows(batch, page_starts)
        self._parts = {window: _plan_parts(of_window, short, long) for window, of_window in planners.items()}

    def for_passes(self, batch: ForwardBatch) -> "FlashInferAttention":
        """Return attention that is planned for all passes over `batch`, rows of few tokens whose contexts the
        device alone knows: none of these is divided among blocks of threads."""
        num_rows = batch.num_rows
        rows = HostRows(
            query_starts=batch.host_query_starts,
            page_starts=np.arange(num_rows + 1, dtype=np.int32),
            context_lens=batch.host_context_lens,
            num_tokens=batch.num_tokens,
            is_captured=False,
            is_causal=batch.tree is None,
        )
        limits = PlanLimits(num_rows, batch.num_tokens, is_captured=False)
        planners = self._make_planners(limits, None, always_has_rows=True)
        attention = copy(self)
        # Each pass lines up its own pages when it begins: passes of one shape need room once.
        shape = (num_rows, batch.max_columns)
        if shape not in self._pass_pages:
            self._pass_pages[shape] = _room_for_pages(batch)
        attention._batch, attention._pages, attention._out = batch, self._pass_pages[shape], None
        attention._mask = self._room_for_mask(batch)
        attention._parts = {
            window: [of_window.short.plan_whole(rows)] for window, of_window in planners.items()
        }
        return attention

    def begin(self) -> None:
        """Put the rows' pages one behind the other."""
        batch, pages = self._batch, self._pages
        assert batch is not None and pages is not None, "no batch is planned"
        self._pool_kernels.line_up_pages(
            batch.page_rows,
            batch.num_columns,
            batch.max_columns,
            batch.context_lens,
            self._pool.page_size,
            pages.starts,
            pages.pages,
            pages.last_page_lens,
        )
        if batch.tree is not None:
            assert self._mask is not None, "no mask is planned"
            self._pool_kernels.pack_tree(
                batch.tree.visible,
                batch.query_starts,
                batch.context_lens,
                batch.tree.num_before,
                self._mask.bits,
                self._mask.row_bytes,
            )

    def forward(
        self, layer: AttentionLayer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """See AttentionBackend; the result is a fresh tensor, or a mixed bucket's own."""
        self.write(layer, k, v)
        return self._attend(layer, q)

    def write(self, layer: AttentionLayer, k: torch.Tensor, v: torch.Tensor) -> None:
        """See WritingBackend."""
        assert self._batch is not None, "no batch is planned"
        self._pool_kernels.write_kv(k, v, self._batch.out_locations, *self._pool.layer(layer.index))

    def forward_unrotated(
        self,
        layer: AttentionLayer,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> torch.Tensor:
        """As forward for q and k before RoPE; q is rotated in place."""
        assert self._batch is not None, "no batch is planned"
        pool = self._pool.layer(layer.index)
        self._pool_kernels.rotate_and_write_kv(q, k, v, cos, sin, self._batch.out_locations, *pool)
        return self._attend(layer, q)

    def _attend(self, layer: AttentionLayer, q: torch.Tensor) -> torch.Tensor:
        batch, pages, pool = self._batch, self._pages, self._pool.layer(layer.index)
        assert batch is not None and pages is not None, "no batch is planned"
        out = self._out
        if out is None:
            out = torch.empty((q.shape[0], *self._out_shape), dtype=q.dtype, device=q.device)
        for part in self._parts[layer.sliding_window]:
            part.kernels.run(
                part.info,
                part.memory,
                q,
                pool,
                batch.query_starts,
                pages,
                layer.scale,
                out,
                overlaps=part.overlaps,
                mask=self._mask,
            )
        return out.view(q.shape[0], -1)

    def _eager_rows(
        self, batch: ForwardBatch, page_starts: IntArray
    ) -> tuple[HostRows | None, HostRows | None]:
        """Divide rows: one token each come first. All are short where no kernels are for long ones, or can
        read a tree's mask."""
        lens = np.diff(batch.host_query_starts)
        num_rows = batch.num_rows
        if batch.tree is not None or None in self._long.values() or int(lens.max()) <= MAX_SHORT_LEN:
            return rows_between(batch, page_starts, 0, num_rows), None
        num_short = int((lens == 1).sum())
        short = rows_between(batch, page_starts, 0, num_short) if num_short else None
        return short, rows_between(batch, page_starts, num_short, num_rows)

    def _make_bucket(self, batch: ForwardBatch) -> _BucketState:
        assert batch.bucket is not None
        size, mode = batch.bucket.size, batch.bucket.mode
        is_mixed = mode == "mixed"
        num_short = batch.num_rows - 1 if is_mixed else size
        short = PlanLimits(num_short, num_short, is_captured=True)
        if mode == "verify":
            short = PlanLimits(num_verified_rows(batch), size, is_captured=True)
        long = PlanLimits(max_long_rows(batch), size, is_captured=True) if is_mixed else None
        dtype, device = self._pool.layer(0)[0].dtype, batch.page_rows.device
        has_pads = is_mixed or batch.tree is not None
        return _BucketState(
            pages=_room_for_pages(batch),
            planners=self._make_planners(short, long, always_has_rows=not is_mixed),
            out=None if not has_pads else torch.zeros((size, *self._out_shape), dtype=dtype, device=device),
            mask=self._room_for_mask(batch),
        )

    def _room_for_mask(self, batch: ForwardBatch) -> TreeMask | None:
        """Return room for what a batch's trees see, of rows as long as the table's."""
        if batch.tree is None:
            return None
        assert self._max_tree_tokens, "trees were not announced"
        of_row = row_bytes(self._max_tree_tokens, batch.max_columns * self._pool.page_size)
        num_bytes = max(batch.num_rows, self._max_rows) * of_row
        if len(self._mask_bits) < num_bytes:
            self._mask_bits = self._mask_bits.new_empty(num_bytes)
        return TreeMask.room(batch.num_rows, of_row, self._mask_bits)

    def _make_planners(
        self, short: PlanLimits, long: PlanLimits | None, *, always_has_rows: bool
    ) -> dict[int | None, _Planners]:
        def planner(kernels: PagedKernels, limits: PlanLimits) -> Planner:
            return Planner(
                kernels,
                limits,
                self._floats,
                self._copies,
                always_has_rows=always_has_rows,
                is_ring=self._is_ring,
            )

        found = {}
        for window, kernels in self._short.items():
            long_kernels = self._long[window]
            found[window] = _Planners(
                planner(kernels, short),
                planner(long_kernels, long) if long is not None and long_kernels is not None else None,
            )
        return found

    def _float_workspace(self, max_rows: int, max_tokens: int, max_verified: int) -> torch.Tensor:
        """Return room for partial results; one pass after another uses it."""
        limits = [
            # More rows of one token take more than fewer of many; a bucket that verifies is planned as such.
            PlanLimits(max(max_rows, max_verified), max(max_rows, max_verified), is_captured=True),
            PlanLimits(max_rows, max_tokens, is_captured=False),
        ]
        kernels = [*self._short.values(), *(found for found in self._long.values() if found is not None)]
        num_bytes = max(each.float_bytes(limit) for each in kernels for limit in limits)
        return torch.empty(max(num_bytes, 1), dtype=torch.uint8, device=self._pool.layer(0)[0].device)


def _room_for_pages(batch: ForwardBatch) -> RowPages:
    return RowPages.room(batch.num_rows, batch.max_columns, batch.page_rows.device)


def _plan_parts(planners: _Planners, short: HostRows | None, long: HostRows | None) -> list[PlannedPart]:
    parts = [] if short is None else [planners.short.plan(short)]
    if long is not None:
        assert planners.long is not None, "no kernels for long rows"
        parts.append(planners.long.plan(long))
    return parts
