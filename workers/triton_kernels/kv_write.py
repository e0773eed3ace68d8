"""write_kv and rotate_and_write_kv: a pass's keys and values into their places in the page-major pool.

Called by attention backends, with pool_k and pool_v as KVPool.layer gives them. A place is computed in 64
bits: page index times stride passes 2^32 elements on any real pool.
"""

import torch
import triton
import triton.language as tl

from workers.triton_kernels.launching import await_inputs, launch_options, let_next_begin

_MAX_BLOCK_HEADS = 8


@triton.jit
def _place_in_pool(locations, token, page_stride, token_stride, PAGE_SIZE: tl.constexpr):
    """Return the first element of a token's place: location = page * PAGE_SIZE + offset, int64."""
    location = tl.load(locations + token)
    return location // PAGE_SIZE * page_stride + location % PAGE_SIZE * token_stride


@triton.jit
def _write_kernel(
    k,
    v,
    locations,
    pool_k,
    pool_v,
    num_heads,
    head_dim,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    page_stride,
    token_stride,
    head_stride,
    PAGE_SIZE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_begin(PDL)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
    dim = tl.arange(0, BLOCK_DIM)[None, :]
    inside = (head < num_heads) & (dim < head_dim)
    await_inputs(PDL)
    place = _place_in_pool(locations, token, page_stride, token_stride, PAGE_SIZE) + head * head_stride + dim
    keys = tl.load(k + token * k_token_stride + head * k_head_stride + dim, mask=inside)
    values = tl.load(v + token * v_token_stride + head * v_head_stride + dim, mask=inside)
    tl.store(pool_k + place, keys, mask=inside)
    tl.store(pool_v + place, values, mask=inside)


@triton.jit
def _rotate_and_write_kernel(
    q,
    k,
    v,
    cos,
    sin,
    locations,
    pool_k,
    pool_v,
    num_q_heads,
    num_kv_heads,
    half,
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    angle_stride,
    page_stride,
    token_stride,
    head_stride,
    PAGE_SIZE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    PDL: tl.constexpr,
):
    # program_id(1):  | blocks of q heads | blocks of kv heads |
    let_next_begin(PDL)
    token = tl.program_id(0).to(tl.int64)
    num_q_blocks = tl.cdiv(num_q_heads, BLOCK_HEADS)
    dim = tl.arange(0, BLOCK_HALF)[None, :]
    in_half = dim < half
    await_inputs(PDL)
    c = tl.load(cos + token * angle_stride + dim, mask=in_half, other=0.0).to(tl.float32)
    s = tl.load(sin + token * angle_stride + dim, mask=in_half, other=0.0).to(tl.float32)
    if tl.program_id(1) < num_q_blocks:
        head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
        inside = (head < num_q_heads) & in_half
        source = q + token * q_token_stride + head * q_head_stride + dim
        first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
        tl.store(source, first * c - second * s, mask=inside)
        tl.store(source + half, second * c + first * s, mask=inside)
    else:
        head = (tl.program_id(1) - num_q_blocks) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
        inside = (head < num_kv_heads) & in_half
        keys = k + token * k_token_stride + head * k_head_stride + dim
        values = v + token * v_token_stride + head * v_head_stride + dim
        first = tl.load(keys, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(keys + half, mask=inside, other=0.0).to(tl.float32)
        value_first = tl.load(values, mask=inside)
        value_second = tl.load(values + half, mask=inside)
        place = (
            _place_in_pool(locations, token, page_stride, token_stride, PAGE_SIZE) + head * head_stride + dim
        )
        tl.store(pool_k + place, first * c - second * s, mask=inside)
        tl.store(pool_k + place + half, second * c + first * s, mask=inside)
        tl.store(pool_v + place, value_first, mask=inside)
        tl.store(pool_v + place + half, value_second, mask=inside)


def write_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    out_locations: torch.Tensor,
    pool_k: torch.Tensor,
    pool_v: torch.Tensor,
    *,
    pdl: bool,
) -> None:
    """Write k and v [tokens, kv_heads, head_dim] at out_locations [tokens] int64 (page * page_size + offset).

    pool_k and pool_v [pages, page_size, kv_heads, head_dim] of equal strides. Locations are not checked.
    """
    tokens, num_heads, head_dim = k.shape
    if tokens == 0:
        return
    page_stride, token_stride, head_stride = _pool_strides(pool_k, pool_v, out_locations)
    assert k.stride(2) == v.stride(2) == 1, (k.stride(), v.stride())
    block = min(triton.next_power_of_2(num_heads), _MAX_BLOCK_HEADS)
    _write_kernel[(tokens, triton.cdiv(num_heads, block))](
        k,
        v,
        out_locations,
        pool_k,
        pool_v,
        num_heads,
        head_dim,
        *k.stride()[:2],
        *v.stride()[:2],
        page_stride,
        token_stride,
        head_stride,
        PAGE_SIZE=pool_k.shape[1],
        BLOCK_HEADS=block,
        BLOCK_DIM=triton.next_power_of_2(head_dim),
        PDL=pdl,
        **launch_options(pdl),
    )


def rotate_and_write_kv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    out_locations: torch.Tensor,
    pool_k: torch.Tensor,
    pool_v: torch.Tensor,
    *,
    pdl: bool,
) -> None:
    """As rotate_ of q and k, then write_kv, in one launch. q is rotated in place, k on its way to the pool.

    q [tokens, heads, head_dim]; cos and sin [tokens, 1, head_dim / 2]; the others as for write_kv.
    """
    tokens, num_kv_heads, head_dim = k.shape
    if tokens == 0:
        return
    page_stride, token_stride, head_stride = _pool_strides(pool_k, pool_v, out_locations)
    assert q.stride(2) == k.stride(2) == v.stride(2) == 1, (q.stride(), k.stride(), v.stride())
    assert cos.stride(0) == sin.stride(0) and cos.stride(2) == sin.stride(2) == 1, (
        cos.stride(),
        sin.stride(),
    )
    block = min(triton.next_power_of_2(num_kv_heads), _MAX_BLOCK_HEADS)
    num_blocks = triton.cdiv(q.shape[1], block) + triton.cdiv(num_kv_heads, block)
    _rotate_and_write_kernel[(tokens, num_blocks)](
        q,
        k,
        v,
        cos,
        sin,
        out_locations,
        pool_k,
        pool_v,
        q.shape[1],
        num_kv_heads,
        head_dim // 2,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        cos.stride(0),
        page_stride,
        token_stride,
        head_stride,
        PAGE_SIZE=pool_k.shape[1],
        BLOCK_HEADS=block,
        BLOCK_HALF=triton.next_power_of_2(head_dim // 2),
        PDL=pdl,
        **launch_options(pdl),
    )


def _pool_strides(pool_k: torch.Tensor, pool_v: torch.Tensor, out_locations: torch.Tensor) -> tuple[int, ...]:
    assert pool_k.stride() == pool_v.stride() and pool_k.stride(3) == 1, (pool_k.stride(), pool_v.stride())
    assert out_locations.dtype == torch.int64 and out_locations.is_contiguous(), out_locations.dtype
    return pool_k.stride()[:3]
