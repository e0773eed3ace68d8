"""PoolKernels: what a pass does with pages beside attending: finds those of its rows, writes to some."""

from typing import Protocol

import torch

from workers.layers.rotary import rotate


class PoolKernels(Protocol):
    """Implemented by workers.triton_kernels, and in torch by TorchPoolKernels.

    k, v [tokens, kv_heads, head_dim] go to out_locations [tokens] int64 (page * page_size + offset) of
    pool_k, pool_v [pages, page_size, kv_heads, head_dim], of equal strides. Places are found in 64 bits.
    """

    def line_up_pages(
        self,
        page_rows: torch.Tensor,
        num_columns: torch.Tensor,
        max_columns: int,
        context_lens: torch.Tensor,
        page_size: int,
        starts: torch.Tensor,
        pages: torch.Tensor,
        last_page_lens: torch.Tensor,
    ) -> None:
        """Write to the last three, which are a RowPages', the pages that hold context_lens [B] tokens of
        page_rows [B, C]. All int32.

        In a captured graph C is what num_columns [1] holds when it is replayed, max_columns at most.
        """

    def pack_tree(
        self,
        visible: torch.Tensor,
        query_starts: torch.Tensor,
        context_lens: torch.Tensor,
        num_before: int,
        bits: torch.Tensor,
        row_bytes: int,
    ) -> None:
        """Write a TreeMask's bits from a TokenTree's words; rows that do not fit, of pads, are left out."""

    def write_kv(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        out_locations: torch.Tensor,
        pool_k: torch.Tensor,
        pool_v: torch.Tensor,
    ) -> None:
        """Write k and v."""

    def rotate_and_write_kv(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        out_locations: torch.Tensor,
        pool_k: torch.Tensor,
        pool_v: torch.Tensor,
    ) -> None:
        """Rotate q [tokens, heads, head_dim] in place by cos and sin, write k so rotated, and v."""


class TorchPoolKernels:
    """In plain torch."""

    def line_up_pages(
        self,
        page_rows: torch.Tensor,
        num_columns: torch.Tensor,
        max_columns: int,
        context_lens: torch.Tensor,
        page_size: int,
        starts: torch.Tensor,
        pages: torch.Tensor,
        last_page_lens: torch.Tensor,
    ) -> None:
        """See PoolKernels; C is the shape's, captured or not."""
        num_pages = (context_lens + (page_size - 1)) // page_size
        starts[1:] = num_pages.cumsum(0)
        last_page_lens.copy_(context_lens - (num_pages - 1) * page_size)
        columns = torch.arange(page_rows.shape[1], dtype=torch.int64, device=page_rows.device)
        places = starts[:-1, None] + columns
        places.masked_fill_(columns >= num_pages[:, None], pages.shape[0] - 1)
        pages.scatter_(0, places.view(-1), page_rows.reshape(-1))

    def pack_tree(
        self,
        visible: torch.Tensor,
        query_starts: torch.Tensor,
        context_lens: torch.Tensor,
        num_before: int,
        bits: torch.Tensor,
        row_bytes: int,
    ) -> None:
        """See PoolKernels."""
        num_rows = context_lens.shape[0]
        bit = torch.arange(row_bytes * 8, device=bits.device)
        num_tokens = query_starts[1:] - query_starts[:-1]
        num_bits = (num_tokens.long() * context_lens)[:, None]
        lens = context_lens.long().clamp_min(1)[:, None]
        token = (bit // lens + query_starts[:-1, None]).clamp_max(len(visible) - 1)
        number = bit % lens - (context_lens - num_tokens - num_before)[:, None]
        is_seen = (number < 0) | (number < 64) & (visible[token] >> number.clamp(0, 63) & 1 > 0)
        is_seen &= (bit < num_bits) & (num_bits <= row_bytes * 8)
        powers = 1 << torch.arange(8, dtype=torch.uint8, device=bits.device)
        packed = (is_seen.view(num_rows, row_bytes, 8) * powers).sum(dim=2, dtype=torch.uint8)
        bits[: num_rows * row_bytes].copy_(packed.view(-1))

    def write_kv(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        out_locations: torch.Tensor,
        pool_k: torch.Tensor,
        pool_v: torch.Tensor,
    ) -> None:
        """See PoolKernels."""
        page_size = pool_k.shape[1]
        pages, offsets = out_locations // page_size, out_locations % page_size
        pool_k[pages, offsets] = k
        pool_v[pages, offsets] = v

    def rotate_and_write_kv(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        out_locations: torch.Tensor,
        pool_k: torch.Tensor,
        pool_v: torch.Tensor,
    ) -> None:
        """See PoolKernels."""
        q.copy_(rotate(q, cos, sin))
        self.write_kv(rotate(k, cos, sin), v, out_locations, pool_k, pool_v)
