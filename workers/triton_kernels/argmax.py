"""greedy_tokens: each row's largest logit, of equal ones the lower id; greedy_keys: with the logit, as a key.

Programs share few rows.
"""

import torch
import triton
import triton.language as tl

from workers.triton_kernels.launching import await_inputs, launch_options, let_next_begin

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BLOCK = 1024
_NUM_PROGRAMS = 528
"""To keep every multiprocessor busy: four for each of an H100's."""

_SMALLEST: tl.constexpr = tl.constexpr(-(1 << 63))


@triton.jit
def _key(value, token_id):
    """Return int64s in the order of the values, and for equal ones against the order of the ids.

    key:  [ order of the float : 32 | 2^32 - 1 - id : 32 ]; NaN comes before all numbers, as in torch.argmax
    """
    bits = (value + 0.0).to(tl.int32, bitcast=True)  # + 0.0: the two zeros are equal
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    order = tl.where(value != value, 0x7FFFFFFF, order)
    return (order.to(tl.int64) << 32) | (0xFFFFFFFF - token_id.to(tl.int64))


@triton.jit(do_not_specialize=["num_parts"])
def _scan_kernel(
    logits,
    keys,
    vocab_size,
    row_stride,
    part_size,
    num_parts,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    stop = tl.minimum((part + 1) * part_size, vocab_size)
    await_inputs(PDL)
    best = tl.full([BLOCK], _SMALLEST, tl.int64)
    start = part * part_size
    while start < stop:
        token_id = start + tl.arange(0, BLOCK)
        value = tl.load(logits + row * row_stride + token_id, mask=token_id < stop, other=0.0).to(tl.float32)
        best = tl.maximum(best, tl.where(token_id < stop, _key(value, token_id), _SMALLEST))
        start += BLOCK
    tl.store(keys + row * num_parts + part, tl.max(best, axis=0))


@triton.jit(do_not_specialize=["num_parts", "first_id"])
def _merge_kernel(
    keys, out, num_parts, first_id, IS_KEY: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    let_next_begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK)
    await_inputs(PDL)
    key = tl.max(tl.load(keys + row * num_parts + part, mask=part < num_parts, other=_SMALLEST), axis=0)
    tl.store(out + row, key - first_id if IS_KEY else 0xFFFFFFFF - (key & 0xFFFFFFFF))


def greedy_tokens(logits: torch.Tensor, *, pdl: bool) -> torch.Tensor:
    """Return argmax [rows] int64 of logits [rows, vocab], float32 or narrower, equal values by the lower id.

    It stays on the device; rows may lie apart. Compiled once for a dtype and vocabulary, not by rows.
    """
    return _best(logits, None, pdl)


def greedy_keys(logits: torch.Tensor, first_id: int, *, pdl: bool) -> torch.Tensor:
    """Return the keys [rows] int64 (see vocabulary_shard.keys_of) of what greedy_tokens finds, in logits of
    the tokens from `first_id` on."""
    return _best(logits, first_id, pdl)


def _best(logits: torch.Tensor, first_id: int | None, pdl: bool) -> torch.Tensor:
    assert logits.dtype in _DTYPES and logits.stride(1) == 1, (logits.dtype, logits.stride())
    rows, vocab_size = logits.shape
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows == 0:
        return out
    num_blocks = triton.cdiv(vocab_size, _BLOCK)
    num_parts = min(triton.cdiv(_NUM_PROGRAMS, rows), num_blocks)
    part_size = triton.cdiv(triton.cdiv(vocab_size, num_parts), _BLOCK) * _BLOCK
    num_parts = triton.cdiv(vocab_size, part_size)
    keys = torch.empty(rows, num_parts, dtype=torch.int64, device=logits.device)
    _scan_kernel[(rows, num_parts)](
        logits,
        keys,
        vocab_size,
        logits.stride(0),
        part_size,
        num_parts,
        BLOCK=_BLOCK,
        PDL=pdl,
        **launch_options(pdl),
    )
    max_parts = triton.next_power_of_2(min(_NUM_PROGRAMS, num_blocks))
    _merge_kernel[(rows,)](
        keys,
        out,
        num_parts,
        first_id or 0,
        IS_KEY=first_id is not None,
        BLOCK=max_parts,
        PDL=pdl,
        **launch_options(pdl),
    )
    return out
