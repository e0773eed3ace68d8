"""ReaderRows: which process each row of lease bytes belongs to, and what to take back when processes die.

Used by the CacheServer's thread. A group is a TP group on this node: its ranks read and write the same
slots, so what one rank holds stays held until all of them are dead or have left (I7).
"""

from typing import NamedTuple

from cache_service import arena_format
from cache_service.arena import Arena
from cache_service.processes import ProcessId, ProcessWatch

MAX_GROUP = (1 << 32) - 1


class NoReaderRowError(Exception):
    """Every reader row of the arena belongs to a process."""


class ReaderRow(NamedTuple):
    """A process's place in the arena: the row of its lease bytes, and its group."""

    row: int
    group: int


class ReaderRows:
    """The server's bookkeeping of rows; in an adopted arena it takes over those of living processes."""

    def __init__(self, arena: Arena, watch: ProcessWatch) -> None:
        self._arena = arena
        self._watch = watch
        self._rows: dict[ProcessId, ReaderRow] = {}
        self._gone: set[ProcessId] = set()
        self._server: ReaderRow | None = None
        self._next_group = 1
        for row in range(arena.spec.num_readers):
            pid, ticks, group = (arena.row_word(row, word) for word in _ROW_WORDS)
            if pid:
                self._rows[ProcessId(pid, ticks)] = ReaderRow(row, group)
                self._next_group = max(self._next_group, group + 1)
                watch.watch(ProcessId(pid, ticks))
        self.take_dead_groups()

    @property
    def groups(self) -> set[int]:
        """Groups of which some process lives, as far as is known."""
        return {row.group for row in self._rows.values()}

    @property
    def processes(self) -> dict[ProcessId, ReaderRow]:
        """Every process with a row, but for the server."""
        return dict(self._rows)

    @property
    def used_rows(self) -> list[int]:
        """The rows that somebody may hold leases in."""
        rows = [row.row for row in self._rows.values()]
        return rows if self._server is None else [*rows, self._server.row]

    def attach_server(self, process: ProcessId, group: int) -> ReaderRow:
        """Give the server's own process a row, the last free one, and a group: `group`, or the next that is
        nobody's.

        Its successor takes it for one process among others, dead or alive. Raises NoReaderRowError.
        """
        assert self._server is None, "the server has its row"
        while group in self.groups:
            group = group % MAX_GROUP + 1
        self._server = ReaderRow(self._free_rows()[-1], group)
        self._write(self._server, process)
        return self._server

    def detach_server(self) -> None:
        """Give the server's row back; nothing reads or writes the arena in its name any more."""
        if self._server is not None:
            self._clear(self._server.row)
            self._server = None

    def attach(self, process: ProcessId, group: int | None) -> ReaderRow:
        """Give a process a row, in `group` or (None) in a new one; one that has a row keeps it.

        A group is all that name its number; no two groups of living processes may choose the same. Raises
        NoReaderRowError when all rows are taken.
        """
        if process in self._rows:
            self._gone.discard(process)
            self._watch.watch(process)
            return self._rows[process]
        free = self._free_rows()[0]
        if group is None:
            group = self._next_group
            self._next_group += 1
        self._rows[process] = ReaderRow(free, group)
        self._write(self._rows[process], process)
        self._watch.watch(process)
        return self._rows[process]

    def leave(self, process: ProcessId) -> None:
        """Take a process's word that it will touch the arena no more; as good as its death."""
        if process in self._rows:
            self._gone.add(process)
            self._watch.forget(process)

    def take_dead_groups(self) -> list[int]:
        """Clear the rows of groups whose last process is gone; return the groups, whose grants may go too."""
        self._gone.update(process for process in self._watch.take_dead() if process in self._rows)
        if not self._gone:
            return []
        touched = {self._rows[process].group for process in self._gone}
        living = {row.group for process, row in self._rows.items() if process not in self._gone}
        dead = touched - living if self._arena.safety.proven_death else touched
        for process, row in list(self._rows.items()):
            if row.group in dead:
                self._clear(row.row)
                del self._rows[process]
                self._gone.discard(process)
                self._watch.forget(process)
        return sorted(dead)

    def num_leases(self) -> dict[int, int]:
        """Return how many slots each group's processes hold, as memory says now."""
        counts = dict.fromkeys(self.groups, 0)
        for row in self._rows.values():
            counts[row.group] += int(self._arena.leases[row.row].sum())
        return counts

    def _free_rows(self) -> list[int]:
        """Return the rows that are nobody's, one at least."""
        taken = set(self.used_rows)
        free = [row for row in range(self._arena.spec.num_readers) if row not in taken]
        if not free:
            raise NoReaderRowError(
                f"all {len(taken)} reader rows of {self._arena.path} are taken;"
                " run fewer workers on this node"
            )
        return free

    def _write(self, row: ReaderRow, process: ProcessId) -> None:
        """Give a row an owner, whose pid comes last: without it a successor takes the row for nobody's."""
        words = (row.group, process.start_ticks, process.pid)
        for word, value in zip(reversed(_ROW_WORDS), words, strict=True):
            self._arena.set_row_word(row.row, word, value)

    def _clear(self, row: int) -> None:
        """Free a row: first its leases, and its owner's name last."""
        self._arena.leases[row] = 0
        self._arena.fence()
        for word in _ROW_WORDS:
            self._arena.set_row_word(row, word, 0)


_ROW_WORDS = (arena_format.ROW_PID_WORD, arena_format.ROW_START_WORD, arena_format.ROW_GROUP_WORD)
