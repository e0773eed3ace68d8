"""Fake arena: one node's slots, and the client through which a decider knows of them, late.

FakeArena is the truth: what each slot holds, who leases it. FakeClient hears of it in messages that wait
until the test delivers them, as a broadcast's do. The code under test is not used here.
"""

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Literal

from cache_service.keys import PageKey
from cache_service.page_records import Entry, Grant, Location
from workers.move_board import MoveBoard
from workers.plan import SavePages

Contents = tuple[tuple[int | None, ...], bytes]
"""One rank's copy of a page: the tokens it holds, and its bytes where there are any."""


def checksum(contents: Contents) -> int:
    return hash(contents) & (1 << 64) - 1


@dataclass
class Slot:
    epoch: int = 0  # odd: granted
    key: PageKey | None = None  # None: not readable
    parent: PageKey | None = None
    parts: dict[int, Contents] = field(default_factory=dict)
    checksums: dict[int, int] = field(default_factory=dict)


class FakeArena:
    """Takes any page that nobody leases when it needs its slot. Slots come back in whatever order."""

    def __init__(self, num_slots: int, num_ranks: int, chance: Random) -> None:
        self.slots = [Slot() for _ in range(num_slots)]
        self.leases: Counter[tuple[str, int]] = Counter()  # (reader, slot)
        self.index: dict[PageKey, Location] = {}
        self.news: deque[tuple[Literal["stored", "removed"], PageKey, Location]] = deque()
        self.truth: dict[PageKey, tuple[int, ...]] = {}  # what a page of that name has to hold
        self.parents: dict[PageKey, PageKey | None] = {}
        self.gone: dict[PageKey, tuple[PageKey | None, dict[int, Contents]]] = {}
        self._num_ranks = num_ranks
        self._chance = chance

    @property
    def writing(self) -> set[int]:
        return {number for number, slot in enumerate(self.slots) if slot.epoch % 2}

    def is_leased(self, number: int) -> bool:
        return any(num and slot == number for (_, slot), num in self.leases.items())

    def lease(self, reader: str, key: bytes, location: Location) -> bool:
        slot = self.slots[location.slot]
        if slot.key != key or slot.epoch != location.epoch:
            return False
        self.leases[reader, location.slot] += 1
        return True

    def release(self, reader: str, number: int) -> None:
        assert self.leases[reader, number] > 0, f"lease: {reader} gives back slot {number}, which it has not"
        self.leases[reader, number] -= 1

    def grant(self) -> Grant | None:
        number = self._free_slot()
        if number is None:
            return None
        slot = self.slots[number] = Slot(self.slots[number].epoch + 1)
        return Grant(number, slot.epoch)

    def commit(self, entry: Entry) -> bool:
        """False: its key is not in the arena after it."""
        slot = self.slots[entry.slot]
        if slot.epoch != entry.epoch:
            return entry.key in self.index
        assert slot.parts.keys() == set(range(self._num_ranks)), (
            f"commit: a rank has not written slot {entry.slot}"
        )
        for tokens, _ in slot.parts.values():
            assert tokens == self.truth[entry.key], f"commit: slot {entry.slot} holds another's text"
        if entry.key in self.index or (entry.parent is not None and entry.parent not in self.index):
            self.free(entry.slot)
            return entry.key in self.index
        self._store(entry.slot, entry.key, entry.parent)
        return True

    def free(self, number: int) -> None:
        self.slots[number] = Slot(self.slots[number].epoch + 1 & ~1)

    def drop(self, location: Location) -> None:
        """Remove a page for what its bytes are, and all that continue it, as far as nobody reads them."""
        key = self.slots[location.slot].key
        if key is not None and self.index[key] == location and not self.is_leased(location.slot):
            self._remove(key)
            for child in [child for child, place in self.index.items() if self._parent(place) == key]:
                self.drop(self.index[child])

    def evict(self) -> bool:
        """Remove any page that nobody leases and nothing continues."""
        parents = {self._parent(place) for place in self.index.values()}
        idle = [
            key for key, place in self.index.items() if key not in parents and not self.is_leased(place.slot)
        ]
        if idle:
            self._remove(self._chance.choice(idle))
        return bool(idle)

    def corrupt(self) -> None:
        """Flip something in one rank's part of a page that it does not copy just now."""
        part = self._chance.randrange(self._num_ranks)
        places = [place.slot for place in self.index.values() if not self.leases[f"rank {part}", place.slot]]
        if places:
            slot = self.slots[self._chance.choice(places)]
            tokens, data = slot.parts[part]
            slot.parts[part] = (tuple(-1 for _ in tokens), bytes(len(data)))

    def bring_back(self) -> None:
        """Let another replica save a page that was here before."""
        known = [
            key
            for key, (parent, _) in self.gone.items()
            if key not in self.index and (parent is None or parent in self.index)
        ]
        grant = self.grant() if known else None
        if grant is None:
            return
        key = self._chance.choice(known)
        parent, parts = self.gone[key]
        if parent is not None and parent not in self.index:  # it had to go for the grant
            self.free(grant.slot)
            return
        slot = self.slots[grant.slot]
        slot.parts = dict(parts)
        slot.checksums = {part: checksum(contents) for part, contents in parts.items()}
        self._store(grant.slot, key, parent)

    def _parent(self, place: Location) -> PageKey | None:
        return self.slots[place.slot].parent

    def _free_slot(self) -> int | None:
        while True:
            free = [n for n, slot in enumerate(self.slots) if slot.key is None and not slot.epoch % 2]
            if free:
                return self._chance.choice(free)
            if not self.evict():
                return None

    def _store(self, number: int, key: PageKey, parent: PageKey | None) -> None:
        slot = self.slots[number]
        slot.epoch, slot.key, slot.parent = slot.epoch + 1, key, parent
        self.index[key] = Location(number, slot.epoch)
        self.gone[key] = (parent, dict(slot.parts))
        self.news.append(("stored", key, self.index[key]))

    def _remove(self, key: PageKey) -> None:
        location = self.index.pop(key)
        self.news.append(("removed", key, location))
        self.free(location.slot)


class FakeClient:
    """HostCache over a FakeArena. Messages go out, and news come in, when `deliver` is called."""

    READER = "decider"
    MAX_GRANTS = 3

    def __init__(self, arena: FakeArena, moves: MoveBoard, chance: Random) -> None:
        self.arena = arena
        self._moves = moves
        self.view: dict[PageKey, Location] = {}
        self.grants: deque[Grant] = deque()
        self.touched: set[PageKey] = set()
        self.was_saved: set[PageKey] = set()  # keys this replica has committed, whatever came of it
        self._chance = chance
        self._messages: deque[Entry | Grant | Location] = deque()
        self._lost: list[PageKey] = []
        self._saving: dict[Grant, tuple[int, PageKey]] = {}  # moves that are neither committed nor aborted

    def locate(self, key: PageKey) -> Location | None:
        return self.view.get(key)

    def acquire(self, keys: Sequence[PageKey], locations: Sequence[Location]) -> int:
        num = 0
        for key, location in zip(keys, locations, strict=True):
            if not self.arena.lease(self.READER, key, location):
                break
            num += 1
        return num

    def release(self, slots: Iterable[int]) -> None:
        for slot in slots:
            self.arena.release(self.READER, slot)

    def take_grant(self) -> Grant | None:
        return self.grants.popleft() if self.grants else None

    def commit(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            saved = self._end_save(Grant(entry.slot, entry.epoch))
            assert saved == entry.key, f"commit: slot {entry.slot} was granted for another page"
            self.was_saved.add(entry.key)
            self._messages.append(entry)

    def abort(self, grants: Sequence[Grant]) -> None:
        for grant in grants:
            self._end_save(grant)
            self._messages.append(grant)

    def touch(self, keys: Sequence[PageKey]) -> None:
        self.touched.update(keys)

    def report_corrupt(self, location: Location) -> None:
        self._messages.append(location)

    def take_lost(self) -> list[PageKey]:
        lost, self._lost = self._lost, []
        return lost

    def note(self, op: SavePages) -> None:
        """Remember which page each slot was granted for."""
        for place, (slot, epoch, key) in enumerate(zip(op.slots, op.epochs, op.keys, strict=True)):
            self._saving[Grant(slot, epoch)] = (op.first_move + place, PageKey(key))

    def is_saving(self, key: bytes) -> bool:
        return any(saved == key for _, saved in self._saving.values())

    @property
    def is_quiet(self) -> bool:
        return not self._messages and not self.arena.news

    def deliver(self, num: int) -> None:
        """Pass on up to so many messages and as many news; fetch a grant."""
        for _ in range(min(num, len(self._messages))):
            self._send(self._messages.popleft())
        for _ in range(min(num, len(self.arena.news))):
            self._hear(*self.arena.news.popleft())
        if num and len(self.grants) < self.MAX_GRANTS and (grant := self.arena.grant()) is not None:
            self.grants.append(grant)

    def restart_server(self) -> None:
        """The server comes back: no grant holds, messages are lost, the index is told anew."""
        for number in self.arena.writing:
            self.arena.free(number)
        self.grants.clear()
        self._lost += [message.key for message in self._messages if isinstance(message, Entry)]
        self._messages.clear()
        self.arena.news.clear()
        self._lost += self.view.keys() - self.arena.index.keys()
        self.view = dict(self.arena.index)

    def _end_save(self, grant: Grant) -> PageKey:
        """A page's fate is decided once its parent's is, if that is saved before it."""
        move, key = self._saving.pop(grant)
        for earlier, saved in self._saving.values():
            is_pending = earlier < move and not self._moves.is_over(earlier)
            assert not is_pending or saved != self.arena.parents[key], (
                f"order: slot {grant.slot} comes before its parent, whose SAVE is under way"
            )
        return key

    def _send(self, message: Entry | Grant | Location) -> None:
        match message:
            case Entry():
                if not self.arena.commit(message):
                    self._lost.append(message.key)
            case Grant() if self.arena.slots[message.slot].epoch == message.epoch:
                self.arena.free(message.slot)
            case Location():
                self.arena.drop(message)
            case _:
                pass

    def _hear(self, kind: Literal["stored", "removed"], key: PageKey, location: Location) -> None:
        if kind == "stored":
            self.view[key] = location
        elif self.view.get(key) == location:
            del self.view[key]
            self._lost.append(key)
