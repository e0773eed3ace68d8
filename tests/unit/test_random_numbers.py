"""The keys of random numbers are SplitMix64's, in plain integers."""

import numpy as np

from workers.engine.random_numbers import Purpose, row_keys

GOLDEN, MODULUS = 0x9E3779B97F4A7C15, 1 << 64


def mixed(value):
    value %= MODULUS
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % MODULUS
    value = (value ^ value >> 27) * 0x94D049BB133111EB % MODULUS
    return value ^ value >> 31


def test_keys_are_chained_over_seed_position_and_purpose():
    seeds = [0, 1, 5, 2**63, 2**64 - 1, 12345678901234567890]
    positions = [0, 1, 131_071, 7, 2**31, 3]
    words = row_keys(np.array(seeds, dtype=np.uint64), np.array(positions), Purpose.SAMPLE)
    for seed, position, found in zip(seeds, positions, words.astype(np.uint32).tolist(), strict=True):
        key = 0
        for part in (seed, position, Purpose.SAMPLE):
            key = mixed((key ^ part) + GOLDEN)
        assert found == [key % 2**32, key >> 32]


def test_a_negative_seed_is_one_modulo_2_to_the_64():
    """Pinned, so that no release draws otherwise than the last: a text goes on where it broke off."""
    keys = row_keys(np.array([-1 % MODULUS, 7], dtype=np.uint64), np.array([100_000, 5]), Purpose.SAMPLE)
    assert keys.tolist()[0] == [-16730340, 2118406003]
