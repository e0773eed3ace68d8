"""The contract of pages over a node's arena, over a peer's, and over an arena with a disk store behind it."""

import functools

import pytest

from cache_service import messages
from cache_service.page_records import CommitStatus
from cache_service.remote import GetStatus, PutStatus
from tests.unit.arena_pages import ARENA_BYTES, ArenaHarness
from tests.unit.page_contract import LAYOUT, TIMEOUT_S, PageContract, key_of, remove_records


@pytest.fixture
def make_harness(tmp_path):
    made = []

    def make(**options):
        made.append(ArenaHarness(tmp_path, **options))
        return made[-1]

    yield make
    for harness in made:
        harness.close()


class TestArena(PageContract):
    keeps_other_layouts = False

    @pytest.fixture
    def harness(self, make_harness):
        return make_harness()

    def test_pinned_pages_stay_when_others_make_room(self, harness, store):
        pinned, *others = self.pages(harness, range(200))
        store.put([pinned], TIMEOUT_S)
        (worker,) = harness.workers
        assert worker.ask(messages.Pin([pinned.key])) == messages.Done(1)
        num_rounds = 3 * ARENA_BYTES // LAYOUT.slot_bytes // len(others)
        for number in range(num_rounds):
            renamed = self.pages(harness, range(1_000 * number, 1_000 * number + len(others)))
            assert set(store.put(renamed, TIMEOUT_S).results) <= {PutStatus.STORED, PutStatus.PRESENT}
        (buffer,) = self.buffers(harness, [pinned.key])
        assert store.get([buffer], TIMEOUT_S).results[0].status is GetStatus.FOUND
        assert buffer.data == pinned.data
        assert None in worker.find([page.key for page in others])


class TestArenaOfAPeer(PageContract):
    keeps_other_layouts = False

    @pytest.fixture
    def harness(self, make_harness):
        return make_harness(num_nodes=2)


class TestArenaOverDisk(PageContract):
    @pytest.fixture
    def harness(self, make_harness, tmp_path):
        folder = tmp_path / "store"
        return make_harness(
            store=f"disk:{folder}?gb=1", remove_records=functools.partial(remove_records, folder)
        )


def test_a_tenant_takes_no_more_than_its_part(make_harness):
    harness = make_harness(tenant_ratio=0.01)
    harness.open(LAYOUT)
    (worker,) = harness.workers
    contract = PageContract()
    pages = contract.pages(harness, range(60))
    assert worker.write(pages, tenant=5) == [CommitStatus.COMMITTED] * len(pages)
    share = harness.nodes[0].arena.spec.num_slots // 100
    assert sum(where is not None for where in worker.find([page.key for page in pages])) == share < 60
    (other,) = contract.pages(harness, [100])
    assert worker.write([other], tenant=6) == [CommitStatus.COMMITTED]
    assert worker.find([key_of(100)]) != [None]
