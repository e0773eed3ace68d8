"""What fetching and computing pages is said to take, before anything is measured and after."""

import pytest

from tests.unit.fetch_fakes import GUESSES, PAGE_BYTES, PAGE_SIZE
from workers.kvcache.fetch_costs import FORGET_S, MIN_PREFILL_TOKENS, FetchCosts, Pace, PageTimes
from workers.kvcache.moves import MoveStats
from workers.move_board import MoveStatus

COMPUTE_PAGE_S = PAGE_SIZE / GUESSES.prefill_tokens_per_s


def new_costs(**options):
    return FetchCosts(PAGE_BYTES, PAGE_SIZE, GUESSES, **options)


def test_until_something_is_measured_guesses_count():
    costs = new_costs()
    assert costs.fetch_s("peer", 10, 0, 0.0) == pytest.approx(0.01 + 10 * 0.01)
    assert costs.fetch_s("peer", 10, 5, 0.0) == pytest.approx(0.01 + 15 * 0.01)
    assert costs.fetch_s("remote", 10, 0, 0.0) == pytest.approx(0.02 + 10 * 0.02)
    assert costs.compute_s(10, 0.0) == pytest.approx(10 * COMPUTE_PAGE_S)
    assert costs.page_times(0.0) == PageTimes(None, None, None)


def test_what_a_source_takes_beyond_its_latency_is_its_rate():
    costs = new_costs()
    costs.fetched("peer", 10, 10, 0.01 + 4.0, 1.0)
    assert costs.page_times(1.0) == PageTimes(None, pytest.approx(0.2), None)
    assert costs.fetch_s("peer", 1, 0, 1.0) == pytest.approx(0.01 + 0.2)
    assert costs.fetch_s("remote", 1, 0, 1.0) == pytest.approx(0.02 + 0.02), (
        "the other kind is another's matter"
    )
    costs.fetched("peer", 0, 10, 60.0, 1.0)
    assert costs.page_times(1.0).peer_s == pytest.approx(0.2), "nothing came: that tells no rate"


def test_a_source_that_was_slow_long_ago_is_unknown():
    costs = new_costs()
    costs.fetched("remote", 1, 0, 50.0, 1.0)
    assert costs.page_times(1.0 + FORGET_S).remote_s is not None
    assert costs.page_times(1.1 + FORGET_S).remote_s is None
    costs.fetched("remote", 1, 0, 0.02 + 0.1, 2.0 + FORGET_S)
    assert costs.page_times(2.0 + FORGET_S).remote_s == pytest.approx(0.1), "the old sample is forgotten"


def test_new_samples_count_more_and_large_ones_too():
    pace = Pace(9.0)
    pace.measured(100, 100.0, 0.0)
    pace.measured(100, 300.0, 0.0)
    assert 2.0 < pace.seconds(1, 0.0) < 3.0
    pace.measured(1, 1000.0, 0.0)
    for _ in range(30):
        pace.measured(100, 100.0, 0.0)
    assert pace.seconds(10, 1e9) == pytest.approx(10.0, rel=0.05)


def test_computing_is_measured_by_steps_that_compute_enough_of_prompts():
    costs = new_costs()
    costs.prefilled(MIN_PREFILL_TOKENS - 1, 100.0, 0.0)
    assert costs.compute_s(1, 0.0) == pytest.approx(COMPUTE_PAGE_S)
    costs.prefilled(200, 1.0, 0.0)
    assert costs.compute_s(1, 1e6) == pytest.approx(PAGE_SIZE / 200)


def test_a_fetched_page_is_loaded_too():
    moves = MoveStats()
    costs = new_costs(moves=moves)
    before_s = costs.fetch_s("peer", 10, 5, 0.0)
    for _ in range(4):
        moves.finished("load", [MoveStatus.DONE], PAGE_BYTES, 0.05)
    assert costs.page_times(0.0).load_s == pytest.approx(0.05)
    assert costs.fetch_s("peer", 10, 5, 0.0) == pytest.approx(before_s + 0.5)
