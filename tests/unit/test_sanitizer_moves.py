"""KVSanitizer over SAVEs and LOADs: each check fires for its own fault, and none for an honest run."""

import pytest

from cache_service.keys import page_keys
from tests.unit.arenas import key
from tests.unit.engine_plans import NAMESPACE
from tests.unit.test_sanitizer import Rank, fails
from workers.kvcache.page_mover import PageMover
from workers.kvcache.sanitizer import SanitizerError
from workers.move_board import MoveStatus
from workers.plan import CompletePages, LoadPages, OwnPages, SavePages, SetRow

PENDING, ENQUEUED, DONE = MoveStatus.PENDING, MoveStatus.ENQUEUED, MoveStatus.DONE
TORN = MoveStatus.FAILED_TORN
KEY = bytes(key("a page"))
CHECKSUM = 77


class Witness:
    """Moves as a test tells them; every slot holds CHECKSUM's bytes, and so does every page but some."""

    def __init__(self) -> None:
        self.statuses: dict[int, MoveStatus] = {}
        self.wrong_pages: set[int] = set()
        self.asked: list[int] = []
        self.awaited: set[int] = set()
        self.has_arena = True

    def comes_first(self, move: int) -> bool:
        return move in self.awaited

    def status(self, move: int) -> MoveStatus:
        self.asked.append(move)
        return self.statuses.get(move, PENDING)

    def saved_checksum(self, slot: int) -> int | None:
        return CHECKSUM if self.has_arena else None

    def page_checksum(self, page: int, page_key: bytes) -> int:
        return CHECKSUM + (page in self.wrong_pages)


class MovingRank(Rank):
    """A rank whose slot 0 has four tokens in a complete page; its moves do what the witness says."""

    def __init__(self) -> None:
        super().__init__()
        self.witness = Witness()
        self.sanitizer.watch(self.witness)
        self.log.open(0, [1, 2, 3, 4])
        self.step(self.log.plan(s0=4))
        self.log.complete(0)
        self.step(self.log.plan(s0=1))
        self.next_move = 1

    def load(self, page: int | None = None, page_key: bytes = KEY) -> int:
        """Log the LOAD of a page, freshly owned unless given; return its move."""
        if page is None:
            ((page,), _) = self.log.own(1)
        self.page, self.next_move = page, self.next_move + 1
        self.log.ops.append(LoadPages(self.next_move - 1, [page], [3], [2], [page_key]))
        return self.next_move - 1

    def save(self, page: int, page_key: bytes) -> int:
        self.next_move += 1
        self.log.ops.append(SavePages(self.next_move - 1, [page], [3], [1], [page_key]))
        return self.next_move - 1

    def name(self, page_key: bytes = KEY) -> None:
        self.log.ops.append(CompletePages([self.page], [page_key]))

    def read(self) -> None:
        """Run a step of slot 1 whose first page is the loaded one."""
        self.settle()
        log = self.log
        log.open(1, [1, 2, 3, 4, 5])
        log.ops.append(SetRow(1, 0, [self.page], [log.generations[self.page]], [KEY]))
        log.pages[1], log.num_computed[1] = [self.page], 4
        self.fill()
        self.step(log.plan(s1=1))

    def fill(self) -> None:
        self.pool.data[self.page] = 0

    def settle(self) -> None:
        self.apply(self.log.plan())


@pytest.fixture
def rank() -> MovingRank:
    return MovingRank()


def saved_page(rank: MovingRank) -> tuple[int, bytes]:
    return rank.log.pages[0][0], bytes(page_keys(NAMESPACE, [1, 2, 3, 4], 4)[0])


def test_the_mover_is_a_witness() -> None:
    for method in ("status", "saved_checksum", "page_checksum"):
        assert callable(getattr(PageMover, method)) and callable(getattr(Witness, method))


@pytest.mark.parametrize("when_named", ["enqueued", "done"])
def test_an_honest_load_passes(rank: MovingRank, when_named: str) -> None:
    move = rank.load()
    rank.settle()
    rank.witness.statuses[move] = ENQUEUED if when_named == "enqueued" else DONE
    rank.name()
    rank.settle()
    rank.witness.statuses[move] = DONE
    rank.read()
    rank.witness.asked.clear()
    rank.step(rank.log.plan(s1=1))
    assert rank.witness.asked == [], "a LOAD whose page was read is forgotten"
    rank.log.close(1)
    rank.settle()


def test_a_load_from_an_arena_that_was_not_mapped_when_it_was_planned_passes(rank: MovingRank) -> None:
    rank.witness.has_arena = False
    move = rank.load()
    rank.settle()
    rank.witness.has_arena = True
    rank.witness.statuses[move] = DONE
    rank.name()
    rank.read()


def test_an_honest_save_passes(rank: MovingRank) -> None:
    move = rank.save(*saved_page(rank))
    rank.step(rank.log.plan(s0=1))
    rank.witness.statuses[move] = DONE
    rank.log.close(0)
    rank.settle()


def test_load_owned(rank: MovingRank) -> None:
    for page in (rank.log.free[0], rank.log.pages[0][0]):
        rank.load(page)
        with fails("load_owned"):
            rank.settle()


def test_load_owned_for_a_page_that_is_loading(rank: MovingRank) -> None:
    rank.load()
    rank.settle()
    rank.load(rank.page)
    with fails("load_owned"):
        rank.settle()


def test_load_untouched_for_a_page_with_bytes_in_it(rank: MovingRank) -> None:
    ((page,), _) = rank.log.own(1)
    rank.settle()
    rank.pool.data[page, 3] = 0
    rank.load(page)
    with fails("load_untouched"):
        rank.settle()


def test_load_untouched_for_a_page_that_a_row_may_write(rank: MovingRank) -> None:
    rank.log.open(1, [1, 2, 3])
    rank.apply(rank.log.plan(s1=3))
    rank.load(rank.log.pages[1][0])
    with fails("load_untouched"):
        rank.settle()


def test_complete_key(rank: MovingRank) -> None:
    rank.witness.statuses[rank.load()] = DONE
    rank.name(bytes(key("another page")))
    with fails("complete_key"):
        rank.settle()


@pytest.mark.parametrize("status", [status for status in MoveStatus if status not in (ENQUEUED, DONE, TORN)])
def test_complete_loading(rank: MovingRank, status: MoveStatus) -> None:
    move = rank.load()
    rank.settle()
    rank.witness.statuses[move] = status
    rank.name()
    with fails("complete_loading"):
        rank.settle()


def test_page_complete_for_a_loading_page(rank: MovingRank) -> None:
    rank.witness.statuses[rank.load()] = DONE
    with pytest.raises(SanitizerError, match="expected owned, found loading") as caught:
        rank.read()
    assert caught.value.check == "page_owned"


def test_page_loaded(rank: MovingRank) -> None:
    rank.witness.statuses[rank.load()] = ENQUEUED
    rank.name()
    with pytest.raises(SanitizerError) as caught:
        rank.read()
    error = caught.value
    assert (error.check, error.slot, error.page) == ("page_loaded", 1, rank.page)
    assert (error.expected, error.found) == ("a LOAD that is done", "ENQUEUED")


@pytest.mark.parametrize("status", [DONE, TORN])
def test_loaded_bytes(rank: MovingRank, status: MoveStatus) -> None:
    rank.witness.statuses[rank.load()] = status
    rank.witness.wrong_pages.add(rank.page)
    rank.name()
    with fails("loaded_bytes"):
        rank.read()


def test_a_torn_load_that_brought_the_right_bytes_passes(rank: MovingRank) -> None:
    rank.witness.statuses[rank.load()] = TORN
    rank.name()
    rank.read()


@pytest.mark.parametrize("status", [PENDING, ENQUEUED])
def test_free_load(rank: MovingRank, status: MoveStatus) -> None:
    rank.witness.statuses[rank.load()] = status
    rank.settle()
    rank.log.give_back([rank.page])
    with fails("free_load"):
        rank.settle()


@pytest.mark.parametrize("status", [status for status in MoveStatus if status.is_over])
def test_a_page_is_freed_once_its_load_is_over(rank: MovingRank, status: MoveStatus) -> None:
    move = rank.load()
    rank.settle()
    rank.fill()
    rank.witness.statuses[move] = status
    rank.log.give_back([rank.page])
    rank.settle()
    assert rank.pool.is_poisoned(rank.page)


@pytest.mark.parametrize("status", [PENDING, ENQUEUED])
def test_free_save(rank: MovingRank, status: MoveStatus) -> None:
    rank.witness.statuses[rank.save(*saved_page(rank))] = status
    rank.settle()
    rank.log.close(0)
    with fails("free_save"):
        rank.settle()


def test_free_save_within_one_plan(rank: MovingRank) -> None:
    rank.save(*saved_page(rank))
    rank.log.close(0)
    with fails("free_save"):
        rank.settle()


def test_free_save_of_a_page_that_was_saved_before(rank: MovingRank) -> None:
    rank.witness.statuses[rank.save(*saved_page(rank))] = DONE
    rank.settle()
    rank.save(*saved_page(rank))
    rank.settle()
    rank.log.close(0)
    with fails("free_save"):
        rank.settle()


def test_save_complete(rank: MovingRank) -> None:
    for page in (rank.log.pages[0][1], rank.log.free[0]):
        rank.save(page, KEY)
        with fails("save_complete"):
            rank.settle()


def test_save_key(rank: MovingRank) -> None:
    rank.save(saved_page(rank)[0], KEY)
    with fails("save_key"):
        rank.settle()


def test_a_save_of_a_page_whose_load_is_not_done(rank: MovingRank) -> None:
    rank.witness.statuses[rank.load()] = ENQUEUED
    rank.name()
    rank.save(rank.page, KEY)
    with fails("page_loaded"):
        rank.settle()


def test_moves_are_remembered_only_while_the_board_is(rank: MovingRank) -> None:
    """A page read long after its LOAD: the board's word is another move's by then."""
    move = rank.load()
    rank.settle()
    rank.witness.statuses[move] = DONE
    rank.name()
    rank.settle()
    rank.settle()
    del rank.witness.statuses[move]
    rank.witness.asked.clear()
    rank.read()
    assert move not in rank.witness.asked


def test_a_page_loaded_again_under_a_new_generation_passes(rank: MovingRank) -> None:
    first = rank.load()
    rank.settle()
    rank.witness.statuses[first] = MoveStatus.FAILED_STALE
    page = rank.page
    rank.log.give_back([page])
    rank.settle()
    rank.log.ops.append(OwnPages([page], [9]))
    rank.log.generations[page] = 9
    rank.log.free.remove(page)
    rank.witness.statuses[rank.load(page)] = DONE
    rank.name()
    rank.read()
