"""Arena: one node's shared memory for KV pages, mapped by its CacheServer and by every worker of the node.

Gives typed access to the headers and bytes; who may write what is said at each method. It decides nothing:
the PageStore allocates, LeaseRows lease, ArenaFiles own the file.
"""

import contextlib
import mmap
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Self

import numpy
from numpy.typing import NDArray

from cache_service import arena_format
from cache_service.arena_format import ArenaIdentity, ArenaSpec, SlotState, bundle_checksum
from cache_service.arena_safety import ArenaSafety
from cache_service.keys import KEY_BYTES, PageKey
from cache_service.native.fence import load_full_fence

_SLOT_WORDS = arena_format.SLOT_HEADER_BYTES // 8
_FIRST_SLOT_WORD = arena_format.HEADER_BYTES // 8
_FIRST_CHECKSUM_WORD = (arena_format.HEADER_BYTES + arena_format.CHECKSUM_OFFSET) // 8
_NO_CHECKSUMS = bytes(8 * arena_format.MAX_RANKS)


class ArenaMismatchError(Exception):
    """A file is no arena of the wanted layout; the message says in what it differs."""


class Arena:
    """A mapped arena file. Its words are aligned and written whole; each has one writer."""

    def __init__(
        self, descriptor: int, path: Path, spec: ArenaSpec, safety: ArenaSafety | None = None
    ) -> None:
        self.path = path
        self.spec = spec
        self.safety = safety or ArenaSafety()
        self.fence: Callable[[], object] = load_full_fence() if self.safety.fence else _no_fence
        self._memory = mmap.mmap(descriptor, spec.file_bytes)
        self._bytes = memoryview(self._memory)
        self._words = self._bytes[: spec.data_offset].cast("Q")
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
    def map(cls, path: Path, spec: ArenaSpec, safety: ArenaSafety | None = None) -> Self:
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
            for view in (self._words, self._bytes):
                view.release()
            self._memory.close()

    def prefer_huge_pages(self) -> None:
        """Ask for huge pages where the system has them for shared memory; it may not."""
        with contextlib.suppress(OSError, AttributeError):
            self._memory.madvise(mmap.MADV_HUGEPAGE)

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
        return SlotState(self._words[_FIRST_SLOT_WORD + slot * _SLOT_WORDS] & arena_format.STATE_MASK)

    def epoch(self, slot: int) -> int:
        """Return a slot's epoch: odd while it is written, even otherwise."""
        return self._words[_FIRST_SLOT_WORD + slot * _SLOT_WORDS] >> arena_format.STATE_BITS

    def set_stamp(self, slot: int, epoch: int, state: SlotState) -> None:
        """Move a slot on."""
        self._words[_FIRST_SLOT_WORD + slot * _SLOT_WORDS] = epoch << arena_format.STATE_BITS | state

    def is_readable(self, slot: int, epoch: int, key: PageKey) -> bool:
        """Tell whether a slot is READY under an epoch and holds the page `key`."""
        place = arena_format.HEADER_BYTES + slot * arena_format.SLOT_HEADER_BYTES
        found = arena_format.STAMP_AND_KEY.unpack_from(self._memory, place)
        return found == (epoch << arena_format.STATE_BITS | SlotState.READY, key)

    # The same of many slots at once: a call for each costs more than what it looks up.

    def epochs(self, slots: Iterable[int]) -> list[int]:
        """Return `epoch` of each slot."""
        words = self._words
        return [words[_FIRST_SLOT_WORD + slot * _SLOT_WORDS] >> arena_format.STATE_BITS for slot in slots]

    def are_readable(self, entries: Iterable[tuple[int, int, PageKey]]) -> list[bool]:
        """Return `is_readable` of each (slot, epoch, key)."""
        unpack, memory = arena_format.STAMP_AND_KEY.unpack_from, self._memory
        first, size = arena_format.HEADER_BYTES, arena_format.SLOT_HEADER_BYTES
        return [
            unpack(memory, first + slot * size) == (epoch << arena_format.STATE_BITS | SlotState.READY, key)
            for slot, epoch, key in entries
        ]

    def checksums(self, slots: Iterable[int], rank: int) -> list[int]:
        """Return `checksum` of each slot."""
        words, first = self._words, _FIRST_CHECKSUM_WORD + rank
        return [words[first + slot * _SLOT_WORDS] for slot in slots]

    def key(self, slot: int) -> PageKey:
        """Return the key of the page in a slot."""
        return PageKey(self._octets(slot, arena_format.KEY_OFFSET))

    def parent(self, slot: int) -> PageKey | None:
        """Return the key of the page that a slot's page continues; None for a first page."""
        parent = self._octets(slot, arena_format.PARENT_OFFSET)
        return None if parent == arena_format.NO_PARENT else PageKey(parent)

    def length(self, slot: int) -> int:
        """Return how many tokens a slot's page covers."""
        return int(self.headers["length"][slot])

    def tenant(self, slot: int) -> int:
        """Return the number of the tenant that a slot's page is charged to."""
        return int(self.headers["tenant"][slot])

    def group(self, slot: int) -> int:
        """Return the group that a slot is granted to."""
        return int(self.headers["group"][slot])

    def describe_grant(self, slot: int, group: int) -> None:
        """Write whose grant a slot is; nothing of its former page's checksums is left."""
        place = arena_format.HEADER_BYTES + slot * arena_format.SLOT_HEADER_BYTES
        checksums = place + arena_format.CHECKSUM_OFFSET
        self._bytes[checksums : checksums + len(_NO_CHECKSUMS)] = _NO_CHECKSUMS
        grant = (group, arena_format.SLOT_MAGIC, self.spec.layout_word)
        arena_format.GRANT.pack_into(self._memory, place + arena_format.GRANT_OFFSET, *grant)

    def describe_page(
        self, slot: int, key: PageKey, parent: PageKey | None, length: int, tenant: int
    ) -> None:
        """Write what a slot holds, before it becomes READY."""
        place = arena_format.HEADER_BYTES + slot * arena_format.SLOT_HEADER_BYTES + arena_format.PAGE_OFFSET
        arena_format.PAGE.pack_into(
            self._memory, place, length, tenant, key, parent or arena_format.NO_PARENT
        )

    def checksum(self, slot: int, rank: int) -> int:
        """Return `bundle_checksum` of a rank's bundle as its writer left it, 0 before that."""
        return self._words[_FIRST_CHECKSUM_WORD + slot * _SLOT_WORDS + rank]

    def set_checksum(self, slot: int, rank: int, checksum: int) -> None:
        """Say that a rank's bundle is complete. Only that rank, while its group holds the grant."""
        self._words[_FIRST_CHECKSUM_WORD + slot * _SLOT_WORDS + rank] = checksum

    def is_complete(self, slot: int) -> bool:
        """Tell whether every rank has written its checksum."""
        return all(self.checksum(slot, rank) for rank in range(self.spec.num_ranks))

    def is_intact(self, slot: int) -> bool:
        """Tell whether the bytes in a slot are what its header says; False for a slot that does not exist."""
        return 0 <= slot < self.spec.num_slots and all(
            self.checksum(slot, rank) == bundle_checksum(self.bundle(slot, rank), self.key(slot), rank)
            for rank in range(self.spec.num_ranks)
        )

    # Bytes: written by the holders of the slot's grant, read under a lease.

    def bundle(self, slot: int, rank: int) -> memoryview:
        """Return one rank's bundle in a slot."""
        start = self.bundle_offset(slot, rank)
        return self._bytes[start : start + self.spec.bundle_bytes]

    def pages(self) -> memoryview:
        """Return all slots side by side, slot 0 first."""
        return self._bytes[self.spec.data_offset :]

    def bundles(self, rank: int) -> NDArray[numpy.uint8]:
        """Return one rank's bundles `[num_slots, bundle_bytes]`; a row costs less than asking for one."""
        spec = self.spec
        slots = numpy.frombuffer(
            self._memory, numpy.uint8, spec.num_slots * spec.slot_bytes, spec.data_offset
        )
        return slots.reshape(spec.num_slots, spec.num_ranks, spec.bundle_bytes)[:, rank]

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

    def _octets(self, slot: int, offset: int) -> bytes:
        start = arena_format.HEADER_BYTES + slot * arena_format.SLOT_HEADER_BYTES + offset
        return bytes(self._bytes[start : start + KEY_BYTES])


def _no_fence() -> None:
    """Stand in for the fence where a test has switched it off."""
