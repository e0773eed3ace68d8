"""A bundle's checksum vouches for its bytes, its page and its rank."""

import random

import xxhash

from cache_service.arena_format import bundle_checksum
from tests.unit.arenas import key


def test_a_flipped_bit_another_page_or_another_rank_is_noticed():
    bundle = bytearray(random.Random(1).randbytes(4096))
    good = bundle_checksum(bundle, key("a"), 0)
    assert good == bundle_checksum(memoryview(bytes(bundle)), key("a"), 0)
    assert len({good, bundle_checksum(bundle, key("b"), 0), bundle_checksum(bundle, key("a"), 1)}) == 3
    for bit in (0, 777, 8 * 4096 - 1):
        bundle[bit // 8] ^= 1 << bit % 8
        assert bundle_checksum(bundle, key("a"), 0) != good
        bundle[bit // 8] ^= 1 << bit % 8
    assert bundle_checksum(bundle, key("a"), 0) == good


def test_no_checksum_is_zero_which_stands_for_not_written(monkeypatch):
    assert bundle_checksum(b"", b"\xff" * 16, 7) > 0
    monkeypatch.setattr(xxhash, "xxh3_64_intdigest", lambda *_, **__: 0)
    assert bundle_checksum(bytes(64), key("a"), 0) == 1
