"""Which page goes: S3-FIFO and LRU, children before parents, watermarks, and a store that cannot evict."""

import random
import time

import pytest

from cache_service.eviction import GhostKeys, S3Fifo, eviction_order
from cache_service.lease_row import LeaseRow
from cache_service.page_store import PageStoreOptions
from tests.unit.arenas import key, new_store, store_chain

POLICIES = ["s3fifo", "lru"]


def present(store, names):
    return "".join(name for name in names if store.lookup([key(name)]) != [None])


@pytest.mark.parametrize("policy", POLICIES)
def test_a_chain_goes_from_its_end(tmp_path, policy):
    owned, store, _ = new_store(tmp_path, options=PageStoreOptions(eviction=policy))
    store_chain(store, owned.arena, "abcdefgh")
    for left in ("abcdefg", "abcdef", "abcde", "abcd"):
        store.grant(1, 1)
        store.check()
        assert present(store, "abcdefgh") == left
    owned.close()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_used_chain_outlives_newer_ones_used_once(tmp_path, policy):
    owned, store, _ = new_store(tmp_path, options=PageStoreOptions(eviction=policy))
    used = store_chain(store, owned.arena, "ab")
    store_chain(store, owned.arena, "cd")
    store.touch(used)
    store_chain(store, owned.arena, "efgh")
    store_chain(store, owned.arena, "ij")
    assert present(store, "abcd") == "ab"
    store.check()
    owned.close()


def test_the_least_recently_used_goes_first(tmp_path):
    owned, store, _ = new_store(tmp_path, options=PageStoreOptions(eviction="lru"))
    for name in "abcdefgh":
        store_chain(store, owned.arena, [name])
    for name in "cahb":
        store.touch([key(name)])
    gone = []
    for _ in range(8):
        before = present(store, "abcdefgh")
        store.grant(1, 1)
        gone += set(before) - set(present(store, "abcdefgh"))
    assert "".join(gone) == "defgcahb"
    owned.close()


def test_s3_fifo_keeps_a_working_set_through_a_scan(tmp_path):
    """Pages used twice survive any number of pages used once; LRU loses them."""
    kept = {}
    for policy in POLICIES:
        owned, store, _ = new_store(tmp_path, num_slots=20, options=PageStoreOptions(eviction=policy))
        for name in "abcdefgh":
            store_chain(store, owned.arena, [name])
            store.touch([key(name)])
        for number in range(60):
            store_chain(store, owned.arena, [f"scan {number}"])
        kept[policy] = len(present(store, "abcdefgh"))
        store.check()
        owned.close()
    assert kept == {"s3fifo": 8, "lru": 0}


def test_s3_fifo_takes_back_into_the_main_queue_what_it_saw_leave():
    order = S3Fifo(16)
    for slot in range(8):
        order.add(slot, key(slot))
    assert order.candidate() == 0
    order.remove(0, key(0), was_evicted=True)
    order.add(8, key(0))
    for slot in range(9, 12):
        order.add(slot, key(slot))
    gone = []
    for _ in range(11):
        slot = order.candidate()
        gone.append(slot)
        order.remove(slot, key(0 if slot == 8 else slot), was_evicted=True)
    assert gone == [*range(1, 8), 9, 10, 11, 8], "those that came after it go before it"
    assert order.candidate() is None


def test_s3_fifo_looks_once_at_the_small_queue_for_a_page_of_the_main_one_that_cannot_go():
    order = S3Fifo(100)
    for slot in range(50):
        order.add(slot, key(slot))
        order.touch(slot)
    assert order.candidate() == 0, "all were used: they are in the main queue now"
    for slot in range(50, 54):
        order.add(slot, key(slot))
    order.defer(0)
    gone = []
    for _ in range(3):
        gone.append(order.candidate())
        order.remove(gone[-1], key(gone[-1]), was_evicted=True)
    assert gone == [50, 1, 2], "new pages do not all go for one old page that somebody reads"


def test_ghosts_are_the_last_keys_and_no_others():
    ghosts = GhostKeys(100)
    assert key("never") not in ghosts
    for number in range(300):
        ghosts.add(key(number))
    assert sum(key(number) in ghosts for number in range(200)) == 0
    assert sum(key(number) in ghosts for number in range(200, 300)) > 75, "but for those displaced"
    assert sum(key(number) in ghosts for number in range(1000, 11_000)) < 3


@pytest.mark.parametrize("policy", POLICIES)
def test_below_the_low_watermark_eviction_goes_up_to_the_high_one_in_parts(tmp_path, policy):
    options = PageStoreOptions(eviction=policy, min_free_ratio=0.1, target_free_ratio=0.4)
    owned, store, _ = new_store(tmp_path, num_slots=20, options=options)
    for number in range(18):
        store_chain(store, owned.arena, [number])
    assert store.maintain(100) == 0, "two slots of twenty are free"
    store_chain(store, owned.arena, ["one more"])
    assert store.maintain(3) == 3
    assert store.maintain(100) == 0, "not below the low watermark any more"
    store_chain(store, owned.arena, "abc")
    assert store.maintain(100) == 7
    assert store.num_free == 8
    store.check()
    owned.close()


@pytest.mark.parametrize("policy", POLICIES)
def test_an_arena_with_everything_leased_grants_nothing_and_soon(tmp_path, policy):
    owned, store, _ = new_store(tmp_path, num_slots=3000, options=PageStoreOptions(eviction=policy))
    names = range(3000)
    for number in names:
        store_chain(store, owned.arena, [number])
    keys = [key(number) for number in names]
    locations = store.lookup(keys)
    reader = LeaseRow(owned.arena, 0)
    assert reader.acquire(keys, locations) == 3000
    started = time.monotonic()
    assert store.grant(1, 1) == []
    assert time.monotonic() - started < 0.1, "one call looks at some, not at all"
    assert store.num_refused < 100
    reader.release([locations[2999].slot])
    assert sum(len(store.grant(1, 1)) for _ in range(100)) == 1, "but many calls find the one that can go"
    store.check()
    owned.close()


def hit_ratio(policy, requests, num_slots):
    """Serve single pages from an order alone, as a cache of `num_slots` would."""
    order, slots, hits = eviction_order(policy, num_slots), {}, 0
    for name in requests:
        if name in slots:
            hits += 1
            order.touch(slots[name])
            continue
        slot = len(slots)
        if slot == num_slots:
            slot = order.candidate()
            (old,) = [other for other, at in slots.items() if at == slot]
            order.remove(slot, key(old), was_evicted=True)
            del slots[old]
        slots[name] = slot
        order.add(slot, key(name))
    return hits / len(requests)


def test_s3_fifo_hits_more_than_lru_where_most_pages_are_used_once():
    chance = random.Random(5)
    requests = [
        f"hot {int(chance.paretovariate(0.7))}" if chance.random() < 0.6 else f"once {number}"
        for number in range(4000)
    ]
    assert hit_ratio("s3fifo", requests, 50) > hit_ratio("lru", requests, 50) + 0.01
