"""skinny_matmul: x W^T for few rows of x, bound by the reading of W. Weights stay as they were loaded.

Each program owns BLOCK_N columns of the result and reads its rows of W once, from end to end, in tiles that
are copied STAGES ahead; the products run on the matrix units, x padded to 8 rows or more. Sums are divided
among a program's warps, always in the same way, and never among programs: a row's result depends on that row
alone and is the same on every run.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from workers.triton_kernels.launching import await_inputs, launch_options, let_next_begin, prefetch

MAX_ROWS = 32
"""That the kernel takes."""

_LINE_ELEMENTS: tl.constexpr = tl.constexpr(64)
"""Of 2 bytes each in a line of the second-level cache."""


@dataclass(frozen=True)
class SkinnyConfig:
    """How a product is divided among programs, and a tile's depth among the warps of each."""

    block_n: int
    """Columns of a program: rows of W"""
    block_k: int
    """Depth of a tile"""
    num_parts: int
    """Warps, each with its part of a tile's depth"""
    num_stages: int
    prefetch_lines: int
    """128-byte lines of each row of W to bring closer before the inputs are there; a power of two, or 0"""


@triton.jit(do_not_specialize=["rows", "width"])
def _skinny_kernel(
    x,
    weight,
    bias,
    out,
    rows,
    width,
    x_stride,
    weight_stride,
    DEPTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
    PREFETCH_LINES: tl.constexpr,
    IS_GATED: tl.constexpr,
    PDL: tl.constexpr,
):
    # W, gated:  rows [ gate: width | up: width ], out [rows, width]; else [ width ]
    # tiles of W [PARTS, BLOCK_N, BLOCK_K / PARTS], of x^T [PARTS, BLOCK_K / PARTS, BLOCK_ROWS]: a product of
    # many small matrices, one for each warp, whose sums are added at the end
    let_next_begin(PDL)
    PART: tl.constexpr = BLOCK_K // PARTS
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    own = tl.minimum(column, width - 1).to(tl.int64) * weight_stride  # the last program reads no further
    to_up = width.to(tl.int64) * weight_stride
    part = tl.arange(0, PARTS)[:, None, None] * PART
    w_k = part + tl.arange(0, PART)[None, None, :]
    x_k = part + tl.arange(0, PART)[None, :, None]
    row = tl.arange(0, BLOCK_ROWS)
    gate = weight + own[None, :, None] + w_k
    up = gate + to_up
    inputs = x + row[None, None, :].to(tl.int64) * x_stride + x_k
    is_row = row[None, None, :] < rows
    sums = tl.zeros([PARTS, BLOCK_N, BLOCK_ROWS], tl.float32)
    sums_up = tl.zeros([PARTS, BLOCK_N, BLOCK_ROWS], tl.float32)
    if DEPTH <= BLOCK_K:  # all that the program reads of W is on its way before the inputs are there
        tile = tl.load(gate, mask=w_k < DEPTH, other=0.0)
        if IS_GATED:
            tile_up = tl.load(up, mask=w_k < DEPTH, other=0.0)
        await_inputs(PDL)
        inputs_tile = tl.load(inputs, mask=is_row & (x_k < DEPTH), other=0.0)
        sums = tl.dot(tile, inputs_tile, sums)
        if IS_GATED:
            sums_up = tl.dot(tile_up, inputs_tile, sums_up)
    else:
        if PDL and PREFETCH_LINES > 0:
            line = weight + own[:, None] + tl.arange(0, PREFETCH_LINES)[None, :] * _LINE_ELEMENTS
            prefetch(line)
            if IS_GATED:
                prefetch(line + to_up)
        await_inputs(PDL)
        for start in tl.range(0, DEPTH, BLOCK_K, num_stages=STAGES):
            if DEPTH % BLOCK_K == 0:
                inputs_tile = tl.load(inputs + start, mask=is_row, other=0.0)
                tile = tl.load(gate + start)
            else:
                inputs_tile = tl.load(inputs + start, mask=is_row & (x_k < DEPTH - start), other=0.0)
                tile = tl.load(gate + start, mask=w_k < DEPTH - start, other=0.0)
            sums = tl.dot(tile, inputs_tile, sums)
            if IS_GATED:
                if DEPTH % BLOCK_K == 0:
                    tile_up = tl.load(up + start)
                else:
                    tile_up = tl.load(up + start, mask=w_k < DEPTH - start, other=0.0)
                sums_up = tl.dot(tile_up, inputs_tile, sums_up)
    total = tl.sum(sums, axis=0)
    total_up = tl.sum(sums_up, axis=0)
    if bias is not None:
        total += tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)[:, None]
        if IS_GATED:
            total_up += tl.load(bias + width + column, mask=column < width, other=0.0).to(tl.float32)[:, None]
    if IS_GATED:
        total = total / (1.0 + tl.exp(-total)) * total_up
    place = out + row[None, :].to(tl.int64) * width + column[:, None]
    tl.store(place, total, mask=(row[None, :] < rows) & (column[:, None] < width))


def skinny_config(width: int, depth: int, rows: int, *, is_gated: bool) -> SkinnyConfig:
    """Return how a product of `rows` rows with `width` columns (of a gated one: results) is divided."""
    if depth <= 2048:
        whole = triton.next_power_of_2(max(depth, 128))
        return SkinnyConfig(16, whole, num_parts=8 if whole == 2048 else 4, num_stages=1, prefetch_lines=0)
    block_n = 32 if rows > 4 and width >= 32 * 264 else 16
    num_stages = 4 if is_gated or block_n == 32 else 5
    return SkinnyConfig(block_n, 256, num_parts=4, num_stages=num_stages, prefetch_lines=8)


def skinny_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    config: SkinnyConfig,
    *,
    is_gated: bool,
    pdl: bool,
) -> torch.Tensor:
    """Return x W^T (+ bias) of x [rows <= MAX_ROWS, depth] and weight [width, depth], in x's dtype.

    Gated: weight [2 * width, depth] = [ gate | up ]; the result is silu(x gate^T) * (x up^T) [rows, width].
    """
    if x.stride(1) != 1:
        x = x.contiguous()
    assert weight.stride(1) == 1, weight.stride()
    rows, depth = x.shape
    assert rows <= MAX_ROWS, rows
    width = weight.shape[0] // 2 if is_gated else weight.shape[0]
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    if rows == 0:
        return out
    lines = config.prefetch_lines if 64 * config.prefetch_lines <= depth else 0
    _skinny_kernel[(triton.cdiv(width, config.block_n),)](
        x,
        weight,
        bias,
        out,
        rows,
        width,
        x.stride(0),
        weight.stride(0),
        DEPTH=depth,
        BLOCK_ROWS=max(8, triton.next_power_of_2(rows)),
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        PARTS=config.num_parts,
        STAGES=config.num_stages,
        PREFETCH_LINES=lines,
        IS_GATED=is_gated,
        PDL=pdl,
        num_warps=config.num_parts,
        **launch_options(pdl),
    )
    return out
