"""Requests that wait in the queue for pages from elsewhere: whom they hold up, and what becomes of them."""

import pytest

from tests.property.fake_group import FakeGroup, plain_rank
from tests.property.fake_sources import PEERS, SourceOptions
from tests.property.fake_tier import TierOptions
from tests.property.stored_group import KEYS, corrupt, stored_group
from tests.property.stored_group import PAGE_SIZE as STORED_PAGE_SIZE
from tests.property.stored_group import TEXT as STORED_TEXT
from workers.kvcache.page_pool import Safety
from workers.protocol import FetchHint, SamplingParams

PAGE_SIZE = 4
TEXT = [1, 2, 3, 4, 5, 6, 7, 8] * 3
NUM_PAGES = 5
HINTS = [FetchHint(PEERS[0], NUM_PAGES)]
SHORT = SamplingParams(max_tokens=2, ignore_eos=True)


def new_group(policy="wait_complete", *, speed=1.0, silent_ratio=0.0, news_ratio=1.0, **options):
    sources = SourceOptions(policy=policy, timeout_s=3.0, page_s=0.5, speed=speed, silent_ratio=silent_ratio)
    tier = TierOptions(num_slots=30, news_ratio=news_ratio, sources=sources)
    return FakeGroup(page_size=PAGE_SIZE, max_tokens_per_step=32, tier=tier, **options)


def prefix_tokens(group):
    return {origin: count for origin, count in group.scheduler.stats.prefix_tokens.items() if count}


def steps_until(group, is_so, max_steps=100):
    for num_steps in range(max_steps):
        if is_so():
            return num_steps
        group.step()
    raise AssertionError("it never came to be")


def test_a_prompt_that_a_peer_has_is_loaded_instead_of_computed():
    group = new_group()
    request = group.submit(TEXT[:22], SHORT, hints=HINTS)
    group.run()
    assert group.num_cached[request] == NUM_PAGES * PAGE_SIZE
    assert prefix_tokens(group) == {"peer": 20, "computed": 2}
    again = group.submit(TEXT[:22], SHORT, hints=HINTS)
    group.run()
    assert group.num_cached[again] == 20
    assert prefix_tokens(group) == {"peer": 20, "device": 20, "computed": 4}
    assert len(group.tier.sources.fetches) == 1
    report = group.scheduler.load(0.5, group.now_s)
    assert report.peer_page_s == 0.5 and report.remote_page_s is None
    group.settle()


def test_a_fetched_page_is_used_though_the_arenas_news_of_it_are_late():
    group = new_group(news_ratio=0.0)
    request = group.submit(TEXT[:22], SHORT, hints=HINTS)
    group.run()
    assert group.num_cached[request] == 20
    assert not group.tier.client.view


def test_who_waits_for_a_fetch_does_not_hold_up_those_behind():
    group = new_group(speed=0.0)
    waiting = group.submit(TEXT[:22], SHORT, hints=HINTS)
    others = [group.submit([9, number], SHORT) for number in range(3)]
    assert steps_until(group, lambda: all(other in group.reasons for other in others)) <= 4
    assert waiting not in group.reasons and group.scheduler.num_waiting == 1
    group.end()


def test_who_has_waited_for_a_fetch_keeps_its_place():
    group = new_group(speed=0.0, max_running=1)
    waiting = group.submit(TEXT[:22], SHORT, hints=HINTS)
    young = group.submit([9], SamplingParams(max_tokens=40, ignore_eos=True))
    younger = group.submit([8], SHORT)
    steps_until(group, lambda: len(group.streams[young]) == 3)
    group.tier.speed_up()
    steps_until(group, lambda: waiting in group.reasons, max_steps=10)
    assert young not in group.reasons and group.scheduler.stats.num_preemptions == 1
    group.end()
    assert list(group.reasons) == [waiting, young, younger]


def test_a_client_that_hangs_up_while_its_pages_are_fetched_is_forgotten():
    group = new_group(speed=0.0)
    request = group.submit(TEXT[:22], SHORT, hints=[*HINTS, *HINTS])
    group.step()
    group.abort(request)
    assert group.reasons == {request: "abort"} and not group.scheduler.has_requests
    assert group.step() is None
    next_one = group.submit(TEXT[:22], SHORT)
    group.end()
    assert group.num_cached[next_one] == 20, "what was under way serves the next"
    assert len(group.tier.sources.fetches) == 1


def test_a_client_that_has_gone_asks_no_further_source():
    group = new_group(speed=0.0)
    request = group.submit(TEXT[:22], SHORT, hints=[FetchHint(PEERS[1], NUM_PAGES), *HINTS])
    group.abort(request)
    group.tier.speed_up()
    for _ in range(20):
        group.step()
    assert group.tier.sources.fetches[0].is_answered and len(group.tier.sources.fetches) == 1


def test_a_page_that_failed_to_load_does_not_count_as_cached():
    group = stored_group(2, Safety(), plain_rank)
    corrupt(group, KEYS[1])
    request = group.submit(STORED_TEXT[:5], SHORT)
    group.end()
    assert group.tier.stats.failed_loads == {"corrupt": 1}
    assert group.num_cached[request] == STORED_PAGE_SIZE


@pytest.mark.parametrize(("policy", "max_wait_s"), [("wait_complete", 40), ("timeout", 3)])
def test_a_server_that_never_answers_costs_a_bounded_wait(policy, max_wait_s):
    group = new_group(policy, silent_ratio=1.0)
    request = group.submit(TEXT[:22], SHORT, hints=HINTS)
    num_steps = steps_until(group, lambda: group.streams[request])
    assert max_wait_s - 1 <= num_steps <= max_wait_s + 5
    group.end()
    assert prefix_tokens(group)["computed"] >= 2


def test_under_best_effort_nobody_waits():
    group = new_group("best_effort", speed=0.0)
    request = group.submit(TEXT[:22], SHORT, hints=HINTS)
    assert steps_until(group, lambda: group.streams[request]) == 1
    assert group.num_cached[request] == 0 and len(group.tier.sources.fetches) == 1
    group.end()


def test_a_preempted_request_does_not_fetch_again():
    group = new_group(max_running=1)
    request = group.submit(TEXT[:22], SHORT, priority=1, hints=[*HINTS, FetchHint(PEERS[1], 5)])
    steps_until(group, lambda: group.streams[request])
    num_fetches = len(group.tier.sources.fetches)
    group.submit([9] * 4, SHORT, priority=0)
    group.end()
    assert group.scheduler.stats.num_preemptions == 1
    assert len(group.tier.sources.fetches) == num_fetches


def test_two_tenants_fetch_apart():
    group = new_group()
    keys = set()
    for salt in (b"", b"a"):
        group.submit(TEXT[:22], SHORT, tenant_salt=salt, hints=HINTS)
    for fetch in group.tier.sources.fetches:
        keys.update(page.key for page in fetch.pages)
    assert (
        len(keys) == 2 * NUM_PAGES
        and len({page.tenant for f in group.tier.sources.fetches for page in f.pages}) == 2
    )
    group.end()
    assert prefix_tokens(group) == {"peer": 40, "computed": 4}


def test_without_a_hint_nothing_is_waited_for():
    group = new_group()
    request = group.submit(TEXT[:22], SHORT)
    assert steps_until(group, lambda: group.streams[request]) == 1
    assert group.tier.prefetcher.stats.skipped_pages == {"no_source": NUM_PAGES}
    group.end()
