"""Random numbers that are a pure function of (seed, position, purpose, lane): no generator, no state.

The Sampler of rank 0 calls it. The integer arithmetic is exact, so every device, batch and replica that asks
for the same number gets the same one: a request continued elsewhere draws what it would have drawn here.
"""

from enum import IntEnum

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15


class Purpose(IntEnum):
    """What a number is drawn for: two purposes at one position never see the same numbers."""

    SAMPLE = 0


def row_keys(
    seeds: npt.NDArray[np.uint64], positions: npt.NDArray[np.int64], purpose: Purpose
) -> npt.NDArray[np.int32]:
    """Return the key of each row as two signed 32-bit words, [rows, 2].

    SplitMix64 (Steele, Lea, Flood 2014), chained over seed, position and purpose.
    """
    golden = np.uint64(_GOLDEN)
    keys = _mix64(seeds + golden)
    keys = _mix64((keys ^ positions.astype(np.uint64)) + golden)
    keys = _mix64((keys ^ np.uint64(purpose)) + golden)
    return keys.astype("<u8").view("<i4").reshape(-1, 2)


def uniform(keys: Tensor, lanes: Tensor) -> Tensor:
    """Draw numbers in (0, 1), float32, of the shape of `lanes`, for `keys` [rows, 2] int32 of `row_keys`.

    `lanes` [rows or 1, n] int32 numbers the draws of one row (a token id, say). A multiple of 2^-31 plus
    2^-32, so that small values keep their relative precision.
    """
    bits = _mix32(lanes * _signed32(_GOLDEN & 0xFFFFFFFF) + keys[:, :1])
    bits = _mix32(bits.bitwise_xor_(keys[:, 1:]))
    # Rounding to float32 could reach 1.0, whose Gumbel noise is -inf: stay one step below.
    return bits.bitwise_and_(0x7FFFFFFF).to(torch.float32).add_(0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)


def gumbel(keys: Tensor, lanes: Tensor) -> Tensor:
    """Draw standard Gumbel noise, float32, of the shape of `lanes`: argmax(log p + noise) draws from p."""
    # Written with log1p so that the largest noise, which decides, comes from the best resolved uniforms.
    return uniform(keys, lanes).neg_().log1p_().neg_().log_().neg_()


def _mix64(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Apply SplitMix64's finalizer; products of arrays wrap."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _mix32(bits: Tensor) -> Tensor:
    """Apply MurmurHash3's finalizer in place; int32 wraps, and masks make its shifts logical."""
    bits.bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF)).mul_(_signed32(0x85EBCA6B))
    bits.bitwise_xor_((bits >> 13).bitwise_and_(0x7FFFF)).mul_(_signed32(0xC2B2AE35))
    return bits.bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF))


def _signed32(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word
