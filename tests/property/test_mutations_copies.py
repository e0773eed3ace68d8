"""A device's copies against its compute stream, in every order that streams, threads and evictor may take.

A seeded driver takes one operation of one stream, one turn of the mover, or one action of the engine at a
time. Each mechanism that orders them, switched off alone, is caught by a check that has its name.
"""

from dataclasses import replace
from random import Random

import numpy
import pytest

from cache_service.page_records import Grant, Location
from tests.unit.arenas import key
from tests.unit.fake_copies import FakeCuda, FakePinning
from tests.unit.tiers import LAYOUT, Tier, pool
from workers.engine.mechanisms import ALL_ON, Mechanisms
from workers.kvcache import copy_lane
from workers.kvcache.moves import MoveInjection
from workers.move_board import MoveStatus

NUM_PAGES = 12
NUM_SLOTS = 6
NUM_TURNS = 600
BUNDLE = LAYOUT.bundle_bytes


class Life:
    """One seed: an engine that writes, saves, loads and reads pages ahead of what its device has done."""

    def __init__(self, folder, seed: int, mechanisms: Mechanisms, injection: MoveInjection | None) -> None:
        self.chance = Random(seed)
        self.pool = pool(seed, NUM_PAGES)
        self.pages = self.pool.data.numpy()
        # Some lives have no pinned memory, some run out of it, most get it while they go on.
        self.cuda = FakeCuda(False, FakePinning(self.chance.choice([0, 1, 9, 9])))
        self.tier = Tier(
            folder,
            [self.pool],
            num_slots=NUM_SLOTS,
            make=self.cuda,
            mechanisms=mechanisms,
            injection=injection,
            piece_bytes=BUNDLE,
            is_driven=True,
        )
        self.streams = self.cuda.streams
        self.streams.before_copy = self.before_copy
        self.free = list(range(1, NUM_PAGES + 1))
        self.written: dict[int, bytes] = {}  # complete pages: what their last write leaves
        self.saves: dict[int, tuple[int, Grant, bytes]] = {}  # move: page, grant, content
        self.stored: dict[bytes, tuple[Location, bytes]] = {}  # key: place, content
        self.loads: dict[int, tuple[int, bytes, bytes]] = {}  # move: page, key, content
        self.num_read = self.num_stored = self.num_done = 0

    def before_copy(self, kind: str, page: int, address: int) -> None:
        arena = self.tier.arena
        inside = arena.bundles(0).ctypes.data <= address < arena.bundles(0).ctypes.data + NUM_SLOTS * BUNDLE
        if not inside:
            return  # a bounce frame
        assert self.cuda.pinning.holds(address, BUNDLE), "pinned: the device copies memory that is not"
        slot = (address - arena.bundles(0).ctypes.data) // BUNDLE
        assert kind == "save" or arena.is_leased(slot), f"lease: slot {slot} is copied without one"

    # What the engine does, ahead of its device.

    def write(self) -> None:
        """A step writes a whole page."""
        if not self.free:
            return
        page = self.free.pop(self.chance.randrange(len(self.free)))
        content = self.chance.randbytes(BUNDLE)
        self.streams.compute(lambda: self.pages.__setitem__(page, numpy.frombuffer(content, numpy.uint8)))
        self.written[page] = content

    def save(self) -> None:
        busy = {page for page, _, _ in self.saves.values()}
        pages = [page for page in self.written if page not in busy]
        grants = self.tier.store.grant(1, 1) if pages else []
        if not grants:
            return
        page = self.chance.choice(pages)
        op = self.tier.save_op([page], grants, [key(self.written[page])])
        self.tier.mover.start(op)
        self.saves[op.first_move] = (page, grants[0], self.written[page])

    def load(self) -> None:
        """Into a page that an earlier step of another request still writes: what it leaves counts no more."""
        if not self.free or not self.stored:
            return
        page = self.free.pop(self.chance.randrange(len(self.free)))
        name = self.chance.choice(list(self.stored))
        location, content = self.stored[name]
        self.streams.compute(lambda: self.pages.__setitem__(page, 0xEE))
        op = self.tier.load_op([page], [location], [name])
        self.tier.mover.start(op)
        self.loads[op.first_move] = (page, name, content)

    def read(self) -> None:
        """A step reads a page whose LOAD is enqueued, or over."""
        moves = [
            move
            for move in self.loads
            if self.tier.board.status(move) in (MoveStatus.ENQUEUED, MoveStatus.DONE)
        ]
        if not moves:
            return
        page, _, content = self.loads[move := self.chance.choice(moves)]
        self.tier.mover.wait_for([page])

        def check() -> None:
            assert bytes(self.pages[page]) == content, f"read: page {page} before LOAD {move}"
            self.num_read += 1

        self.streams.compute(check)

    def settle(self) -> None:
        """Take in what has come of moves, as rank 0 does: pages are free again once nothing touches them."""
        for move, (page, grant, content) in list(self.saves.items()):
            if self.tier.board.is_over(move):
                status = self.tier.board.status(move)
                assert status in (MoveStatus.DONE, MoveStatus.FAILED_IO), status
                del self.saves[move]
                if status is MoveStatus.FAILED_IO:
                    self.tier.store.abort(1, [grant])
                    continue
                found = bytes(self.tier.arena.bundle(grant.slot, 0))
                assert found == content, f"written: page {page} is saved before its last write"
                name = key(content)
                location = self.tier.store.lookup([name])[0]
                if location is None:
                    (location,) = self.tier.commit([grant], [name])
                else:
                    self.tier.store.abort(1, [grant])
                self.stored[name] = (location, content)
                self.num_stored += 1
        for move, (page, _, content) in list(self.loads.items()):
            if self.tier.board.is_over(move) and not self.streams.ops["compute"]:
                status = self.tier.board.status(move)
                assert status is not MoveStatus.FAILED_TORN, f"torn: LOAD {move}, whose slot is leased"
                if status is MoveStatus.DONE:
                    assert bytes(self.pages[page]) == content, (
                        f"loaded: page {page} is overwritten after its LOAD"
                    )
                    self.num_done += 1
                del self.loads[move]
                self.free.append(page)

    def forget(self) -> None:
        """The request of a page ends, once its SAVE is over and its steps are complete."""
        busy = {page for page, _, _ in self.saves.values()}
        pages = [page for page in self.written if page not in busy]
        if pages and not self.streams.ops["compute"]:
            page = self.chance.choice(pages)
            del self.written[page]
            self.free.append(page)

    def evict(self) -> None:
        """The server needs a slot."""
        if self.stored and self.chance.random() < 0.3:
            name = self.chance.choice(list(self.stored))
            self.tier.give_to_another(self.stored[name][0].slot, str(self.chance.random()))
            if self.tier.store.lookup([name])[0] is None:
                del self.stored[name]
            self.tier.store.check()

    # The driver.

    def turn(self) -> None:
        actions = [
            self.write,
            self.save,
            self.load,
            self.load,
            self.read,
            self.settle,
            self.forget,
            self.evict,
        ]
        others = [
            *(lane.advance for lane in self.tier.mover.lanes),
            *(lambda stream=stream: self.streams.step(stream) for stream in self.streams.ops),
            self.tier.mover.pins().pin_next,
        ]
        for _ in range(3):
            self.chance.choice(others)()
        self.chance.choice(actions)()
        num_bytes = sum(lane.num_in_flight for lane in self.tier.mover.lanes) * BUNDLE
        assert num_bytes <= 2 * copy_lane.MAX_BYTES_IN_FLIGHT, "in_flight: more than is allowed"

    def finish(self) -> None:
        for _ in range(10_000):
            moved = [lane.advance() for lane in self.tier.mover.lanes]
            moved += [self.streams.step(stream) for stream in self.streams.ops]
            if not any(moved):
                break
        self.settle()
        assert not (self.saves or self.loads), "moves that never end"
        assert self.tier.mover.num_in_flight == 0
        assert not self.tier.arena.leases.any(), "lease: one outlives its copy"
        assert self.tier.mover.stats.num_waits["host"] == 0
        self.tier.mover.close()
        assert not self.cuda.pinning.pinned_at, "pinned: a piece is left"
        self.tier.close()


def live(folder, seeds, mechanisms: Mechanisms = ALL_ON, injection=None) -> list[Life]:
    lives = []
    for seed in seeds:
        life = Life(folder, seed, mechanisms, injection)
        try:
            for _ in range(NUM_TURNS):
                life.turn()
            life.finish()
        finally:
            life.tier.close()
        lives.append(life)
    return lives


@pytest.fixture(autouse=True)
def few_bytes_in_flight(monkeypatch):
    """Pages here are tiny: two of them fill a lane, of which each takes several batches."""
    monkeypatch.setattr(copy_lane, "MAX_BYTES_IN_FLIGHT", 3 * BUNDLE)
    monkeypatch.setattr(copy_lane, "BATCH_BYTES", 2 * BUNDLE)


def test_no_order_of_streams_threads_and_evictor_makes_a_wrong_byte(tmp_path) -> None:
    lives = live(tmp_path, range(40))
    assert sum(life.num_read for life in lives) > 500
    assert sum(life.num_stored for life in lives) > 300
    assert sum(life.num_done for life in lives) > 300
    stats = [life.tier.mover.stats for life in lives]
    assert (
        0 < sum(each.num_bounced["load"] for each in stats) < sum(each.num_copies["load"] for each in stats)
    )
    assert sum(each.num_waits["stream"] for each in stats) > 100


def test_nor_do_failures_and_reordering(tmp_path) -> None:
    lives = live(tmp_path, range(100, 120), injection=MoveInjection(1, failure_ratio=0.2, reorder_window=6))
    failed = sum(life.tier.mover.stats.counts["load", MoveStatus.FAILED_IO] for life in lives)
    assert failed > 20 and sum(life.num_done for life in lives) > 100


def first_failure(folder, mechanisms: Mechanisms) -> str:
    """The first check that fires in some seeds, all of which are fine with every mechanism on."""
    with pytest.raises(AssertionError) as caught:
        live(folder, range(40), mechanisms)
    return str(caught.value)


def test_copies_come_after_the_steps_before_them_or_show_it(tmp_path) -> None:
    found = first_failure(tmp_path, replace(ALL_ON, fences_moves=False))
    assert found.startswith(("written: page", "loaded: page", "read: page")), found


def test_a_step_waits_for_what_is_enqueued_or_reads_too_early(tmp_path) -> None:
    found = first_failure(tmp_path, replace(ALL_ON, enqueues_before_waits=False))
    assert found.startswith("read: page"), found


def test_slots_are_leased_until_the_device_has_copied_them_or_show_it(tmp_path) -> None:
    found = first_failure(tmp_path, replace(ALL_ON, leases_whole_copies=False))
    assert found.startswith("lease: slot"), found
