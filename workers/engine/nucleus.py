"""nucleus: a row's likeliest tokens up to a mass, found by a search for the least likely one's value.

Nothing is sorted and no logits are exchanged: ranks add up how much mass lies at each of 256 digits of the
values, four times, from the highest digit to the lowest. The Sampler's, where it may not wait for the device.
"""

import torch
from torch import Tensor

from workers.engine.vocabulary_shard import VocabularyShard, order_of

MAX_ROWS = 64
"""That are searched at a time: it takes memory."""
TOKEN_BYTES = 52
"""Of that memory, for each token of each row: values, masses, order, digits, products, noise."""

_DIGIT_BITS = 8
_NUM_DIGITS = 1 << _DIGIT_BITS


def nucleus(values: Tensor, masses: Tensor, target: Tensor, shard: VocabularyShard) -> Tensor:
    """Return which tokens are kept, bool like `values` [rows, this rank's tokens] float32: those before
    which, by falling value and then by id, the ranks' tokens have less than `target` [rows, 1] float64 of
    mass.

    `masses` are int64, the same for equal values, and more than `target` in all. All ranks call it together.
    """
    order = order_of(values).to(torch.int64) + (1 << 31)  # [0, 2^32)
    before = torch.zeros_like(target, dtype=torch.int64)  # of all that is larger than what is searched
    lowest = torch.zeros_like(before)
    is_candidate = torch.ones_like(values, dtype=torch.bool)
    for shift in range(32 - _DIGIT_BITS, -1, -_DIGIT_BITS):
        digits = (order >> shift) & (_NUM_DIGITS - 1)
        mass = masses.new_zeros(len(values), _NUM_DIGITS)
        mass = shard.sum(mass.scatter_add_(1, digits, masses * is_candidate))
        above = before + mass.flip(1).cumsum(1).flip(1) - mass  # [rows, digits], falling
        digit = _NUM_DIGITS - (above.double() < target).sum(dim=1, keepdim=True)
        before = above.gather(1, digit)
        lowest = lowest << _DIGIT_BITS | digit
        is_candidate &= digits == digit
    # Candidates are equal now, and the lower id comes first.
    earlier = shard.before(is_candidate.sum(dim=1, keepdim=True)) + is_candidate.cumsum(1) - 1
    is_reached = (before + earlier * masses).double() >= target
    return (order > lowest) | (is_candidate & ~is_reached)
