"""What a fetch does to the arena: slots, joins, parents, deadlines, and slots that are written late."""

import threading
import time
from collections import Counter

import pytest

from cache_service.arena_safety import ArenaSafety
from cache_service.arena_user import ArenaAccess
from cache_service.fetcher import MAX_TIMEOUT_S, Fetcher, FetchLimits
from cache_service.inbox import Inbox
from cache_service.lease_row import LeaseRow
from cache_service.messages import Fetch, FetchStatus, WantedPage
from cache_service.remote import GetStatus
from tests.unit.arenas import key, new_store, store_chain
from tests.unit.cache_nodes import eventually
from tests.unit.fake_source import FakeSource

GROUP, ROW, TIMEOUT_S = 99, 3, 20.0
PEER = "tcp://peer:1"
FETCHED, PRESENT, MISSING, CORRUPT, NO_SLOT, TIMED_OUT, FAILED = FetchStatus


def chain(names, parent=None):
    """Pages that continue each other."""
    wanted = []
    for name in names:
        wanted.append(WantedPage(key(name), parent, 16))
        parent = key(name)
    return wanted


class Node:
    """A fetcher over a small arena, driven by the test's thread."""

    def __init__(self, folder, limits=None, safety=None, **spec):
        self.owned, self.store, _ = new_store(folder, safety, **spec)
        self.arena = self.owned.arena
        self.source = FakeSource()
        self.sources = {PEER: self.source}
        self.inbox = Inbox()
        self.counts = Counter()
        self.now_s = 0.0
        limits = limits or FetchLimits(slots_ratio=1.0)
        self.fetcher = Fetcher(self.inbox, self.sources.get, self.counts, limits, lambda: self.now_s)
        self.leases = LeaseRow(self.arena, ROW)
        self.fetcher.begin(ArenaAccess(self.arena, self.store, GROUP, self.leases))

    def fetch(self, pages, timeout_s=10.0, peer=PEER):
        """Begin a fetch; return the list that its answer goes into."""
        answers = []
        self.fetcher.fetch(Fetch(pages, peer, timeout_s), answers.append)
        return answers

    def turn(self):
        self.inbox.run()
        self.fetcher.tick(self.now_s)
        self.store.check()

    def statuses(self, answers):
        """Wait for a fetch's answer."""

        def has_come():
            self.turn()
            return answers

        (answer,) = eventually(has_come)
        return [result.status for result in answer.results]

    def is_intact(self, name):
        (location,) = self.store.lookup([key(name)])
        data = self.arena.slot_data(location.slot)
        return data == key(name) * (len(data) // 16)

    def close(self):
        self.source.go.set()
        for batch in self.source.batches:
            batch.quiet.set()
        assert self.fetcher.end() and self.fetcher.close(TIMEOUT_S)
        assert self.leases.num_leased == 0
        self.inbox.close()
        self.owned.close()


@pytest.fixture
def node(tmp_path):
    node = Node(tmp_path)
    yield node
    node.close()


def test_pages_come_into_the_store_with_what_was_wanted_of_them(node):
    assert node.statuses(node.fetch(chain("abc"))) == [FETCHED] * 3
    assert all(node.is_intact(name) for name in "abc")
    (location,) = node.store.lookup([key("b")])
    assert (node.arena.parent(location.slot), node.arena.length(location.slot)) == (key("a"), 16)
    assert node.store.num_writing == 0
    assert node.counts["fetched", "fetched"] == 3
    assert node.counts["fetch_bytes", "peer"] == 3 * node.arena.spec.slot_bytes


def test_no_thread_is_left_of_a_source_that_has_answered(node):
    def threads():
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("fetch-")]

    node.statuses(node.fetch(chain("abc")))
    eventually(lambda: node.turn() or not threads())


def test_what_is_here_is_not_asked_for_and_makes_no_room_for_the_rest(node):
    store_chain(node.store, node.arena, "abcd")
    answers = node.fetch(chain("abcdefghij"))
    assert node.statuses(answers) == [PRESENT] * 4 + [FETCHED] * 4 + [NO_SLOT] * 2
    assert node.source.asked == [[key(name) for name in "efgh"]]
    assert answers[0].results[0].location == node.store.lookup([key("a")])[0]
    assert node.leases.num_leased == 0


def test_fetches_of_one_page_are_one(node):
    node.source.go.clear()
    first, second = node.fetch(chain("abc")), node.fetch(chain("bcd", key("a")))
    eventually(lambda: len(node.source.asked) == 2)
    assert node.source.asked == [[key("a"), key("b"), key("c")], [key("d")]]
    node.turn()
    assert not first and not second
    node.source.go.set()
    assert node.statuses(first) == node.statuses(second) == [FETCHED] * 3


def test_a_page_waits_for_the_one_it_continues_or_goes_with_it(tmp_path):
    node = Node(tmp_path)
    slow, quick = FakeSource(), node.source
    node.sources["slow"] = slow
    for status, expected in ((GetStatus.FOUND, FETCHED), (GetStatus.CORRUPT, CORRUPT)):
        slow.go.clear()
        slow.statuses[key("a")] = status
        parents, children = node.fetch(chain("a"), peer="slow"), node.fetch(chain("bc", key("a")))
        eventually(lambda: quick.batches)
        for _ in range(3):
            node.turn()
        assert not children and node.store.num_ready == 0
        slow.go.set()
        assert node.statuses(parents) == [expected]
        assert node.statuses(children) == [expected] * 2
        assert node.store.num_writing == 0
        node.store.clear()
        quick.batches.clear()
    node.close()


def test_a_page_without_the_one_it_continues_is_not_asked_for(node):
    assert node.statuses(node.fetch(chain("ab", key("x")))) == [MISSING] * 2
    assert node.source.asked == []


def test_pages_behind_one_that_did_not_come_do_not_count(node):
    node.source.statuses = {key("b"): GetStatus.MISSING}
    assert node.statuses(node.fetch(chain("abc"))) == [FETCHED, MISSING, MISSING]
    assert node.store.num_ready == 1 and node.store.num_writing == 0


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (GetStatus.MISSING, MISSING),
        (GetStatus.FOREIGN, MISSING),
        (GetStatus.CORRUPT, CORRUPT),
        (GetStatus.TIMED_OUT, TIMED_OUT),
        (GetStatus.FAILED, FAILED),
    ],
)
def test_each_way_to_miss_is_told_and_counted(node, status, expected):
    node.source.statuses = {key("a"): status}
    assert node.statuses(node.fetch(chain("a"))) == [expected]
    assert node.counts["fetched", expected.name.lower()] == 1
    assert node.store.num_ready == node.store.num_writing == 0


def test_without_a_source_nothing_is_fetched(node):
    assert node.statuses(node.fetch(chain("a"), peer=None)) == [FAILED]
    assert node.counts["fetches_refused", "no_source"] == 1


@pytest.mark.parametrize("quiet", [True, False])
def test_slots_that_may_be_written_late_are_given_to_nobody(tmp_path, quiet):
    node = Node(tmp_path, safety=ArenaSafety(quiet=quiet))
    node.source.is_quiet = False
    node.source.statuses = dict.fromkeys((key("a"), key("b")), GetStatus.TIMED_OUT)
    assert node.statuses(node.fetch(chain("ab"))) == [TIMED_OUT] * 2
    assert node.fetcher.num_lingering == (2 if quiet else 0)
    stored = store_chain(node.store, node.arena, "cdefgh" if quiet else "cdefghij")
    for buffer in node.source.buffers[0]:  # what was given up arrives after all
        buffer.data[:] = b"\xff" * len(buffer.data)
    torn = [page_key for page_key in stored if not is_intact(node, page_key)]
    assert bool(torn) != quiet, "late bytes went into slots of other pages"
    if quiet:
        assert node.store.grant(1, 1) == [] or node.store.num_evicted
    node.source.batches[0].quiet.set()
    node.turn()
    assert node.fetcher.num_lingering == 0
    node.close()


def is_intact(node, page_key):
    (location,) = node.store.lookup([page_key])
    data = node.arena.slot_data(location.slot)
    return data == page_key * (len(data) // 16)


def test_a_call_is_answered_at_its_deadline_and_the_page_may_still_come(node):
    node.source.go.clear()
    first = node.fetch(chain("ab"), timeout_s=10.0)
    joined = node.fetch(chain("a"), timeout_s=1.0)
    assert node.fetcher.next_deadline_s == 1.0
    node.now_s = 1.0
    assert node.statuses(joined) == [TIMED_OUT]
    assert not first and node.fetcher.next_deadline_s == 10.0
    node.source.go.set()
    assert node.statuses(first) == [FETCHED] * 2
    assert len(joined) == 1


def test_what_waits_for_a_thread_beyond_its_deadline_is_not_asked_for(tmp_path):
    node = Node(tmp_path, FetchLimits(max_source_threads=1, slots_ratio=1.0))
    node.source.go.clear()
    first, second = node.fetch(chain("a")), node.fetch(chain("b"), timeout_s=1.0)
    eventually(lambda: node.source.asked)
    node.now_s = 2.0
    assert node.statuses(second) == [TIMED_OUT]
    assert node.store.num_writing == 2, "it is the thread that gives the slots back"
    node.source.go.set()
    assert node.statuses(first) == [FETCHED]
    eventually(lambda: node.turn() or node.store.num_writing == 0)
    assert node.source.asked == [[key("a")]]
    node.close()


def test_too_much_at_once_is_refused(tmp_path):
    node = Node(tmp_path, FetchLimits(max_fetches=2, slots_ratio=0.5))
    node.source.go.clear()
    first = node.fetch(chain("abcde"))
    assert node.statuses(node.fetch(chain("x"))) == [NO_SLOT]
    assert node.counts["fetches_refused", "slots"] == 2
    node.source.go.set()
    assert node.statuses(first) == [FETCHED] * 4 + [NO_SLOT]
    node.source.go.clear()
    waiting = [node.fetch(chain("p")), node.fetch(chain("q"))]
    assert node.statuses(node.fetch(chain("r"))) == [NO_SLOT]
    assert node.counts["fetches_refused", "calls"] == 1
    node.source.go.set()
    assert [node.statuses(answers) for answers in waiting] == [[FETCHED]] * 2
    node.close()


def test_a_source_that_hangs_keeps_no_other_waiting_and_gets_no_more_questions(tmp_path):
    limits = FetchLimits(max_per_source=3, slots_ratio=1.0)
    node = Node(tmp_path, limits)
    hung, store = FakeSource(), FakeSource()
    node.sources |= {"hung": hung, None: store}
    hung.go.clear()
    waiting = [node.fetch(chain(name), peer="hung") for name in "abc"]
    assert node.statuses(node.fetch(chain("d"), peer="hung")) == [NO_SLOT]
    assert node.counts["fetches_refused", "source"] == 1
    assert (
        node.statuses(node.fetch(chain("x"))) == node.statuses(node.fetch(chain("y"), peer=None)) == [FETCHED]
    )
    eventually(lambda: len(hung.asked) == limits.max_source_threads)
    hung.go.set()
    assert [node.statuses(answers) for answers in waiting] == [[FETCHED]] * 3
    assert node.statuses(node.fetch(chain("d"), peer="hung")) == [FETCHED]
    node.close()


def test_what_a_worker_saved_meanwhile_is_present(node):
    node.source.go.clear()
    answers = node.fetch(chain("ab"))
    store_chain(node.store, node.arena, "a")
    node.source.go.set()
    assert node.statuses(answers) == [PRESENT, FETCHED]


def test_all_ranks_come_together(tmp_path):
    node = Node(tmp_path, num_ranks=2)
    node.source.num_ranks = 2
    assert node.statuses(node.fetch(chain("ab"))) == [FETCHED] * 2
    assert all(node.is_intact(name) for name in "ab")
    node.close()


@pytest.mark.parametrize("num_checksums", [0, 1, 3])
def test_an_answer_with_checksums_too_few_or_too_many_is_a_failure_and_leaves_no_slot_behind(
    tmp_path, num_checksums
):
    node = Node(tmp_path, num_ranks=2)
    node.source.num_ranks = num_checksums
    assert node.statuses(node.fetch(chain("ab"))) == [FAILED] * 2
    assert node.counts["fetched", "failed"] == 2
    node.source.statuses = {key("a"): GetStatus.MISSING}
    assert node.statuses(node.fetch(chain("abc")))[0] is MISSING
    assert node.store.num_writing == node.store.num_ready == 0
    node.close()


def test_a_source_that_breaks_is_a_failure_whose_slots_stay_granted(node):
    node.source.get = lambda pages, timeout_s: 1 / 0
    assert node.statuses(node.fetch(chain("ab"))) == [FAILED] * 2
    assert node.store.num_writing == node.fetcher.num_lingering == 2
    node.fetcher._lingering.clear()  # for the fixture, which ends in good order


def test_the_arenas_end_answers_every_fetch_and_says_what_still_goes_on(tmp_path):
    node = Node(tmp_path)
    node.source.go.clear()
    answers = node.fetch(chain("ab"))
    eventually(lambda: node.source.asked)
    began_s = time.monotonic()
    assert not node.fetcher.end(), "a thread is in the source"
    assert time.monotonic() - began_s < TIMEOUT_S
    assert [result.status for result in answers[0].results] == [FAILED] * 2
    assert node.statuses(node.fetch(chain("c"))) == [FAILED], "without an arena"
    node.source.go.set()
    eventually(lambda: node.source.batches)
    node.close()


@pytest.mark.parametrize("timeout_s", [float("inf"), float("nan"), 1e9])
def test_no_fetch_waits_for_ever(node, timeout_s):
    node.source.go.clear()
    answers = node.fetch(chain("a"), timeout_s)
    assert node.fetcher.next_deadline_s == MAX_TIMEOUT_S
    eventually(lambda: node.source.asked)
    node.now_s = MAX_TIMEOUT_S
    assert node.statuses(answers) == [TIMED_OUT]
