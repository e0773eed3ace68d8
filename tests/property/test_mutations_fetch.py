"""Each mechanism of prefetching, switched off alone, is caught by a check that has its name."""

from dataclasses import replace

import pytest

from tests.property.random_tier import live
from workers.kvcache.page_pool import Safety

SEEDS = range(2000, 2040)


def live_until_it_shows(safety: Safety) -> None:
    for seed in SEEDS:
        live(seed, safety=safety, runs_checks=False)


def test_with_all_mechanisms_on_nothing_fires() -> None:
    live_until_it_shows(Safety())


@pytest.mark.parametrize(
    ("switch", "check"),
    [
        ("awaits_fetches", r"await: r\d+ is admitted while its FETCH \d+ is under way"),
        ("fetch_deadlines", r"(requests left after \d+ steps|a FETCH is never over)"),
        ("weighs_fetches", r"cost: a FETCH of [\d.]+ s for what is computed in [\d.]+ s"),
    ],
)
def test_a_mechanism_switched_off_is_noticed(switch, check) -> None:
    with pytest.raises(AssertionError, match=check):
        live_until_it_shows(replace(Safety(), **{switch: False}))
