"""What Mooncake's answers to a get mean: which pages are bad, and whose buffers may be written late."""

import pytest

from cache_service.mooncake_client import MooncakeClient
from cache_service.mooncake_library import MooncakeOptions
from cache_service.remote import RECORD_HEADER_BYTES, GetStatus, PageBuffer, RemoteStats
from tests.unit.page_contract import LAYOUT, key_of

RECORD_BYTES = RECORD_HEADER_BYTES + LAYOUT.slot_bytes
NOT_FOUND, TRANSFER_FAILED, UNKNOWN = -704, -800, -1_234


class FakeMooncake:
    """Answers every get, and every question for a record's size, with the same code."""

    def __init__(self, code, size):
        self.code, self.size = code, size
        self.removed = []

    def batch_get_into_multi_buffers(self, names, parts, sizes):
        return [self.code] * len(names)

    def get_size(self, name):
        return self.size

    def batch_remove(self, names, is_forced):
        self.removed += names
        return [0] * len(names)


@pytest.mark.parametrize(
    ("code", "size", "expected"),
    [
        (NOT_FOUND, NOT_FOUND, (GetStatus.MISSING, True)),
        (TRANSFER_FAILED, RECORD_BYTES - 1, (GetStatus.CORRUPT, True)),
        (RECORD_BYTES - 1, RECORD_BYTES - 1, (GetStatus.CORRUPT, True)),
        (TRANSFER_FAILED, RECORD_BYTES, (GetStatus.FAILED, False)),
        (TRANSFER_FAILED, RECORD_BYTES + 1, (GetStatus.FAILED, False)),
        (TRANSFER_FAILED, NOT_FOUND, (GetStatus.FAILED, False)),
        (TRANSFER_FAILED, UNKNOWN, (GetStatus.FAILED, False)),
        (TRANSFER_FAILED, 0, (GetStatus.FAILED, False)),
        (UNKNOWN, UNKNOWN, (GetStatus.FAILED, False)),
    ],
)
def test_only_a_record_known_to_be_too_short_is_bad_and_was_never_sent(code, size, expected):
    memory = memoryview(bytearray(LAYOUT.slot_bytes))
    client = MooncakeClient("master:1", LAYOUT, memory, MooncakeOptions("127.0.0.1"), RemoteStats())
    client._store = mooncake = FakeMooncake(code, size)
    (result,), is_quiet = client.get([PageBuffer(key_of(1), memory)])
    assert (result.status, is_quiet) == expected
    assert bool(mooncake.removed) == (result.status is GetStatus.CORRUPT)
