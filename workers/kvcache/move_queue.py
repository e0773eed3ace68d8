"""MoveQueue: one rank's SAVEs and LOADs from their start to their end, and who is told of it.

Shared by the movers of all devices: the Engine's thread adds moves and asks, the mover's threads take and end
them. What becomes of a move stands on the MoveBoard (I2). No torch.
"""

import heapq
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

from workers.kvcache.moves import Move, MoveInjection, MoveKind, MoveStats, moves_of
from workers.move_board import MoveBoard, MoveStatus
from workers.plan import LoadPages, SavePages

_IDLE_S = 60.0


class MoveTimeoutError(RuntimeError):
    """A move did not end in time: its thread hangs, and the replica with it."""


class MoveOfNoPageError(RuntimeError):
    """A move of a page that the pool has not: a bug of ours, never clamped; the replica stops."""


class Mark(Protocol):
    """A place in a stream of the device, `torch.cuda.Event` for one."""

    def query(self) -> bool:
        """Tell whether the stream has passed it."""
        ...

    def synchronize(self) -> None:
        """Wait until the stream has passed it."""


class Started(NamedTuple):
    """A move that waits for its turn. Its copy comes after the place `after` of the compute stream."""

    place: int
    move: Move
    after: Mark | None


class Loading(NamedTuple):
    """A LOAD in flight: once its copy is enqueued, the mark behind it, and that mark's number."""

    move: int
    mark: Mark | None = None
    mark_number: int = 0


class MoveQueue:
    """`num_pages` is the pool's; `stats` is to be read only."""

    def __init__(
        self, board: MoveBoard, num_pages: int, bundle_bytes: int, part: int, injection: MoveInjection | None
    ) -> None:
        self.stats = MoveStats()
        self._board = board
        self._num_pages = num_pages
        self._bundle_bytes = bundle_bytes
        self._part = part
        self._injection = injection
        self._lock = threading.Lock()
        self._has_work = threading.Condition(self._lock)
        self._has_moved = threading.Condition(self._lock)
        self._closing = threading.Event()
        self._waiting: dict[MoveKind, list[Started]] = {"load": [], "save": []}  # heaps
        self._loading: dict[int, Loading] = {}  # by page
        self._num_in_flight = 0

    @property
    def num_in_flight(self) -> int:
        """Moves that were started and are not over."""
        return self._num_in_flight

    @property
    def is_closing(self) -> bool:
        """Tell whether moves that have not begun are to fail."""
        return self._closing.is_set()

    # The Engine's thread.

    def add(self, op: SavePages | LoadPages, after: Mark | None = None) -> None:
        """Start an op's moves. Raises MoveOfNoPageError, having started none."""
        moves = moves_of(op)
        assert not self._closing.is_set(), "the mover is closed"
        for move in moves:
            if not 0 < move.page <= self._num_pages:
                raise MoveOfNoPageError(
                    f"move {move.number} is of "
                    f"{'the dummy page' if move.page == 0 else f'page {move.page}'};"
                    f" allowed are 1 .. {self._num_pages}"
                )
        with self._lock:
            for move in moves:
                if move.kind == "load":
                    assert move.page not in self._loading, f"page {move.page} is being loaded already"
                    self._loading[move.page] = Loading(move.number)
                place = self._injection.place(move, self._part) if self._injection else move.number
                heapq.heappush(self._waiting[move.kind], Started(place, move, after))
            self._num_in_flight += len(moves)
            self._has_work.notify_all()

    def loading_pages(self) -> list[int]:
        """Return the pages of LOADs in flight."""
        if not self._loading:  # only the caller's thread adds to it
            return []
        with self._lock:
            return list(self._loading)

    def loads_of(self, pages: Iterable[int]) -> list[Loading]:
        """Return the LOADs in flight of `pages`."""
        with self._lock:
            return [self._loading[page] for page in pages if page in self._loading]

    def wait_until(self, is_so: Callable[[Sequence[Loading]], bool], pages: Sequence[int], s: float) -> bool:
        """Wait up to `s` seconds until `is_so` of the LOADs in flight of `pages`; tell whether it is."""
        with self._lock:
            return self._has_moved.wait_for(
                lambda: is_so([self._loading[page] for page in pages if page in self._loading]), s
            )

    def status(self, move: int) -> MoveStatus:
        """Return what has become of a move on this rank."""
        return self._board.own_status(move)

    def close(self) -> None:
        """Have moves that have not begun fail."""
        self._closing.set()
        with self._lock:
            self._has_work.notify_all()

    # The mover's threads.

    def next_run(self, max_moves: int) -> list[Started]:
        """Wait for moves; return the first LOADs, else SAVEs, at most so many. Empty: it is closing."""
        with self._lock:
            while True:
                for waiting in self._waiting.values():  # LOADs first
                    if waiting:
                        return _first(waiting, max_moves)
                if self._closing.is_set():
                    return []
                self._has_work.wait(_IDLE_S)

    def take(self, kind: MoveKind, max_moves: int) -> list[Started]:
        """Return the first moves of a kind, at most so many, without waiting."""
        with self._lock:
            return _first(self._waiting[kind], max_moves)

    def put_back(self, started: Iterable[Started]) -> None:
        """Have moves that were taken wait again."""
        with self._lock:
            for each in started:
                heapq.heappush(self._waiting[each.move.kind], each)

    def wait_for_work(self, kind: MoveKind) -> bool:
        """Wait until there is a move of a kind; False: there is none and the queue is closing."""
        with self._lock:
            while not self._waiting[kind]:
                if self._closing.is_set():
                    return False
                self._has_work.wait(_IDLE_S)
            return True

    def pause(self, seconds: float) -> None:
        """Wait, but not beyond the closing."""
        if seconds:
            self._closing.wait(seconds)

    def enqueued(self, moves: Sequence[Move], mark: Mark | None = None, mark_number: int = 0) -> None:
        """Tell of LOADs that their slots are leased and verified, and that copies come before `mark`."""
        with self._lock:
            for move in moves:
                self._loading[move.page] = Loading(move.number, mark, mark_number)
            self._board.publish_all([(move.number, MoveStatus.ENQUEUED) for move in moves])
            self._has_moved.notify_all()

    def verified(self, move: Move) -> None:
        """Tell of a LOAD that its slot is leased and verified, on a CPU, where nobody waits for a mark."""
        self._board.publish(move.number, MoveStatus.ENQUEUED)

    def end(self, move: Move, status: MoveStatus, seconds: float) -> None:
        """Tell that a move is over: it touches neither page nor slot again."""
        self.end_all([move], [status], seconds)

    def end_all(self, moves: Sequence[Move], statuses: Sequence[MoveStatus], seconds: float) -> None:
        """Tell that moves of one kind are over, which took so long together."""
        if not moves:
            return
        kind = moves[0].kind
        with self._lock:
            self.stats.finished(kind, statuses, self._bundle_bytes, seconds)
            self._num_in_flight -= len(moves)
            self._board.publish_all(
                [(move.number, status) for move, status in zip(moves, statuses, strict=True)]
            )
            if kind == "load":
                for move in moves:
                    del self._loading[move.page]
            self._has_moved.notify_all()


def _first(waiting: list[Started], max_moves: int) -> list[Started]:
    """Take the first moves out of a heap."""
    return [heapq.heappop(waiting) for _ in range(min(max_moves, len(waiting)))]
