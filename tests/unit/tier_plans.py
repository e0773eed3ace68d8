"""Plans written by hand that move pages: a decider over a Tier, and a simple one."""

import threading

from cache_service.keys import PageKey, page_keys
from cache_service.page_records import Grant, Location
from tests.unit.engine_plans import NAMESPACE, PlanLog
from tests.unit.tiers import Tier
from workers.engine.engine import Engine
from workers.kvcache.moves import Move, MoveInjection, MoveKind
from workers.move_board import MoveStatus
from workers.plan import CompletePages, LoadPages, SavePages


class Gate:
    """Stops moves of one kind in the middle of their copies while it is closed; remembers them."""

    def __init__(self, kind: MoveKind = "load") -> None:
        self.kind = kind
        self.opened = threading.Event()
        self.opened.set()
        self.stopped: list[Move] = []

    def __call__(self, move: Move) -> None:
        if move.kind == self.kind and not self.opened.is_set():
            self.stopped.append(move)
            assert self.opened.wait(20)

    @property
    def injection(self) -> MoveInjection:
        return MoveInjection(0, during_copy=self)

    def open_after(self, seconds: float) -> None:
        threading.Timer(seconds, self.opened.set).start()


class TierLog(PlanLog):
    """A PlanLog whose slots' pages go to a tier and come back."""

    def __init__(self, tier: Tier, page_size: int = 4, num_pages: int = 40) -> None:
        super().__init__(page_size, num_pages)
        self.tier = tier
        self.locations: dict[PageKey, Location] = {}

    def names(self, slot: int) -> list[PageKey]:
        """Keys of the whole pages of what a slot has so far."""
        return self.names_of(self.tokens[slot])

    def names_of(self, token_ids: list[int]) -> list[PageKey]:
        return page_keys(NAMESPACE, token_ids, self.page_size)

    def start_save(self, slot: int) -> SavePages:
        """Log a SAVE of a slot's complete pages."""
        names = self.names(slot)[: self.num_computed[slot] // self.page_size]
        op = self.tier.save_op(self.pages[slot][: len(names)], self.tier.grant(len(names)), names)
        self.ops.append(op)
        return op

    def commit_save(self, op: SavePages) -> None:
        """Wait for a SAVE and make its pages readable."""
        assert set(self.tier.outcome(op)) == {MoveStatus.DONE}
        grants = [Grant(slot, epoch) for slot, epoch in zip(op.slots, op.epochs, strict=True)]
        names = [PageKey(name) for name in op.keys]
        self.locations |= zip(names, self.tier.commit(grants, names), strict=True)

    def keep(self, engine: Engine, slot: int) -> None:
        """Complete, save and commit all whole pages of a slot, then close it."""
        self.complete(slot)
        op = self.start_save(slot)
        self.run(engine)
        self.commit_save(op)
        self.close(slot)

    def load(self, slot: int, num_pages: int) -> LoadPages:
        """Log a LOAD of an open slot's first pages into pages of their own."""
        names = self.names(slot)[:num_pages]
        pages, _ = self.own(num_pages)
        op = self.tier.load_op(pages, [self.locations[name] for name in names], names)
        self.ops.append(op)
        return op

    def use(self, slot: int, op: LoadPages) -> None:
        """Name loaded pages, and start a slot on them."""
        self.ops.append(CompletePages(op.pages, op.keys))
        self.share(slot, op.pages)
