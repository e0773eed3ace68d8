"""The bytes of an arena file: where everything lies and how the headers are packed.

    0        arena header                                       HEADER_BYTES
    4096     slot headers, SLOT_HEADER_BYTES each               num_slots
    rows     reader rows: row header, one lease byte a slot     num_readers, at 4096-byte alignment
    data     slots: the bundles of all ranks side by side       num_slots, at 4096-byte alignment

Little-endian throughout. Raise FORMAT_VERSION with any change: a file of another version is wiped.
"""

import struct
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Self

import numpy
import xxhash

from cache_service.keys import KEY_BYTES, PageKey

MAGIC = b"EYRIEKV\0"
FORMAT_VERSION = 1
HEADER_BYTES = 4096
SLOT_HEADER_BYTES = 128
ROW_HEADER_BYTES = 64
MAX_RANKS = 8
NUM_READERS = 64
"""Processes of one node that may map its arena at once: each has a row of lease bytes."""
MAX_CLUSTER_ID_BYTES = 64
FINGERPRINT_BYTES = 16

# magic, format version, ranks, cluster id, fingerprint, bundle bytes, slots, readers
_IDENTITY = struct.Struct(f"<8sII{MAX_CLUSTER_ID_BYTES}s{FINGERPRINT_BYTES}sQQQ")
assert _IDENTITY.size == 120

# Words of 8 bytes in the arena header that follow the identity, each with one writer: the owner.
OWNER_PID_WORD, OWNER_START_WORD, INCARNATION_WORD, USABLE_WORD, KEPT_WORD, PORT_WORD = 16, 17, 18, 19, 20, 21

# A slot header begins with its stamp, epoch << STATE_BITS | state: one word, so that a reader sees both at
# one moment. The key follows within the same cache line.
STATE_BITS = 2
STATE_MASK = (1 << STATE_BITS) - 1
KEY_OFFSET, PARENT_OFFSET, CHECKSUM_OFFSET = 16, 32, 48
STAMP_AND_KEY = struct.Struct("@Q8x16s")
GRANT = struct.Struct("@III")
"""At GRANT_OFFSET: group, slot magic, layout."""
GRANT_OFFSET = 112
PAGE = struct.Struct("@II16s16s")
"""At PAGE_OFFSET: length, tenant, key, parent."""
PAGE_OFFSET = 8

_FIELDS = (
    ("stamp", "<u8", 0),
    ("length", "<u4", 8),
    ("tenant", "<u4", 12),
    ("key", "V16", KEY_OFFSET),
    ("parent", "V16", PARENT_OFFSET),
    ("checksums", ("<u8", MAX_RANKS), CHECKSUM_OFFSET),
    ("group", "<u4", GRANT_OFFSET),
    ("magic", "<u4", GRANT_OFFSET + 4),
    ("layout", "<u4", GRANT_OFFSET + 8),
)
SLOT_HEADER = numpy.dtype(
    {
        "names": [name for name, _, _ in _FIELDS],
        "formats": [format_ for _, format_, _ in _FIELDS],
        "offsets": [offset for _, _, offset in _FIELDS],
        "itemsize": SLOT_HEADER_BYTES,
    }
)
SLOT_MAGIC = 0x59450000 | FORMAT_VERSION
NO_PARENT = bytes(KEY_BYTES)

# Words of 8 bytes in a reader row's header. The row is whose these words say; the server writes them.
ROW_PID_WORD, ROW_START_WORD, ROW_GROUP_WORD = 0, 1, 2

_SEED_MASK = (1 << 64) - 1


class SlotState(IntEnum):
    """Where a slot stands; the server alone writes it."""

    FREE = 0
    WRITING = 1
    READY = 2
    EVICTING = 3


class ArenaSizeError(ValueError):
    """The arena cannot have the size asked for; the message says what there is and which option to change."""


@dataclass(frozen=True)
class ArenaSpec:
    """All that two processes must agree on to read the same arena, and how large it is.

    `fingerprint` names the bundle's layout (and whatever else makes foreign bytes useless), 16 bytes.
    A slot holds one page of all `num_ranks` ranks of a TP group.
    """

    cluster_id: str
    fingerprint: bytes
    bundle_bytes: int
    num_ranks: int
    num_slots: int
    num_readers: int = NUM_READERS

    def __post_init__(self) -> None:
        if not 0 < len(self.cluster_id.encode()) <= MAX_CLUSTER_ID_BYTES or "/" in self.cluster_id:
            raise ValueError(
                f"cluster id {self.cluster_id!r}: needs 1 to {MAX_CLUSTER_ID_BYTES} bytes without '/'"
            )
        if len(self.fingerprint) != FINGERPRINT_BYTES:
            raise ValueError(f"fingerprint has {len(self.fingerprint)} bytes; it needs {FINGERPRINT_BYTES}")
        if not 1 <= self.num_ranks <= MAX_RANKS:
            raise ValueError(f"{self.num_ranks} ranks on one node; an arena's slot takes 1 to {MAX_RANKS}")
        if self.bundle_bytes <= 0 or self.bundle_bytes % 64:
            raise ValueError(f"bundles of {self.bundle_bytes} bytes; a positive multiple of 64 is needed")
        if self.num_slots < 1 or self.num_readers < 1:
            raise ArenaSizeError(
                f"an arena of {self.num_slots} slots and {self.num_readers} readers holds nothing; raise"
                f" --host-cache-gb above the {self.slot_bytes} bytes of one page"
            )

    @classmethod
    def of_size(
        cls, cluster_id: str, fingerprint: bytes, bundle_bytes: int, num_ranks: int, total_bytes: int
    ) -> Self:
        """Return the spec of the largest arena whose file has at most `total_bytes`.

        Raises ArenaSizeError when not even one page fits.
        """
        slot_bytes = bundle_bytes * num_ranks
        # The headers, rows and their alignment; at most one slot too few.
        fixed = 3 * HEADER_BYTES + NUM_READERS * (ROW_HEADER_BYTES + 64)
        num_slots = (total_bytes - fixed) // (slot_bytes + SLOT_HEADER_BYTES + NUM_READERS)
        if num_slots < 1:
            raise ArenaSizeError(
                f"{total_bytes} bytes of host cache do not hold one page of {slot_bytes} bytes beside the"
                f" arena's headers ({fixed} bytes); raise --host-cache-gb"
            )
        return cls(cluster_id, fingerprint, bundle_bytes, num_ranks, num_slots)

    @property
    def slot_bytes(self) -> int:
        """Bytes of one page, all ranks together."""
        return self.bundle_bytes * self.num_ranks

    @property
    def rows_offset(self) -> int:
        """Where the reader rows begin."""
        return _aligned(HEADER_BYTES + self.num_slots * SLOT_HEADER_BYTES, HEADER_BYTES)

    @property
    def row_bytes(self) -> int:
        """Bytes of one reader row."""
        return ROW_HEADER_BYTES + _aligned(self.num_slots, 64)

    @property
    def data_offset(self) -> int:
        """Where slot 0 begins."""
        return _aligned(self.rows_offset + self.num_readers * self.row_bytes, HEADER_BYTES)

    @property
    def file_bytes(self) -> int:
        """Bytes of the whole file."""
        return self.data_offset + self.num_slots * self.slot_bytes

    @property
    def layout_word(self) -> int:
        """What each slot's header repeats of the layout."""
        return int.from_bytes(self.fingerprint[:4], "little")

    def pack(self) -> bytes:
        """Return the part of the arena header that never changes."""
        return _IDENTITY.pack(
            MAGIC,
            FORMAT_VERSION,
            self.num_ranks,
            self.cluster_id.encode(),
            self.fingerprint,
            self.bundle_bytes,
            self.num_slots,
            self.num_readers,
        )


@dataclass(frozen=True)
class ArenaIdentity:
    """What the first bytes of a file say; `spec` is None where this version cannot read on."""

    format_version: int | None
    spec: ArenaSpec | None

    @classmethod
    def unpack(cls, header: bytes) -> Self:
        """Read what `ArenaSpec.pack` wrote, or find that something else is there."""
        if len(header) < _IDENTITY.size or header[: len(MAGIC)] != MAGIC:
            return cls(None, None)
        _, version, num_ranks, cluster_id, fingerprint, bundle_bytes, num_slots, num_readers = (
            _IDENTITY.unpack_from(header)
        )
        if version != FORMAT_VERSION:
            return cls(version, None)
        try:
            name = cluster_id.rstrip(b"\0").decode()
            spec = ArenaSpec(name, fingerprint, bundle_bytes, num_ranks, num_slots, num_readers)
        except ValueError:
            return cls(version, None)
        return cls(version, spec)

    def difference(self, wanted: ArenaSpec) -> str | None:
        """Say in what an arena differs from the wanted one; None when it is the same."""
        if self.format_version is None:
            return "it is no arena"
        if self.format_version != FORMAT_VERSION:
            return f"its format version is {self.format_version}, ours is {FORMAT_VERSION}"
        if self.spec is None:
            return "its header is damaged"
        for field in fields(ArenaSpec):
            found, ours = getattr(self.spec, field.name), getattr(wanted, field.name)
            if found != ours:
                found, ours = (value.hex() if isinstance(value, bytes) else value for value in (found, ours))
                return f"its {field.name} is {found}, ours is {ours}"
        return None


def bundle_checksum(bundle: bytes | bytearray | memoryview, key: PageKey, rank: int) -> int:
    """Return xxh3-64 of one rank's bundle, seeded with its page's key and its rank; never 0.

    The seed makes a bundle under a wrong key, or in another rank's place, as wrong as a flipped bit;
    0 stands for "not written yet". Releases the interpreter's lock.
    """
    return xxhash.xxh3_64_intdigest(bundle, seed=checksum_seed(key, rank)) or 1


def checksum_seed(key: PageKey, rank: int) -> int:
    """Return the seed of a bundle's checksum."""
    return (int.from_bytes(key[:8], "little") + rank) & _SEED_MASK


def _aligned(num_bytes: int, alignment: int) -> int:
    return -(-num_bytes // alignment) * alignment
