"""ArenaHost: a node's arena and its PageStore in the test's own process, as HostTier sees them (HostCache).

Without sockets, so that every step is the test's; news of the store reach `locate` at once.
"""

import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from cache_service.arena import Arena
from cache_service.arena_files import SHARED_MEMORY
from cache_service.arena_format import ArenaSpec
from cache_service.keys import PageKey
from cache_service.lease_row import LeaseRow
from cache_service.page_records import Entry, Grant, Location
from tests.unit.arenas import new_store
from workers.engine.engine import Engine
from workers.kvcache.arena_part import MappedArena
from workers.kvcache.mover import Mover, mover_for
from workers.kvcache.moves import MoveInjection
from workers.parallel import TPGroup

GROUP = 1


@dataclass(frozen=True)
class ArenaPlace:
    """Where the ranks of a group find the arena, and what goes wrong there on purpose."""

    path: Path
    spec: ArenaSpec
    injection: MoveInjection | None
    make: Callable[..., Mover] = mover_for

    def attach(self, engine: Engine, group: TPGroup) -> tuple[Arena, Mover]:
        """Map the arena into this rank's process and have its engine move pages."""
        arena = Arena.map(self.path, self.spec)
        leases = LeaseRow(arena, group.rank)
        mapped = MappedArena(arena, leases)
        mover = self.make(engine.pool, lambda: mapped, group.rank, group.moves, injection=self.injection)
        engine.attach(mover)
        return arena, mover


class ArenaHost:
    """Use as a context manager. It outlives harnesses: what one of them saved, the next one finds."""

    def __init__(
        self,
        num_slots: int,
        injection: MoveInjection | None = None,
        make: Callable[..., Mover] = mover_for,
    ) -> None:
        self._num_slots = num_slots
        self._injection = injection
        self._make = make
        self._resources = ExitStack()
        self._lost: list[PageKey] = []
        self.is_hidden = False
        """Nothing is found: the arena's news do not arrive."""

    def __enter__(self) -> Self:
        self._folder = Path(self._resources.enter_context(tempfile.TemporaryDirectory(dir=SHARED_MEMORY)))
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    def place(self, bundle_bytes: int, num_ranks: int) -> ArenaPlace:
        """Make the arena on first use."""
        if not hasattr(self, "owned"):
            self.owned, self.store, self.changes = new_store(
                self._folder, num_slots=self._num_slots, bundle_bytes=bundle_bytes, num_ranks=num_ranks
            )
            self._resources.callback(self.owned.close)
            self.leases = LeaseRow(self.owned.arena, num_ranks)  # the decider's; each rank has its own
        return ArenaPlace(self.owned.arena.path, self.owned.arena.spec, self._injection, self._make)

    def cache_of(self, attached: Arena) -> Self:
        """Return what the tier of a group asks whose rank 0 is attached."""
        return self

    def locate(self, key: PageKey) -> Location | None:
        return None if self.is_hidden else self.store.lookup([key])[0]

    def acquire(self, keys: Sequence[PageKey], locations: Sequence[Location]) -> int:
        return self.leases.acquire(keys, locations)

    def release(self, slots: Iterable[int]) -> None:
        self.leases.release(slots)

    def take_grant(self) -> Grant | None:
        granted = self.store.grant(GROUP, 1)
        return granted[0] if granted else None

    def commit(self, entries: Sequence[Entry]) -> None:
        for entry, result in zip(entries, self.store.commit(GROUP, entries), strict=True):
            if result.location is None:
                self._lost.append(entry.key)
        self.store.check()

    def abort(self, grants: Sequence[Grant]) -> None:
        self.store.abort(GROUP, grants)

    def touch(self, keys: Sequence[PageKey]) -> None:
        self.store.touch(keys)

    def report_corrupt(self, location: Location) -> None:
        self.store.drop(location, "corrupt")

    def take_lost(self) -> list[PageKey]:
        lost, self._lost = self._lost, []
        return lost
