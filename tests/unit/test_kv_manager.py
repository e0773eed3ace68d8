import pytest

from cache_service.keys import NamespaceDigest, page_keys, salted
from workers.kvcache.manager import KVCacheManager
from workers.plan import CloseSlot, CompletePages, FreePages, OpenSlot, OwnPages, RelocationVersion, SetRow
from workers.protocol import SamplingParams

NAMESPACE = NamespaceDigest(b"n" * 16)
PAGE_SIZE = 4


def make_cache(num_pages: int = 8, **options: bool) -> KVCacheManager:
    return KVCacheManager(num_pages, PAGE_SIZE, NAMESPACE, incarnation=3, **options)


def open_slot(cache: KVCacheManager, slot: int, token_ids: list[int], salt: bytes = b"") -> int:
    op = OpenSlot(slot, SamplingParams(), 0, len(token_ids), list(token_ids))
    return cache.open(op, cache.keyed(token_ids, salt))


def prefill(cache: KVCacheManager, slot: int, token_ids: list[int], salt: bytes = b"") -> int:
    num_cached = open_slot(cache, slot, token_ids, salt)
    assert cache.reserve(slot, len(token_ids))
    cache.commit(slot, len(token_ids))
    cache.check()
    return num_cached


def tokens(num_tokens: int, first: int = 0) -> list[int]:
    return list(range(first, first + num_tokens))


def test_a_request_shares_the_whole_pages_of_one_that_still_runs():
    cache = make_cache()
    prefill(cache, 0, tokens(10))
    cache.take_ops()
    assert open_slot(cache, 1, tokens(10)) == 8
    _, row = cache.take_ops()
    assert isinstance(row, SetRow)
    assert (row.slot, row.first, row.pages) == (1, 0, [row.pages[0], row.pages[1]])
    assert row.keys == page_keys(NAMESPACE, tokens(8), PAGE_SIZE)
    assert cache.stats().num_owned_pages == 3


def test_at_least_one_token_is_left_to_compute():
    cache = make_cache()
    prefill(cache, 0, tokens(8))
    assert open_slot(cache, 1, tokens(8)) == 4
    assert open_slot(cache, 2, tokens(9)) == 8


def test_tenants_do_not_share():
    cache = make_cache()
    assert prefill(cache, 0, tokens(8), salt=b"a") == 0
    assert prefill(cache, 1, tokens(9), salt=b"b") == 0
    assert prefill(cache, 2, tokens(9), salt=b"a") == 8
    keys = page_keys(salted(NAMESPACE, b"a"), tokens(8), PAGE_SIZE)
    assert set(keys) <= set(cache.snapshot()[1])


def test_without_prefix_caching_nothing_is_kept_or_told():
    cache = make_cache(prefix_caching=False)
    prefill(cache, 0, tokens(8))
    assert any(isinstance(op, CompletePages) for op in cache.take_ops())
    cache.close(0)
    assert prefill(cache, 0, tokens(9)) == 0
    cache.close(0)
    assert cache.stats().num_free_pages == 8
    assert cache.take_events() is None and cache.snapshot() == (0, [])


def test_equal_pages_computed_side_by_side_are_stored_once():
    cache = make_cache()
    for slot in (0, 1):
        open_slot(cache, slot, tokens(9))
        assert cache.reserve(slot, 9)
    cache.planned(1)
    cache.take_ops()
    cache.commit(0, 9)
    cache.commit(1, 9)
    complete, *rows = cache.take_ops()
    assert isinstance(complete, CompletePages)
    assert [(row.slot, row.first, row.pages, row.keys) for row in rows if isinstance(row, SetRow)] == [
        (1, 0, complete.pages[:1], complete.keys[:1]),
        (1, 1, complete.pages[1:], complete.keys[1:]),
    ]
    assert cache.stats().num_quiescing_pages == 2  # its own copies: step 1 wrote them
    cache.check()
    cache.completed(1)
    assert [type(op) for op in cache.take_ops()] == [FreePages]
    assert cache.stats().num_owned_pages == 4
    cache.check()


def test_reserve_owns_whole_pages_and_nothing_when_it_cannot():
    cache = make_cache(num_pages=3)
    open_slot(cache, 0, tokens(5))
    assert cache.reserve(0, 5) and cache.reserve(0, 8)
    assert cache.stats().num_owned_pages == 2
    version = cache.version
    assert not cache.reserve(0, 13)
    assert cache.stats().num_owned_pages == 2 and cache.version == version
    assert not cache.is_coming(0, 13)
    assert cache.reserve(0, 12)


def test_reserve_evicts_the_oldest_leaves_and_no_more():
    cache = make_cache(num_pages=4)
    prefill(cache, 0, tokens(8))
    cache.close(0)
    prefill(cache, 0, tokens(8, first=50))
    cache.close(0)
    assert cache.stats().num_free_pages == 0
    open_slot(cache, 0, tokens(4, first=90))
    assert cache.reserve(0, 4)
    assert cache.stats().num_evictions == 1
    assert cache.snapshot()[1] == [
        page_keys(NAMESPACE, tokens(4), PAGE_SIZE)[0],
        *page_keys(NAMESPACE, tokens(8, first=50), PAGE_SIZE),
    ]


def test_reserve_waits_for_quiescing_pages_rather_than_evict_what_is_not_idle():
    cache = make_cache(num_pages=3)
    prefill(cache, 0, tokens(10))  # two complete pages and a third
    cache.planned(1)
    cache.close(0)
    assert cache.stats().num_quiescing_pages == 1 and cache.stats().num_evictable_pages == 2
    open_slot(cache, 0, tokens(3, first=50))
    assert not cache.reserve(0, 3) and cache.is_coming(0, 3)
    assert cache.stats().num_evictions == 0
    cache.completed(1)
    assert cache.reserve(0, 3)
    assert cache.stats().num_evictions == 0


def test_pages_of_a_closed_slot_are_free_only_when_the_last_planned_step_is_complete():
    cache = make_cache(prefix_caching=False)
    prefill(cache, 0, tokens(5))
    cache.planned(1)
    cache.planned(2)
    cache.take_ops()
    cache.close(0)
    cache.completed(1)
    assert cache.take_ops() == [CloseSlot(0)]
    cache.completed(2)
    (freed,) = cache.take_ops()
    assert isinstance(freed, FreePages) and sorted(freed.pages) == [1, 2]


def test_each_op_that_relocates_raises_the_version_by_one():
    cache = make_cache(num_pages=2)
    assert cache.version == RelocationVersion(3, 0)
    for first in range(0, 21, 7):  # each evicts the one before
        prefill(cache, 0, tokens(7, first))
        cache.close(0)
    relocations = [op for op in cache.take_ops() if isinstance(op, OwnPages | FreePages)]
    assert cache.version == RelocationVersion(3, len(relocations))
    assert not cache.has_ops


def test_a_decoded_token_that_fills_a_page_completes_it_under_the_key_of_all_tokens():
    cache = make_cache()
    token_ids = tokens(3)
    open_slot(cache, 0, token_ids)
    assert cache.reserve(0, 4)
    cache.commit(0, 3)
    assert cache.take_events() is None
    token_ids.append(77)
    cache.commit(0, 4)
    batch = cache.take_events()
    assert batch is not None
    assert (batch.incarnation, batch.first_version, batch.version) == (3, 0, 1)
    assert batch.events[0].keys == page_keys(NAMESPACE, [0, 1, 2, 77], PAGE_SIZE)


def test_num_lacking_counts_the_cached_prefix_once():
    cache = make_cache(num_pages=4)
    prefill(cache, 0, tokens(9))
    cache.close(0)  # two cached, two free
    same, other = cache.keyed(tokens(9), b""), cache.keyed(tokens(9, first=50), b"")
    assert cache.num_lacking(same, 9, 0) == 1 - 2
    assert cache.num_lacking(same, 16, 1) == 1
    assert cache.num_lacking(other, 9, 0) == 3 - 4


def test_num_lacking_counts_what_closing_slots_would_release_and_what_stays_shared():
    cache = make_cache(num_pages=8)
    for slot in range(3):
        prefill(cache, slot, tokens(9))  # 2 shared pages and one of its own each
    other, same = cache.keyed(tokens(9, first=50), b""), cache.keyed(tokens(9), b"")
    lacking = [cache.num_lacking(other, 32, 0, closing) for closing in ([], [0], [0, 1], [0, 1, 2])]
    assert lacking == [8 - 3, 8 - 4, 8 - 5, 8 - 8]  # the shared pages go with their last holder
    assert cache.num_lacking(same, 32, 0, [0, 1, 2]) == 6 - 6  # it keeps them


def test_check_finds_a_row_that_points_at_a_freed_page():
    cache = make_cache()
    prefill(cache, 0, tokens(3))
    cache._pool.release(cache._rows[0].pages[0])
    with pytest.raises(AssertionError, match="slot 0 holds page 1, which is FREE"):
        cache.check()


def test_check_finds_two_owners():
    cache = make_cache()
    prefill(cache, 0, tokens(3))
    prefill(cache, 1, tokens(3, first=50))
    cache._rows[1].pages[0] = cache._rows[0].pages[0]
    with pytest.raises(AssertionError, match="page 1 has two owners"):
        cache.check()
