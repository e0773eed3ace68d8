import pytest

from cache_service.breaker import Breaker


def opened(now_s=0.0):
    breaker = Breaker(max_failures=3, retry_s=1.0, max_retry_s=3.0)
    for _ in range(3):
        assert breaker.allows(now_s)
        breaker.failed(now_s)
    assert breaker.state == "open" and breaker.num_opened == 1
    return breaker


def test_it_opens_after_failures_in_a_row_only():
    breaker = Breaker(max_failures=3, retry_s=1.0, max_retry_s=3.0)
    for _ in range(5):
        breaker.failed(0.0)
        breaker.failed(0.0)
        breaker.succeeded()
    assert breaker.state == "closed" and breaker.allows(0.0)
    assert opened().allows(0.5) is False


def test_after_the_pause_exactly_one_call_goes_out():
    breaker = opened(10.0)
    assert not breaker.allows(10.9)
    assert breaker.allows(11.0)
    assert breaker.state == "half_open"
    assert not breaker.allows(11.0) and not breaker.allows(50.0)
    breaker.succeeded()
    assert breaker.state == "closed" and breaker.allows(11.1)


def test_vain_probes_double_the_pause_up_to_its_limit_and_an_answer_resets_it():
    breaker = opened()
    now_s = 0.0
    for pause_s in (1.0, 2.0, 3.0, 3.0):
        assert not breaker.allows(now_s + pause_s - 0.01)
        now_s += pause_s
        assert breaker.allows(now_s)
        breaker.failed(now_s)
    breaker.succeeded()
    for _ in range(3):
        breaker.failed(now_s)
    assert not breaker.allows(now_s + 0.99)
    assert breaker.allows(now_s + 1.0)
    assert breaker.num_opened == 2


def test_failures_of_calls_under_way_do_not_put_the_probe_off():
    breaker = opened()
    breaker.failed(0.9)
    breaker.failed(0.9)
    assert breaker.allows(1.0)


def test_a_probe_that_told_nothing_is_followed_by_another_at_once():
    breaker = opened()
    breaker.told_nothing()
    assert not breaker.allows(0.9), "no probe was out"
    assert breaker.allows(1.0)
    breaker.told_nothing()
    assert breaker.allows(1.0) and not breaker.allows(1.0)
    breaker.succeeded()
    breaker.told_nothing()
    assert breaker.state == "closed"


def test_a_breaker_that_never_tries_again_is_refused():
    with pytest.raises(AssertionError):
        Breaker(max_failures=1, retry_s=0.0, max_retry_s=1.0)
