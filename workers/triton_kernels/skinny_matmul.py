"""skinny_matmul: x W^T for few rows of x, bound by the reading of W. Weights stay as they were loaded.

Each program owns BLOCK_N columns of the result and reads its rows of W once, from end to end, in tiles that
are copied STAGES ahead; the products run on the matrix units, x padded to 8 rows or more. Sums may be divided
among a program's warps, always in the same way, and never among programs: a row's result depends on that row
alone and is the same on every run.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from workers.triton_kernels.launching import await_inputs, launch_options, let_next_begin, prefetch

MAX_ROWS = 64
"""That the kernel takes."""
MAX_FAST_ROWS = 16
"""That it is faster with than torch; more are not measured yet."""

_NUM_MULTIPROCESSORS = 132
"""Of an H100."""

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
    """Warps, each with its part of a tile's depth; 1: four share all of it, for more rows than a few"""
    num_stages: int
    prefetch_lines: int
    """128-byte lines of each row of W to bring closer before the inputs are there; a power of two, or 0"""
    lets_go_late: bool = True
    """The next kernel begins once W is read, not at once: its programs, while they wait, would crowd some
    multiprocessors and leave others without. Small products gain by a begin at once."""


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
    LETS_GO_LATE: tl.constexpr,
    PDL: tl.constexpr,
):
    # W, gated:  rows [ gate: width | up: width ], out [rows, width]; else [ width ]
    # tiles of W [PARTS, BLOCK_N, BLOCK_K / PARTS], of x^T [PARTS, BLOCK_K / PARTS, BLOCK_ROWS]: a product of
    # many small matrices, one for each warp, whose sums are added at the end. With one part: of two matrices
    if not LETS_GO_LATE:
        let_next_begin(PDL)
    PART: tl.constexpr = BLOCK_K // PARTS
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    own = tl.minimum(column, width - 1).to(tl.int64) * weight_stride  # the last program reads no further
    to_up = width.to(tl.int64) * weight_stride
    row = tl.arange(0, BLOCK_ROWS)
    if PARTS == 1:
        w_k = tl.arange(0, PART)[None, :]
        x_k = tl.arange(0, PART)[:, None]
        gate = weight + own[:, None] + w_k
        inputs = x + row[None, :].to(tl.int64) * x_stride + x_k
        is_row = row[None, :] < rows
        sums = tl.zeros([BLOCK_N, BLOCK_ROWS], tl.float32)
        sums_up = tl.zeros([BLOCK_N, BLOCK_ROWS], tl.float32)
    else:
        part = tl.arange(0, PARTS)[:, None, None] * PART
        w_k = part + tl.arange(0, PART)[None, None, :]
        x_k = part + tl.arange(0, PART)[None, :, None]
        gate = weight + own[None, :, None] + w_k
        inputs = x + row[None, None, :].to(tl.int64) * x_stride + x_k
        is_row = row[None, None, :] < rows
        sums = tl.zeros([PARTS, BLOCK_N, BLOCK_ROWS], tl.float32)
        sums_up = tl.zeros([PARTS, BLOCK_N, BLOCK_ROWS], tl.float32)
    up = gate + to_up
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
    if LETS_GO_LATE:
        let_next_begin(PDL)
    total = sums if PARTS == 1 else tl.sum(sums, axis=0)
    total_up = sums_up if PARTS == 1 else tl.sum(sums_up, axis=0)
    if bias is not None:
        total += tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)[:, None]
        if IS_GATED:
            total_up += tl.load(bias + width + column, mask=column < width, other=0.0).to(tl.float32)[:, None]
    if IS_GATED:
        total = total / (1.0 + tl.exp(-total)) * total_up
    place = out + row[None, :].to(tl.int64) * width + column[:, None]
    tl.store(place, total, mask=(row[None, :] < rows) & (column[:, None] < width))


def skinny_config(width: int, depth: int, rows: int, *, is_gated: bool) -> SkinnyConfig | None:
    """Return how a product of `rows` rows with `width` columns (of a gated one: results) is divided.

    None: torch is not slower. From `bench_kernels.py --parts tune` on one H100 80GB HBM3, 2026-11-26, torch
    2.11, Triton 3.6, for Llama-3-8B and SmolLM2-135M: within 1 % of the best way at 1, 8 and 16 rows, but for
    two products of the 135M at 16 (3 and 9 %).
    """
    # Programs of 16 columns with one tile: four find room on a multiprocessor
    fits_in_one_wave = width <= 16 * 4 * _NUM_MULTIPROCESSORS
    if rows > MAX_FAST_ROWS or (depth <= 1024 and not fits_in_one_wave):
        return None
    whole = triton.next_power_of_2(max(depth, 128))
    max_whole = 1024 if is_gated else 2048 if rows <= 8 else 512
    if fits_in_one_wave and whole <= max_whole:
        num_parts = 8 if whole == 2048 else 4
        return SkinnyConfig(16, whole, num_parts, num_stages=1, prefetch_lines=0, lets_go_late=False)
    num_programs = triton.cdiv(width, 32)  # of 32 columns: each takes a whole multiprocessor
    is_even = not _NUM_MULTIPROCESSORS < num_programs < 4 * _NUM_MULTIPROCESSORS  # one wave, or many
    if depth > 2048 and is_even and not is_gated:
        return SkinnyConfig(32, 512, num_parts=4, num_stages=5, prefetch_lines=8)
    num_stages = 3 if depth > 2048 and rows > 8 and not is_gated else 5
    return SkinnyConfig(16, 512, 4, num_stages, prefetch_lines=8, lets_go_late=depth > 2048)


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
        LETS_GO_LATE=config.lets_go_late,
        PDL=pdl,
        num_warps=4 if config.num_parts == 1 else config.num_parts,
        **launch_options(pdl),
    )
    return out
