"""write_kv: a pass's keys and values into their places in the pool, in plain torch."""

from collections.abc import Callable

import torch

WriteKV = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Called like write_kv."""


def write_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    out_locations: torch.Tensor,
    pool_k: torch.Tensor,
    pool_v: torch.Tensor,
) -> None:
    """Write k and v [tokens, kv_heads, head_dim] at out_locations [tokens] int64 (page * page_size + offset).

    pool_k and pool_v [pages, page_size, kv_heads, head_dim] of equal strides; places are found in 64 bits.
    """
    page_size = pool_k.shape[1]
    pages, offsets = out_locations // page_size, out_locations % page_size
    pool_k[pages, offsets] = k
    pool_v[pages, offsets] = v
