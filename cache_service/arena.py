"""Arena: one node's shared memory for KV pages, mapped by its CacheServer and by every worker of the node.

Gives typed access to the headers and bytes; who may write what is said at each method. It decides nothing:
the PageStore allocates, LeaseRows lease, ArenaFiles own the file.
"""

import contextlib
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import numpy
from numpy.typing import NDArray

from cache_service import arena_format
from cache_service.arena_format import ArenaIdentity, ArenaSpec, SlotState
from cache_service.arena_safety import ArenaSafety
from cache_service.keys import KEY_BYTES, PageKey
from cache_service.native.fence import load_full_fence

_SLOT_WORDS = arena_format.SLOT_HEADER_BYTES // 8
_SLOT_HALVES = arena_format.SLOT_HEADER_BYTES // 4


class ArenaMismatchError(Exception):
    """A file is no arena of the wanted layout; the message says in what it differs."""


class Arena:
    """A mapped arena file. Words and halves are aligned and written whole; each has one writer."""

    def __init__(
        self, descriptor: int, path: Path, spec: ArenaSpec, safety: ArenaSafety | None = None
    ) -> None:
        self.path = path
        self.spec = spec
        self.safety = safety or ArenaSafety()
        self.fence: Callable[[], object] = load_full_fence() if self.safety.fence else _no_fence
        self._memory = mmap.mmap(descriptor, spec.file_bytes)
        self._bytes = memoryview(self._memory)
        # Headers and rows only: a view of the data would end in the middle of a word for some sizes.
        control = self._bytes[: spec.data_offset]
        self._words = control.cast("Q")
        self._halves = control.cast("I")
        self.headers: NDArray[numpy.void] = numpy.frombuffer(
            self._memory, arena_format.SLOT_HEADER, spec.num_slots, arena_format.HEADER_BYTES
        )
        """Slot headers `[num_slots]`, for scans."""
        rows = numpy.frombuffer(
            self._memory, numpy.uint8, spec.num_readers * spec.row_bytes, spec.rows_offset
        ).reshape(spec.num_readers, spec.row_bytes)
        self.leases: NDArray[numpy.uint8] = rows[
            :, arena_format.ROW_HEADER_BYTES : arena_format.ROW_HEADER_BYTES + spec.num_slots
        ]
        """Lease bytes `[num_readers, num_slots]`."""

    @classmethod
    def map(cls, path: Path, spec: ArenaSpec, safety: ArenaSafety | None = None) -> "Arena":
        """Map an arena that a server owns, as its reader and writer of grants.

        Raises ArenaMismatchError when the file is not of this spec, OSError when it cannot be opened.
        """
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            identity = ArenaIdentity.unpack(os.pread(descriptor, arena_format.HEADER_BYTES, 0))
            difference = identity.difference(spec)
            if difference is None and os.fstat(descriptor).st_size != spec.file_bytes:
                difference = "its file is cut short"
            if difference is not None:
                raise ArenaMismatchError(f"{path} is not the arena that was asked for: {difference}")
            return cls(descriptor, path, spec, safety)
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Unmap. Views handed out keep the memory until they are gone. Idempotent."""
        self.headers = self.headers[:0].copy()
        self.leases = self.leases[:0].copy()
        with contextlib.suppress(BufferError):
            for view in (self._words, self._halves, self._bytes):
                view.release()
            self._memory.close()

    # The arena header: written by the owner.

    @property
    def incarnation(self) -> int:
        """Which run of a server owns the arena; each is greater than the last."""
        return self._words[arena_format.INCARNATION_WORD]

    @property
    def num_usable_slots(self) -> int:
        """Slots whose memory exists; it grows to `num_slots` while the file is prefaulted."""
        return self._words[arena_format.USABLE_WORD]

    @num_usable_slots.setter
    def num_usable_slots(self, count: int) -> None:
        self._words[arena_format.USABLE_WORD] = count

    def word(self, index: int) -> int:
        """Return a word of the arena header."""
        return self._words[index]

    def set_word(self, index: int, value: int) -> None:
        """Write a word of the arena header; its owner does."""
        self._words[index] = value

    # Slot headers: written by the server, the checksums by the holders of the slot's grant.

    def state(self, slot: int) -> SlotState:
        """Return where a slot stands."""
        return SlotState(self._halves[self._half(slot) + arena_format.STATE_HALF])

    def set_state(self, slot: int, state: SlotState) -> None:
        """Move a slot on."""
        self._halves[self._half(slot) + arena_format.STATE_HALF] = state

    def epoch(self, slot: int) -> int:
        """Return a slot's epoch: odd while it is written, even otherwise."""
        return self._words[self._word(slot)]

    def raise_epoch(self, slot: int) -> int:
        """Begin or end a grant; return the new epoch."""
        place = self._word(slot)
        self._words[place] += 1
        return self._words[place]

    def key(self, slot: int) -> PageKey:
        """Return the key of the page in a slot."""
        start = self._place(slot) + arena_format.KEY_OFFSET
        return PageKey(bytes(self._bytes[start : start + KEY_BYTES]))

    def parent(self, slot: int) -> PageKey | None:
        """Return the key of the page that a slot's page continues; None for a first page."""
        start = self._place(slot) + arena_format.PARENT_OFFSET
        parent = bytes(self._bytes[start : start + KEY_BYTES])
        return None if parent == arena_format.NO_PARENT else PageKey(parent)

    def length(self, slot: int) -> int:
        """Return how many tokens a slot's page covers."""
        return self._halves[self._half(slot) + arena_format.LENGTH_HALF]

    def tenant(self, slot: int) -> int:
        """Return the number of the tenant that a slot's page is charged to."""
        return self._halves[self._half(slot) + arena_format.TENANT_HALF]

    def group(self, slot: int) -> int:
        """Return the group that a slot is granted to."""
        return self._halves[self._half(slot) + arena_format.GROUP_HALF]

    def describe_grant(self, slot: int, group: int) -> None:
        """Write whose grant a slot is; nothing of its former page's checksums is left."""
        half = self._half(slot)
        self._halves[half + arena_format.GROUP_HALF] = group
        self._halves[half + arena_format.SLOT_MAGIC_HALF] = arena_format.SLOT_MAGIC
        self._halves[half + arena_format.SLOT_LAYOUT_HALF] = self.spec.layout_word
        for rank in range(self.spec.num_ranks):
            self.set_checksum(slot, rank, 0)

    def describe_page(
        self, slot: int, key: PageKey, parent: PageKey | None, length: int, tenant: int
    ) -> None:
        """Write what a slot holds, before it becomes READY."""
        place, half = self._place(slot), self._half(slot)
        key_at, parent_at = place + arena_format.KEY_OFFSET, place + arena_format.PARENT_OFFSET
        self._bytes[key_at : key_at + KEY_BYTES] = key
        self._bytes[parent_at : parent_at + KEY_BYTES] = parent or arena_format.NO_PARENT
        self._halves[half + arena_format.LENGTH_HALF] = length
        self._halves[half + arena_format.TENANT_HALF] = tenant

    def checksum(self, slot: int, rank: int) -> int:
        """Return `bundle_checksum` of a rank's bundle as its writer left it, 0 before that."""
        return self._words[self._word(slot) + arena_format.CHECKSUM_WORD + rank]

    def set_checksum(self, slot: int, rank: int, checksum: int) -> None:
        """Say that a rank's bundle is complete. Only that rank, while its group holds the grant."""
        self._words[self._word(slot) + arena_format.CHECKSUM_WORD + rank] = checksum

    # Bytes: written by the holders of the slot's grant, read under a lease.

    def bundle(self, slot: int, rank: int) -> memoryview:
        """Return one rank's bundle in a slot."""
        start = self.bundle_offset(slot, rank)
        return self._bytes[start : start + self.spec.bundle_bytes]

    def slot_data(self, slot: int) -> memoryview:
        """Return the bundles of all ranks in a slot."""
        start = self.bundle_offset(slot, 0)
        return self._bytes[start : start + self.spec.slot_bytes]

    def bundle_offset(self, slot: int, rank: int) -> int:
        """Return where in the file a bundle begins."""
        assert 0 <= slot < self.spec.num_slots and 0 <= rank < self.spec.num_ranks, f"no bundle {slot}/{rank}"
        return self.spec.data_offset + slot * self.spec.slot_bytes + rank * self.spec.bundle_bytes

    # Reader rows: the headers written by the server, the lease bytes by the row's reader.

    def row_word(self, row: int, index: int) -> int:
        """Return a word of a reader row's header."""
        return self._words[(self.spec.rows_offset + row * self.spec.row_bytes) // 8 + index]

    def set_row_word(self, row: int, index: int, value: int) -> None:
        """Write a word of a reader row's header; the server does."""
        self._words[(self.spec.rows_offset + row * self.spec.row_bytes) // 8 + index] = value

    def lease_bytes(self, row: int) -> memoryview:
        """Return the lease bytes `[num_slots]` of one reader."""
        start = self.spec.rows_offset + row * self.spec.row_bytes + arena_format.ROW_HEADER_BYTES
        return self._bytes[start : start + self.spec.num_slots]

    def is_leased(self, slot: int) -> bool:
        """Tell whether any reader holds a slot, as memory says now."""
        return bool(self.leases[:, slot].any())

    def _place(self, slot: int) -> int:
        return arena_format.HEADER_BYTES + slot * arena_format.SLOT_HEADER_BYTES

    def _word(self, slot: int) -> int:
        return arena_format.HEADER_BYTES // 8 + slot * _SLOT_WORDS

    def _half(self, slot: int) -> int:
        return arena_format.HEADER_BYTES // 4 + slot * _SLOT_HALVES


def _no_fence() -> None:
    """Stand in for the fence where a test has switched it off."""
