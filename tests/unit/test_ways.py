"""The router's prices of holding, loading, fetching and computing a prompt's KV."""

import pytest

from cluster.router.books import LoadBook
from cluster.router.ways import (
    FIRST_LOAD_PAGE_S,
    FIRST_REMOTE_PAGE_S,
    MAX_HINTS,
    PEER_LATENCY_S,
    REMOTE_LATENCY_S,
    PageTimes,
    Residence,
    Way,
    hints,
    ways,
)
from workers.protocol import FetchHint, LoadReport

PAGE_SIZE = 16
TIMES = PageTimes(load_s=0.001, peer_s=0.002, remote_s=0.004)
TOKEN_S = 0.01
"""A page costs 0.16 s to compute."""
PEER = FetchHint("tcp://b:1", 10)
STORE = FetchHint(None, 12)


def ways_of(residence, prompt_len=200, token_s=TOKEN_S, times=TIMES):
    return ways(residence, prompt_len, PAGE_SIZE, token_s, times)


def test_what_is_nowhere_is_computed():
    assert ways_of(Residence()) == [Way(200, 0.0)]


def test_what_the_device_holds_is_free_and_one_token_is_always_computed():
    assert ways_of(Residence(num_on_device=4)) == [Way(200 - 64, 0.0)]
    assert ways_of(Residence(num_on_device=10), prompt_len=160) == [Way(1, 0.0)]


def test_the_nodes_arena_is_loaded_from_where_that_is_quicker():
    residence = Residence(num_on_device=2, num_in_arena=5)
    load, compute = ways_of(residence)
    assert (load.num_computed_tokens, load.copy_s) == (200 - 80, pytest.approx(3 * 0.001))
    assert compute == Way(200 - 32, 0.0)
    assert ways_of(residence, token_s=1e-6)[0] == compute


def test_an_arena_behind_the_device_is_no_way_of_its_own():
    assert ways_of(Residence(num_on_device=5, num_in_arena=2)) == [Way(200 - 80, 0.0)]


def test_what_is_fetched_is_loaded_too_and_continues_what_the_arena_has():
    fetch = ways_of(Residence(num_on_device=2, num_in_arena=5, elsewhere=[PEER]))[0]
    assert fetch.hint == PEER and fetch.num_computed_tokens == 200 - 160
    assert fetch.copy_s == pytest.approx(PEER_LATENCY_S + 5 * 0.002 + 8 * 0.001)
    # The arena takes no page without its parent: what only the device has is fetched again.
    fetch = ways_of(Residence(num_on_device=5, num_in_arena=2, elsewhere=[PEER]))[0]
    assert fetch.copy_s == pytest.approx(PEER_LATENCY_S + 8 * 0.002 + 5 * 0.001)


def test_sources_are_in_the_order_of_what_they_save():
    residence = Residence(elsewhere=[PEER, STORE])
    assert [way.hint for way in ways_of(residence)] == [STORE, PEER, None], "it reaches further"
    slow_store = PageTimes(load_s=0.001, peer_s=0.002, remote_s=0.1)
    assert [way.hint for way in ways_of(residence, times=slow_store)] == [PEER, STORE, None]
    assert ways_of(residence, token_s=1e-6)[0].hint is None, "computing is quickest"


def test_workers_are_told_of_the_best_sources_whether_or_not_they_beat_computing():
    peers = [FetchHint(f"tcp://peer-{n}:1", n) for n in range(2, 8)]
    told = hints(ways_of(Residence(elsewhere=peers)))
    assert told == peers[: -MAX_HINTS - 1 : -1], "the furthest first"
    assert hints(ways_of(Residence(elsewhere=[PEER]), token_s=1e-6)) == [PEER]
    assert hints(ways_of(Residence(num_in_arena=5))) == []


def test_the_store_costs_its_own_latency():
    only_store = ways_of(Residence(elsewhere=[FetchHint(None, 1)]))[0]
    assert only_store.copy_s == pytest.approx(REMOTE_LATENCY_S + 0.004 + 0.001)


def test_page_times_are_what_the_replica_measured_or_first_guesses():
    book = LoadBook()
    assert book.page_times == PageTimes()
    book.report(LoadReport(0, 0, 0, 8, 8, 0, 0.0, peer_page_s=0.7), now_s=0.0)
    assert book.page_times == PageTimes(FIRST_LOAD_PAGE_S, 0.7, FIRST_REMOTE_PAGE_S)
    book.report(LoadReport(0, 0, 0, 8, 8, 0, 0.0, 0.5, 0.7, 0.9), now_s=0.0)
    assert book.page_times == PageTimes(0.5, 0.7, 0.9)
    book.clear()
    assert book.page_times == PageTimes()
