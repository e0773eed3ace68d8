"""Three writers and two readers on one small arena: leases keep pages whole, epochs tell what is gone."""

from collections import Counter

import pytest

from cache_service.arena_safety import ArenaSafety
from tests.unit.arena_traffic import run
from tests.unit.arenas import open_arena, spec

SECONDS = 1.5


@pytest.fixture
def traffic(tmp_path):
    """Run traffic over an arena of 24 pages of 1 MiB; 39 names do not fit, so pages go all the time."""
    owned = open_arena(tmp_path, spec(num_slots=24, bundle_bytes=1 << 20))

    def under(*wanted, **safety):
        """Run it until all of `wanted` have happened, five times at most; return the sums of all runs."""
        sums = Counter()
        for _ in range(5):
            sums.update(run(owned.arena.path, owned.arena.spec, ArenaSafety(**safety), SECONDS))
            if all(sums[name] for name in wanted):
                break
        return sums

    yield under
    owned.close()


def test_no_page_is_torn_or_changes_under_its_reader(traffic):
    found = traffic("read", "evicted", "refused", "missed")
    assert found["read"] and found["evicted"] and found["missed"], found
    assert found["refused"] > 0, "leases were never in the way of an eviction"
    assert found["torn"] == found["changed"] == 0, found


def test_without_leases_and_epochs_pages_are_torn(traffic):
    found = traffic("torn", leases=False, epochs=False)
    assert found["torn"] > 0, found


def test_without_leases_epochs_tell_that_a_page_changed(traffic):
    found = traffic("changed", leases=False)
    assert found["changed"] > 0 and found["torn"] == 0, found


def test_without_epochs_a_slot_that_holds_another_page_is_read_for_the_one_it_held(traffic):
    found = traffic("torn", epochs=False)
    assert found["torn"] > 0, found
