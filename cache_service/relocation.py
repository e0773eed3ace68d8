"""RelocationLog: one owner's numbered changes (I8), and the records in which others learn of them.

The owner's thread appends and reads; nothing here knows sockets or clocks.
"""

from collections.abc import Iterable

import msgspec

from cache_service.keys import KEY_BYTES, PageKey
from cache_service.relocation_records import Change, Standing, Stored, StoredRemotely

MAX_CHANGES = 16_384
"""What a log keeps for subscribers that missed some: about 200 bytes each."""


class Version(msgspec.Struct, frozen=True, array_like=True):
    """Of an owner's relocations: the counter rises by one a change, the incarnation changes at a restart.

    Incarnations of one owner differ; they need not rise.
    """

    incarnation: int
    counter: int


class Changes(msgspec.Struct, frozen=True, array_like=True, tag="changes"):
    """Changes first_counter + 1 .. first_counter + len(changes) of one incarnation; none: a heartbeat."""

    incarnation: int
    first_counter: int
    changes: list[Change]

    @property
    def counter(self) -> int:
        """Of the last change."""
        return self.first_counter + len(self.changes)


class Snapshot(msgspec.Struct, frozen=True, array_like=True, tag="snapshot"):
    """All that is stored at one version."""

    version: Version
    stored: list[Stored]
    remote: bytes = b""
    """The keys of pages in the remote store, one after another: there may be far more than of the arena's."""

    def standing(self) -> list[Standing]:
        """Return all of it as records."""
        starts = range(0, len(self.remote), KEY_BYTES)
        keys = [PageKey(self.remote[start : start + KEY_BYTES]) for start in starts]
        return [*self.stored, *map(StoredRemotely, keys)]


class RelocationLog:
    """Counts every change and keeps the last `max_changes` to twice as many of them."""

    def __init__(self, incarnation: int, max_changes: int = MAX_CHANGES) -> None:
        self._incarnation = incarnation
        self._max_changes = max_changes
        self._first_counter = 0
        self._changes: list[Change] = []

    @property
    def version(self) -> Version:
        """The version of the last change."""
        return Version(self._incarnation, self._counter)

    def append(self, change: Change) -> None:
        """Number a change that has just been made."""
        if len(self._changes) >= 2 * self._max_changes:
            self._first_counter += len(self._changes) - self._max_changes
            del self._changes[: -self._max_changes]
        self._changes.append(change)

    def changes_since(self, version: Version | None) -> Changes | None:
        """Return all changes after `version`; None where only a snapshot helps.

        That is: no version, another incarnation's, one older than the log goes back, or one from the future.
        """
        if version is None or version.incarnation != self._incarnation:
            return None
        if not self._first_counter <= version.counter <= self._counter:
            return None
        start = version.counter - self._first_counter
        return Changes(self._incarnation, version.counter, self._changes[start:])

    def resync(
        self, version: Version | None, stored: Iterable[Stored], remote: Iterable[PageKey] = ()
    ) -> Changes | Snapshot:
        """Return what brings a subscriber at `version` up to date: changes, else a snapshot."""
        return self.changes_since(version) or Snapshot(self.version, list(stored), b"".join(remote))

    @property
    def _counter(self) -> int:
        return self._first_counter + len(self._changes)
