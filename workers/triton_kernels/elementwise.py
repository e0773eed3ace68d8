"""Norms, activation and rotation: one pass over memory each, computed in float32."""

import torch
import triton
import triton.language as tl

from workers.triton_kernels.launching import await_inputs, launch_options, let_next_begin

_SILU_BLOCK = 1024


@triton.jit
def _norm_kernel(
    x,
    delta,
    weight,
    total,
    out,
    eps,
    size,
    x_stride,
    ADDS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < size
    await_inputs(PDL)
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    wide = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        wide += tl.load(delta + row * size + column, mask=inside, other=0.0).to(tl.float32)
        rounded = wide.to(total.dtype.element_ty)
        tl.store(total + row * size + column, rounded, mask=inside)
        wide = rounded.to(tl.float32)
    # 1.0 / sqrt, not rsqrt: the approximation would round otherwise than torch's
    factor = 1.0 / tl.sqrt_rn(tl.sum(wide * wide, axis=0) / size + eps)
    normal = (wide * factor).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * size + column, normal * scale, mask=inside)


@triton.jit
def _silu_kernel(gate_up, out, size, row_stride, BLOCK: tl.constexpr, PDL: tl.constexpr):
    let_next_begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    await_inputs(PDL)
    gate = tl.load(gate_up + row * row_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * row_stride + size + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * size + column, gate / (1.0 + tl.exp(-gate)) * up, mask=inside)


@triton.jit
def _rotate_kernel(
    heads,
    cos,
    sin,
    num_heads,
    half,
    token_stride,
    head_stride,
    angle_stride,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_begin(PDL)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
    dim = tl.arange(0, BLOCK_HALF)[None, :]
    inside = (head < num_heads) & (dim < half)
    place = heads + token * token_stride + head * head_stride + dim
    await_inputs(PDL)
    c = tl.load(cos + token * angle_stride + dim, mask=dim < half, other=0.0).to(tl.float32)
    s = tl.load(sin + token * angle_stride + dim, mask=dim < half, other=0.0).to(tl.float32)
    first = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(place + half, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, first * c - second * s, mask=inside)
    tl.store(place + half, second * c + first * s, mask=inside)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, pdl: bool) -> torch.Tensor:
    """Return x / rms(x) * weight, x [rows, size] with contiguous rows that may lie apart."""
    if x.stride(1) != 1:
        x = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _norm(x, None, weight, eps, None, out, pdl)
    return out


def add_rms_norm(
    x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float, *, pdl: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x + delta, and that normalised; both [rows, size] contiguous."""
    assert x.is_contiguous() and delta.is_contiguous(), (x.stride(), delta.stride())
    total, out = torch.empty_like(x), torch.empty_like(x)
    _norm(x, delta, weight, eps, total, out, pdl)
    return total, out


def _norm(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    total: torch.Tensor | None,
    out: torch.Tensor,
    pdl: bool,
) -> None:
    rows, size = x.shape
    if rows == 0:
        return
    block = triton.next_power_of_2(size)
    _norm_kernel[(rows,)](
        x,
        delta,
        weight,
        total,
        out,
        eps,
        size,
        x.stride(0),
        ADDS=delta is not None,
        BLOCK=block,
        PDL=pdl,
        num_warps=min(max(block // 512, 1), 16),
        **launch_options(pdl),
    )


def silu_mul(gate_up: torch.Tensor, *, pdl: bool) -> torch.Tensor:
    """Return silu(gate) * up [rows, size] of gate_up [rows, 2 * size] = [ gate | up ]."""
    assert gate_up.stride(1) == 1, gate_up.stride()
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, size, dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        _silu_kernel[(rows, triton.cdiv(size, _SILU_BLOCK))](
            gate_up, out, size, gate_up.stride(0), BLOCK=_SILU_BLOCK, PDL=pdl, **launch_options(pdl)
        )
    return out


def rotate_(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, pdl: bool) -> torch.Tensor:
    """Rotate heads [tokens, heads, dim] in place by cos and sin [tokens, 1, dim / 2] (halves layout)."""
    tokens, num_heads, dim = heads.shape
    assert heads.stride(2) == 1, heads.stride()
    assert cos.stride(0) == sin.stride(0) and cos.stride(2) == sin.stride(2) == 1, (
        cos.stride(),
        sin.stride(),
    )
    if tokens and num_heads:
        block = min(triton.next_power_of_2(num_heads), 8)
        _rotate_kernel[(tokens, triton.cdiv(num_heads, block))](
            heads,
            cos,
            sin,
            num_heads,
            dim // 2,
            heads.stride(0),
            heads.stride(1),
            cos.stride(0),
            BLOCK_HEADS=block,
            BLOCK_HALF=triton.next_power_of_2(dim // 2),
            PDL=pdl,
            **launch_options(pdl),
        )
    return heads
