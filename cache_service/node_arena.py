"""NodeArena: the arena of one node, once there is one, with its store, its readers and its relocation log.

Owned by the CacheServer's thread. The first worker to attach says which layout the arena has; one that a
killed server left is taken over before that, with the processes that still use it.
"""

import contextlib
import logging
import time
from collections.abc import Callable
from pathlib import Path

from cache_service import arena_format
from cache_service.arena import Arena
from cache_service.arena_files import ArenaOwnedError, OwnedArena, settle_orphan, sweep_dead_clusters
from cache_service.arena_format import ArenaIdentity, ArenaSpec
from cache_service.arena_safety import ArenaSafety
from cache_service.arena_user import ArenaAccess, ArenaUser
from cache_service.config import CacheConfig
from cache_service.host_memory import HostMemory
from cache_service.lease_ages import LeaseAges
from cache_service.lease_row import LeaseRow
from cache_service.messages import Attach
from cache_service.page_store import PageStore
from cache_service.processes import ProcessId, ProcessWatch
from cache_service.reader_rows import MAX_GROUP, NoReaderRowError, ReaderRow, ReaderRows
from cache_service.relocation import RelocationLog

logger = logging.getLogger(__name__)

PATIENCE_S = 10.0
"""How long a killed predecessor may take to exit: its memory is unmapped first."""
_RETRY_S = 0.1


class ArenaLayoutError(Exception):
    """The arena that processes are using has another layout than the one asked for."""


class NodeArena:
    """`store`, `rows` and `ages` are None until there is an arena.

    `incarnation` is what this server's shall be at least. Raises ArenaOwnedError while another server lives,
    ArenaSizeError where there is no room for the size.
    """

    def __init__(
        self,
        config: CacheConfig,
        cluster_id: str,
        path: Path,
        incarnation: int,
        *,
        now_s: float,
        read_memory: Callable[[Path], HostMemory] = HostMemory.read,
        patience_s: float = PATIENCE_S,
        safety: ArenaSafety | None = None,
    ) -> None:
        self._config = config
        self._cluster_id = cluster_id
        self._path = path
        self._read_memory = read_memory
        self._safety = safety
        self._watch = ProcessWatch()
        self._users: list[ArenaUser] = []
        self._access: ArenaAccess | None = None
        self._owned: OwnedArena | None = None
        self.store: PageStore | None = None
        self.rows: ReaderRows | None = None
        self.ages: LeaseAges | None = None
        self._port = 0
        self.log = RelocationLog(incarnation)
        sweep_dead_clusters(cluster_id, path.parent)
        orphan = self._orphan()
        if orphan is None and settle_orphan(path, keep=False, patience_s=patience_s):
            logger.warning("removed what is no arena of this version", extra={"path": str(path)})
        memory = read_memory(path.parent)
        size = config.arena_bytes(memory)
        if orphan is None:
            memory.require(size, path.parent)
            return
        if config.host_cache_gb is not None:  # a part of what is free differs from time to time
            orphan = ArenaSpec.of_size(
                cluster_id, orphan.fingerprint, orphan.bundle_bytes, orphan.num_ranks, size
            )
        owned = self._take(orphan, incarnation, patience_s)
        self.log = RelocationLog(owned.arena.incarnation)
        self._use(owned, now_s)

    @property
    def arena(self) -> Arena | None:
        """The arena, once there is one."""
        return None if self._owned is None else self._owned.arena

    def enlist(self, user: ArenaUser) -> None:
        """Tell `user` of this arena and of those to come; the last to be enlisted is the first to end."""
        self._users.append(user)
        if self._access is not None:
            user.begin(self._access)

    def announce(self, port: int) -> None:
        """Write where the server listens into its arena, for those on this node that look for it."""
        self._port = port
        if self._owned is not None:
            self._owned.arena.set_word(arena_format.PORT_WORD, port)

    def attach(self, attach: Attach, now_s: float) -> ReaderRow:
        """Give a process its row, after making an arena of its layout where nobody uses one of another.

        Raises ArenaLayoutError, ArenaSizeError, ArenaOwnedError, NoReaderRowError.
        """
        self._have(attach, now_s)
        assert self.rows is not None
        return self.rows.attach(ProcessId(attach.pid, attach.start_ticks), attach.group)

    def reclaim(self) -> list[int]:
        """Take back what groups hold whose processes are all dead; return the groups."""
        if self.rows is None or self.store is None:
            return []
        groups = self.rows.take_dead_groups()
        for group in groups:
            num_grants = self.store.reclaim(group)
            logger.info("a group's processes are gone", extra={"group": group, "grants": num_grants})
        return groups

    def close(self, keep: bool) -> None:
        """Let go of the arena, and with `keep` leave its file to the next server. Idempotent."""
        self._let_go(keep)
        self._watch.close()

    def leave(self) -> None:
        """Stop what goes on by itself and leave all as it is, as a server does that was killed."""
        if self._owned is not None:
            self._owned.prefault.stop()

    def _orphan(self) -> ArenaSpec | None:
        """Return the spec of the file that is there, if it is of our cluster."""
        with contextlib.suppress(OSError), self._path.open("rb") as file:
            spec = ArenaIdentity.unpack(file.read(arena_format.HEADER_BYTES)).spec
            if spec is not None and spec.cluster_id == self._cluster_id:
                return spec
        return None

    def _have(self, attach: Attach, now_s: float) -> None:
        """Have an arena of the layout that a process wants."""
        arena = self.arena
        wanted = (attach.fingerprint, attach.bundle_bytes, attach.num_ranks)
        if arena is not None:
            found = (arena.spec.fingerprint, arena.spec.bundle_bytes, arena.spec.num_ranks)
            if found == wanted:
                return
            self.reclaim()
            assert self.rows is not None and self.store is not None
            if self.rows.groups:
                raise ArenaLayoutError(
                    f"the host cache of this node holds pages of {_layout(found)}, this worker's are of"
                    f" {_layout(wanted)}; one node's workers serve one model in one layout"
                )
            logger.warning("the arena gets another layout: its pages go", extra={"layout": _layout(wanted)})
            self.store.clear()  # so that subscribers hear of it
            self._let_go(keep=False)
        size = self._config.arena_bytes(self._read_memory(self._path.parent))
        owned = self._take(
            ArenaSpec.of_size(self._cluster_id, *wanted, size), self.log.version.incarnation, 0.0
        )
        self._use(owned, now_s)

    def _let_go(self, keep: bool) -> None:
        """End those who use the arena, and give it up. What still touches it keeps its memory mapped."""
        if self._access is not None:
            self._access = None
            has_ended = [user.end() for user in reversed(self._users)]
            if all(has_ended) and self.rows is not None:
                self.rows.detach_server()
            elif not all(has_ended):
                logger.warning("the arena's memory stays mapped: transfers are under way")
        self.store = self.rows = self.ages = None
        if self._owned is not None:
            self._owned.close(keep)
            self._owned = None

    def _take(self, spec: ArenaSpec, incarnation: int, patience_s: float) -> OwnedArena:
        """Own the file, once its last owner has gone."""
        end_s = time.monotonic() + patience_s
        while True:
            try:
                return OwnedArena.open(self._path, spec, incarnation, self._read_memory, self._safety)
            except ArenaOwnedError:
                if time.monotonic() >= end_s:
                    raise
                time.sleep(_RETRY_S)

    def _use(self, owned: OwnedArena, now_s: float) -> None:
        arena = owned.arena
        # What an arena taken over late says of itself may be newer than the log, which subscribers follow.
        arena.set_word(arena_format.INCARNATION_WORD, self.log.version.incarnation)
        arena.set_word(arena_format.PORT_WORD, self._port)
        self._owned = owned
        self.rows = ReaderRows(arena, self._watch)
        self.store = PageStore(arena, self.log, self._config.store_options, self.rows.groups)
        self.ages = LeaseAges(arena, now_s)
        owned.prefault.start()
        self._access = self._own_access(arena, self.store, self.rows)
        if self._access is not None:
            for user in self._users:
                user.begin(self._access)
        logger.info(
            "the arena is ready",
            extra={
                "path": str(arena.path),
                "slots": arena.spec.num_slots,
                "slot_bytes": arena.spec.slot_bytes,
                "adopted_pages": self.store.num_recovered if owned.is_adopted else 0,
                "incarnation": arena.incarnation,
            },
        )

    def _own_access(self, arena: Arena, store: PageStore, rows: ReaderRows) -> ArenaAccess | None:
        """Take the server's own place; None where processes hold every row."""
        group = 1 + self.log.version.incarnation % MAX_GROUP
        try:
            row = rows.attach_server(ProcessId.current(), group)
        except NoReaderRowError:
            logger.warning("no reader row is left for the server: it fetches, puts and lends no pages")
            return None
        return ArenaAccess(arena, store, row.group, LeaseRow(arena, row.row))


def _layout(layout: tuple[bytes, int, int]) -> str:
    fingerprint, bundle_bytes, num_ranks = layout
    return f"layout {fingerprint.hex()} ({num_ranks} x {bundle_bytes} bytes)"
