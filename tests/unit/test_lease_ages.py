"""How long slots are leased, as seen by looking now and then."""

from cache_service.lease_ages import LeaseAges
from tests.unit.arenas import open_arena


def test_a_lease_ages_from_the_look_that_found_it_until_one_that_does_not(tmp_path):
    owned = open_arena(tmp_path)
    ages, leases = LeaseAges(owned.arena, 100.0), owned.arena.leases
    leases[1, 3] = 1
    ages.look([0, 1], 101.0)
    assert (ages.num_leased, ages.oldest_s) == (1, 0.0)
    leases[0, 5] = 1
    ages.look([0, 1], 103.0)
    assert (ages.num_leased, ages.oldest_s) == (2, 2.0)
    leases[1, 3] = 0
    ages.look([0, 1], 104.0)
    assert (ages.num_leased, ages.oldest_s) == (1, 1.0)
    leases[1, 3] = 1
    ages.look([0, 1], 105.0)
    assert (ages.num_leased, ages.oldest_s) == (2, 2.0), "the one that was given back begins anew"
    ages.look([1], 106.0)
    assert (ages.num_leased, ages.oldest_s) == (1, 1.0)
    owned.close()
