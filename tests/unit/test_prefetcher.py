"""What is fetched for a prompt, from where, and how long its request waits."""

from dataclasses import replace

import pytest

from cache_service.messages import FetchStatus
from cache_service.server_connection import CallFailure
from tests.unit.fetch_fakes import GUESSES, PAGE_BYTES, PAGE_SIZE, Desk, prompt
from workers.kvcache import prefetcher as module
from workers.kvcache.fetch_costs import FORGET_S
from workers.kvcache.page_pool import Safety
from workers.protocol import FetchHint

PEER, OTHER = "tcp://10.0.0.2:7", "tcp://10.0.0.3:7"
TEN = prompt(10)
KEYS = TEN.keys(0, 10)


def test_the_pages_beyond_device_and_arena_are_asked_of_the_hinted_peer():
    desk = Desk()
    desk.stored.update(KEYS[:3])
    prefetch = desk.begin(TEN, [FetchHint(PEER, 8)])
    ((pages, peer, timeout_s),) = desk.remote.asked
    assert [page.key for page in pages] == KEYS[3:8] and peer == PEER
    assert [page.parent for page in pages] == KEYS[2:7]
    assert {(page.length, page.tenant) for page in pages} == {(PAGE_SIZE, 7)}
    assert timeout_s == pytest.approx(0.7 - module.MARGIN_S), "as long as computing seven pages takes"
    assert prefetch.is_awaited
    desk.remote.answer(1)
    desk.prefetcher.settle(0.1)
    assert not prefetch.is_awaited
    assert [desk.arrivals.location(key) is not None for key in KEYS[3:]] == [True] * 5 + [False] * 2
    assert desk.stats.fetched_pages == {"peer": 5} and desk.stats.num_bytes == {"peer": 5 * PAGE_BYTES}
    assert desk.stats.num_fetches == {"peer": 1} and desk.stats.seconds["peer"] == 0.1
    assert desk.prefetcher.num_pages_in_flight == 0


def test_nothing_is_fetched_where_all_is_there_or_nobody_has_more():
    desk = Desk()
    desk.device.update(KEYS)
    assert desk.begin(TEN, [FetchHint(PEER, 10)]) is None
    assert desk.stats.skipped_pages == {}
    desk.device -= set(KEYS[4:])
    assert desk.begin(TEN, [FetchHint(PEER, 4)]) is None
    assert desk.stats.skipped_pages == {"no_source": 6}
    assert not desk.remote.asked


def test_pages_on_the_device_only_are_fetched_with_what_continues_them():
    desk = Desk()
    desk.device.update(KEYS[:4])
    desk.stored.update(KEYS[:2])
    desk.begin(TEN, [FetchHint(PEER, 10)])
    assert desk.remote.keys(1) == KEYS[2:]


def test_the_remote_store_is_asked_for_what_it_is_known_to_have():
    desk = Desk()
    desk.remote.remote.update(KEYS[:6])
    desk.begin(TEN)
    assert desk.remote.keys(1) == KEYS[:6] and desk.remote.asked[0][1] is None


def test_a_source_that_is_known_twice_is_asked_once_for_the_most_it_may_have():
    desk = Desk()
    desk.remote.remote.update(KEYS[:6])
    hints = [FetchHint(None, 4), FetchHint(PEER, 7), FetchHint(PEER, 8)]
    prefetch = desk.begin(TEN, hints)
    for number in (1, 2):
        desk.remote.answer(number, FetchStatus.MISSING)
        desk.prefetcher.settle(0.1 * number)
    assert [(peer, desk.remote.keys(place)) for place, (_, peer, _) in enumerate(desk.remote.asked, 1)] == [
        (None, KEYS[:6]), (PEER, KEYS[:8]),
    ]  # fmt: skip
    assert not prefetch.is_awaited

    slow = Desk(guesses=replace(GUESSES, remote_bytes_per_s=PAGE_BYTES))
    slow.remote.remote.update(KEYS)
    assert slow.begin(TEN, [FetchHint(None, 10)]) is None
    assert slow.stats.skipped_pages == {"slower": 10}


def test_sources_are_tried_one_after_the_other_for_what_is_still_missing():
    desk = Desk()
    desk.remote.remote.update(KEYS)
    prefetch = desk.begin(TEN, [FetchHint(PEER, 10), FetchHint(OTHER, 10)])
    desk.remote.answer(1, num_first=2)
    desk.prefetcher.settle(0.1)
    assert desk.remote.asked[1][1] == OTHER and desk.remote.keys(2) == KEYS[2:]
    desk.remote.answer(2, FetchStatus.MISSING)
    desk.prefetcher.settle(0.2)
    assert desk.remote.asked[2][1] is None and desk.remote.keys(3) == KEYS[2:]
    assert prefetch.is_awaited
    desk.remote.answer(3, FetchStatus.FAILED)
    desk.prefetcher.settle(0.3)
    assert not prefetch.is_awaited and len(desk.remote.asked) == 3
    assert desk.stats.failed_pages == {
        ("peer", "timed_out"): 8,
        ("peer", "missing"): 8,
        ("remote", "failed"): 8,
    }


def test_what_takes_longer_than_computing_is_computed():
    slow = replace(GUESSES, peer_bytes_per_s=PAGE_BYTES / 0.11)
    desk = Desk(guesses=slow)
    assert desk.begin(TEN, [FetchHint(PEER, 10)]) is None
    assert desk.stats.skipped_pages == {"slower": 10}
    heedless = Desk(guesses=slow, safety=Safety(weighs_fetches=False))
    assert heedless.begin(TEN, [FetchHint(PEER, 10)]) is not None


def test_what_cannot_come_within_the_request_s_patience_is_not_asked_for():
    desk = Desk(policy="timeout", timeout_s=0.1)
    assert desk.begin(TEN, [FetchHint(PEER, 10)]) is None, "it takes 0.11 s, and computing 1 s"
    assert desk.stats.skipped_pages == {"slower": 10}
    patient = Desk(policy="timeout", timeout_s=0.2)
    assert patient.begin(TEN, [FetchHint(PEER, 10)]) is not None


def test_few_pages_are_not_worth_a_sources_latency():
    desk = Desk(guesses=replace(GUESSES, peer_latency_s=0.15))
    assert desk.begin(prompt(1), [FetchHint(PEER, 1)]) is None
    assert desk.begin(TEN, [FetchHint(PEER, 10)]) is not None


def test_measured_rates_decide():
    desk = Desk()
    desk.begin(TEN, [FetchHint(PEER, 10)])
    desk.remote.answer(1, seconds=0.6)
    desk.prefetcher.settle(0.6)
    second = prompt(10, 1000)
    assert desk.begin(second, [FetchHint(PEER, 10)], 1.0) is not None
    desk.remote.answer(2, seconds=0.6)
    desk.prefetcher.settle(1.6)
    desk.prefetcher.costs.prefilled(400, 4.0, 1.6)
    third = prompt(10, 2000)
    assert desk.begin(third, [FetchHint(PEER, 10)], 2.0) is None
    assert desk.stats.skipped_pages == {"slower": 10}
    assert desk.begin(third, [FetchHint(PEER, 10)], 2.0 + FORGET_S) is not None, "it may be fast again"


def test_fetches_under_way_count_as_ahead():
    desk = Desk(guesses=replace(GUESSES, peer_bytes_per_s=PAGE_BYTES / 0.06))
    assert desk.begin(TEN, [FetchHint(PEER, 10)]) is not None
    assert desk.begin(prompt(10, 1000), [FetchHint(OTHER, 10)]) is None
    assert desk.stats.skipped_pages == {"slower": 10}


def test_a_page_is_fetched_once_at_a_time_and_both_requests_wait_for_it():
    desk = Desk()
    first = desk.begin(TEN, [FetchHint(PEER, 10)])
    longer = prompt(12)
    second = desk.begin(longer, [FetchHint(PEER, 12)])
    third = desk.begin(TEN)
    assert len(desk.remote.asked) == 1
    assert first.is_awaited and second.is_awaited and third.is_awaited
    desk.remote.answer(1)
    desk.prefetcher.settle(0.1)
    assert not first.is_awaited and not third.is_awaited
    assert desk.remote.keys(2) == longer.keys(10, 12) and second.is_awaited
    desk.remote.answer(2)
    desk.prefetcher.settle(0.2)
    assert not second.is_awaited


def test_pages_in_flight_are_bounded():
    desk = Desk()
    most = module.MAX_PAGES_IN_FLIGHT
    long = prompt(most + 8)
    assert desk.begin(long, [FetchHint(PEER, most + 8)]) is not None
    assert desk.remote.keys(1) == long.keys(0, most) and desk.prefetcher.num_pages_in_flight == most
    assert desk.begin(prompt(10, 10**6), [FetchHint(PEER, 10)]) is None
    assert desk.stats.skipped_pages == {"busy": 10}


def test_nobody_waits_beyond_the_deadline_for_a_server_that_does_not_answer():
    desk = Desk()
    prefetch = desk.begin(TEN, [FetchHint(PEER, 10)])
    desk.prefetcher.settle(0.99)
    assert prefetch.is_awaited
    desk.prefetcher.settle(1.0)
    assert not prefetch.is_awaited, "computing would be over by now"
    assert desk.prefetcher.num_pages_in_flight == 10, "it may still come"
    desk.prefetcher.settle(1.0 + module.GRACE_S)
    assert desk.prefetcher.num_pages_in_flight == 0
    assert desk.stats.failed_pages == {("peer", "lost"): 10}
    desk.remote.answer(1)
    desk.prefetcher.settle(3.0)
    assert desk.stats.fetched_pages == {}, "the arena's own news tell of it"


def test_without_deadlines_a_request_waits_for_ever():
    desk = Desk(safety=Safety(fetch_deadlines=False))
    prefetch = desk.begin(TEN, [FetchHint(PEER, 10)])
    desk.prefetcher.settle(1e6)
    assert prefetch.is_awaited


def test_a_short_prompt_waits_long_enough_for_a_source_to_say_no():
    desk = Desk()
    desk.begin(prompt(2), [FetchHint(PEER, 2)])
    assert desk.remote.asked[0][2] == pytest.approx(module.MIN_PATIENCE_S - module.MARGIN_S)


def test_under_timeout_a_request_waits_as_long_as_the_user_said_and_each_page_is_allowed():
    desk = Desk(policy="timeout", timeout_s=0.2)
    prefetch = desk.begin(TEN, [FetchHint(PEER, 10)])
    patience_s = 0.2 + 10 * PAGE_BYTES / module.MIN_BYTES_PER_S
    assert desk.remote.asked[0][2] == pytest.approx(patience_s - module.MARGIN_S)
    desk.prefetcher.settle(patience_s - 1e-6)
    assert prefetch.is_awaited
    desk.prefetcher.settle(patience_s)
    assert not prefetch.is_awaited


def test_under_best_effort_nobody_waits_and_pages_come_all_the_same():
    desk = Desk(policy="best_effort")
    prefetch = desk.begin(TEN, [FetchHint(PEER, 10)])
    assert not prefetch.is_awaited and desk.remote.keys(1) == KEYS
    desk.remote.answer(1)
    desk.prefetcher.settle(0.1)
    assert all(desk.arrivals.location(key) is not None for key in KEYS)


def test_who_is_gone_asks_no_further_source():
    desk = Desk()
    prefetch = desk.begin(TEN, [FetchHint(PEER, 10), FetchHint(OTHER, 10)])
    prefetch.end()
    desk.remote.answer(1, FetchStatus.MISSING)
    desk.prefetcher.settle(0.1)
    assert len(desk.remote.asked) == 1


def test_a_source_that_failed_is_left_alone_for_a_while_and_asked_again():
    desk = Desk()
    desk.begin(TEN, [FetchHint(PEER, 10)])
    desk.remote.answer(1, FetchStatus.FAILED)
    desk.prefetcher.settle(0.1)
    assert desk.begin(TEN, [FetchHint(PEER, 10)], 0.2) is None
    assert desk.stats.skipped_pages == {"breaker_open": 10}
    assert desk.begin(TEN, [FetchHint(OTHER, 10)], 0.3) is not None, "another is not to blame"
    desk.remote.answer(2, FetchStatus.MISSING)
    desk.prefetcher.settle(0.4)
    assert desk.begin(TEN, [FetchHint(PEER, 10)], 2.0) is not None
    desk.remote.answer(3, CallFailure("timeout"))
    desk.prefetcher.settle(2.1)
    assert desk.begin(TEN, [FetchHint(PEER, 10)], 3.5) is None, "a second failure is a longer pause"
    assert desk.begin(TEN, [FetchHint(PEER, 10)], 4.2) is not None
    desk.remote.answer(4)
    desk.prefetcher.settle(4.3)
    assert desk.begin(prompt(10, 1000), [FetchHint(PEER, 10)], 4.4) is not None
    assert desk.stats.failed_pages["peer", "timeout"] == 10


def test_a_full_arena_is_not_the_sources_fault_and_no_excuse_for_it():
    desk = Desk()
    desk.begin(TEN, [FetchHint(PEER, 10)])
    desk.remote.answer(1, FetchStatus.NO_SLOT)
    desk.prefetcher.settle(0.1)
    assert desk.begin(TEN, [FetchHint(PEER, 10)], 0.2) is not None
    desk.remote.answer(2, FetchStatus.NO_SLOT, num_first=1)
    desk.prefetcher.settle(0.3)
    assert desk.begin(TEN, [FetchHint(PEER, 10)], 0.4) is None
    assert desk.stats.failed_pages == {("peer", "no_slot"): 11, ("peer", "timed_out"): 9}


@pytest.mark.parametrize("status", [FetchStatus.NO_SLOT, FetchStatus.PRESENT])
def test_an_answer_that_tells_nothing_of_a_failed_source_leaves_it_failed_and_to_be_asked_again(status):
    desk = Desk()
    desk.begin(TEN, [FetchHint(PEER, 10)])
    other = prompt(10, 1000)
    desk.begin(other, [FetchHint(PEER, 10)])
    desk.remote.answer(1, FetchStatus.FAILED)
    desk.prefetcher.settle(0.1)
    desk.remote.answer(2, status)
    desk.prefetcher.settle(0.2)
    desk.arrivals.forget(KEYS)
    assert desk.begin(TEN, [FetchHint(PEER, 10)], 0.3) is None, "it is open still"
    assert desk.begin(TEN, [FetchHint(PEER, 10)], 1.2) is not None, "the probe"
    desk.remote.answer(3, status)
    desk.prefetcher.settle(1.3)
    desk.arrivals.forget(KEYS)
    assert desk.begin(TEN, [FetchHint(PEER, 10)], 1.4) is not None, "the next is the probe again"
    assert desk.begin(other, [FetchHint(PEER, 10)], 1.4) is None, "one at a time"
    desk.remote.answer(4, FetchStatus.MISSING)
    desk.prefetcher.settle(1.5)
    for first in (2000, 3000):
        assert desk.begin(prompt(10, first), [FetchHint(PEER, 10)], 1.6) is not None, "it answers"


def test_an_answer_that_comes_twice_counts_once():
    desk = Desk()
    desk.begin(TEN, [FetchHint(PEER, 10)])
    desk.remote.answer(1)
    desk.remote.answer(1)
    desk.prefetcher.settle(0.1)
    desk.remote.answer(1, FetchStatus.FAILED)
    desk.prefetcher.settle(0.2)
    assert desk.stats.fetched_pages == {"peer": 10} and not desk.stats.failed_pages


def test_pages_that_were_there_by_then_are_neither_fetched_nor_failed():
    desk = Desk()
    prefetch = desk.begin(TEN, [FetchHint(PEER, 10)])
    desk.remote.answer(1, FetchStatus.PRESENT)
    desk.prefetcher.settle(0.1)
    assert not prefetch.is_awaited
    assert desk.stats.skipped_pages == {"present": 10} and not desk.stats.fetched_pages.total()
    assert desk.arrivals.take_origin(KEYS[0]) == "host"
