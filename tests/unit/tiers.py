"""A node's cache tier for tests: the server's side by hand, and the movers of a TP group's ranks."""

import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Self

import numpy
import torch

from cache_service.keys import PageKey
from cache_service.lease_row import LeaseRow
from cache_service.page_records import CommitStatus, Entry, Grant, Location
from tests.unit.arenas import key, new_store
from workers.kvcache.arena_part import MappedArena
from workers.kvcache.kv_pool import KVPool
from workers.kvcache.layout import target_only
from workers.kvcache.mover import mover_for
from workers.kvcache.page_mover import PageMover
from workers.move_board import MOVE_CAPACITY, MoveBoard, MoveStatus
from workers.plan import LoadPages, SavePages

GROUP = 1
LAYOUT = target_only(1, 4, 1, 8, "float32")
CPU = torch.device("cpu")
TIMEOUT_S = 20


class Meeting:
    """A store at which the ranks of one process meet."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.changed = threading.Condition()

    def set(self, name: str, value: str) -> None:
        with self.changed:
            self.values[name] = value
            self.changed.notify_all()

    def get(self, name: str) -> bytes:
        self.wait([name])
        return self.values[name].encode()

    def wait(self, names: list[str]) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: all(name in self.values for name in names), TIMEOUT_S)


class ToldBoard(MoveBoard):
    """A board that remembers all that its rank told."""

    def __init__(self, *fields) -> None:
        super().__init__(*fields)
        self.told: dict[int, list[MoveStatus]] = defaultdict(list)

    def publish_all(self, told) -> None:
        for move, status in told:
            self.told[move].append(status)
        super().publish_all(told)


def boards(size: int, capacity: int = MOVE_CAPACITY) -> list[ToldBoard]:
    """The board of a group, as each of its ranks maps it."""
    meeting, made = Meeting(), {}

    def meet(rank: int) -> None:
        made[rank] = ToldBoard.shared(meeting, rank, size, capacity)

    threads = [threading.Thread(target=meet, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    return [made[rank] for rank in range(size)]


def eventually(is_so, timeout_s: float = TIMEOUT_S) -> None:
    """Wait until `is_so`."""
    end_s = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < end_s, "it never came to be"
        time.sleep(0.0005)


class Tier:
    """An arena with its store, and a mover for each of `pools`: the ranks' pools, in the order of parts.

    `make` makes the movers, those of their devices if not given, and `options` go to each; moves are numbered
    here.
    """

    def __init__(
        self,
        folder,
        pools: Sequence[KVPool],
        *,
        num_slots=8,
        safety=None,
        board=None,
        make=None,
        **options,
    ):
        num_ranks = len(pools)
        if make is None:
            make = PageMover if pools[0].data.device.type == "cpu" else mover_for
        self.owned, self.store, self.changes = new_store(
            folder,
            safety,
            num_slots=num_slots,
            bundle_bytes=pools[0].layout.bundle_bytes,
            num_ranks=num_ranks,
        )
        self.arena = self.owned.arena
        self.pools = list(pools)
        self.boards = [board] if board else boards(num_ranks)
        self.leases = [LeaseRow(self.arena, row) for row in range(num_ranks)]
        self.movers = [
            make(
                pool, partial(MappedArena, self.arena, self.leases[part]), part, self.boards[part], **options
            )
            for part, pool in enumerate(pools)
        ]
        self.next_move = 1

    @property
    def board(self) -> MoveBoard:
        """Rank 0's."""
        return self.boards[0]

    @property
    def mover(self) -> PageMover:
        """Rank 0's."""
        return self.movers[0]

    def grant(self, num_slots: int = 1) -> list[Grant]:
        grants = self.store.grant(GROUP, num_slots)
        assert len(grants) == num_slots
        return grants

    def save_op(self, pages, grants, keys) -> SavePages:
        """An op for the ranks; its moves have numbers of their own."""
        op = SavePages(
            self._numbers(len(pages)),
            list(pages),
            [grant.slot for grant in grants],
            [grant.epoch for grant in grants],
            list(keys),
        )
        return op

    def load_op(self, pages, locations, keys) -> LoadPages:
        op = LoadPages(
            self._numbers(len(pages)),
            list(pages),
            [location.slot for location in locations],
            [location.epoch for location in locations],
            list(keys),
        )
        return op

    def commit(self, grants, keys, parent: PageKey | None = None) -> list[Location]:
        """Make saved pages readable, each the continuation of the one before."""
        locations = []
        for grant, page_key in zip(grants, keys, strict=True):
            entry = Entry(grant.slot, grant.epoch, page_key, parent, 4)
            (result,) = self.store.commit(GROUP, [entry])
            assert result.status is CommitStatus.COMMITTED, result
            locations.append(result.location)
            parent = page_key
        return locations

    def start(self, op: SavePages | LoadPages) -> None:
        for mover in self.movers:
            mover.start(op)

    def outcome(self, op: SavePages | LoadPages) -> list[MoveStatus]:
        """Wait until an op's moves are over on every rank; return the group's statuses."""
        moves = range(op.first_move, op.first_move + len(op.pages))
        for move in moves:  # one after another: a look at all of them takes long where there are thousands
            eventually(lambda move=move: self.board.is_over(move))
        return [self.board.status(move) for move in moves]

    def run(self, op: SavePages | LoadPages) -> list[MoveStatus]:
        self.start(op)
        return self.outcome(op)

    def save(self, pages, keys, parent: PageKey | None = None) -> list[Location]:
        """Save pages of every rank and make them readable."""
        grants = self.grant(len(pages))
        statuses = self.run(self.save_op(pages, grants, keys))
        assert statuses == [MoveStatus.DONE] * len(statuses), statuses
        return self.commit(grants, keys, parent)

    def give_to_another(self, slot: int, name: str = "another") -> bool:
        """Do what the server does when it needs slots: evict until this one is granted, fill it, commit.

        False where the server could not have it.
        """
        others: list[Grant] = []
        while granted := self.store.grant(GROUP, 1):
            if granted[0].slot == slot:
                for part in range(self.arena.spec.num_ranks):
                    self.arena.bundle(slot, part)[:] = b"\x55" * self.arena.spec.bundle_bytes
                    self.arena.set_checksum(slot, part, 1)
                self.commit(granted, [key(name)])
                break
            others += granted
        self.store.abort(GROUP, others)
        return bool(granted)

    def close(self) -> None:
        for mover in self.movers:
            mover.close()
        for board in self.boards:
            board.close()
        self.owned.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _numbers(self, count: int) -> int:
        first, self.next_move = self.next_move, self.next_move + count
        return first


def pool(seed: int, num_pages: int = 12) -> KVPool:
    """A pool of random bytes; page 0 stays the dummy page."""
    made = KVPool(LAYOUT, num_pages, CPU)
    octets = numpy.random.default_rng(seed).integers(0, 256, (num_pages, LAYOUT.bundle_bytes), numpy.uint8)
    made.data[1:] = torch.from_numpy(octets)
    return made


def keys(count: int) -> list[PageKey]:
    """Names of pages."""
    return [key(number) for number in range(count)]
