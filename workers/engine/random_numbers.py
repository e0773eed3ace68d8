"""Random numbers that are a pure function of (seed, position, purpose, lane): no generator, no state.

The Sampler of rank 0 calls it. The integer arithmetic is exact, so every device, batch and replica that asks
for the same number gets the same one: a request continued elsewhere draws what it would have drawn here.
"""

from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_UINT64 = (1 << 64) - 1


class Purpose(IntEnum):
    """What a number is drawn for: two purposes at one position never see the same numbers."""

    SAMPLE = 0


def row_keys(seeds: Sequence[int], positions: Sequence[int], purpose: Purpose) -> list[tuple[int, int]]:
    """Return the key of each row as two signed 32-bit words.

    SplitMix64 (Steele, Lea, Flood 2014), chained over seed, position and purpose. Seeds count modulo 2^64.
    """
    keys = []
    for seed, position in zip(seeds, positions, strict=True):
        key = _mix64(seed + _GOLDEN)
        key = _mix64((key ^ position) + _GOLDEN)
        key = _mix64((key ^ purpose) + _GOLDEN)
        keys.append((_signed32(key & 0xFFFFFFFF), _signed32(key >> 32)))
    return keys


def uniform(keys: Sequence[tuple[int, int]], lanes: Tensor) -> Tensor:
    """Draw numbers in (0, 1), float32, of the shape of `lanes`.

    `lanes` [rows or 1, n] int32 numbers the draws of one row (a token id, say). A multiple of 2^-31 plus
    2^-32, so that small values keep their relative precision.
    """
    words = torch.tensor(keys, dtype=torch.int32).to(lanes.device)  # [rows, 2]
    bits = _mix32(lanes * _signed32(_GOLDEN & 0xFFFFFFFF) + words[:, :1])
    bits = _mix32(bits.bitwise_xor_(words[:, 1:]))
    # Rounding to float32 could reach 1.0, whose Gumbel noise is -inf: stay one step below.
    return bits.bitwise_and_(0x7FFFFFFF).to(torch.float32).add_(0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)


def gumbel(keys: Sequence[tuple[int, int]], lanes: Tensor) -> Tensor:
    """Draw standard Gumbel noise, float32, of the shape of `lanes`: argmax(log p + noise) draws from p."""
    # Written with log1p so that the largest noise, which decides, comes from the best resolved uniforms.
    return uniform(keys, lanes).neg_().log1p_().neg_().log_().neg_()


def _mix64(value: int) -> int:
    value &= _UINT64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _UINT64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _UINT64
    return value ^ (value >> 31)


def _mix32(bits: Tensor) -> Tensor:
    """Apply MurmurHash3's finalizer in place; int32 wraps, and masks make its shifts logical."""
    bits.bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF)).mul_(_signed32(0x85EBCA6B))
    bits.bitwise_xor_((bits >> 13).bitwise_and_(0x7FFFF)).mul_(_signed32(0xC2B2AE35))
    return bits.bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF))


def _signed32(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word
