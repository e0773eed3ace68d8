"""KVPool: views over one run of bytes a page, poison and the dummy page."""

import pytest
import torch

from workers.config import WorkerConfig
from workers.kvcache.kv_pool import DUMMY_PAGE, POISON, KVPool, allocate_pool
from workers.kvcache.layout import BundleLayout, ElementType, SectionShape, target_only
from workers.kvcache.pool_size import PoolSizeError

CPU = torch.device("cpu")


def pool(dtype: ElementType = "bfloat16", num_pages: int = 6) -> KVPool:
    return KVPool(target_only(3, 4, 2, 8, dtype), num_pages, CPU)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_layers_are_strided_views_of_a_page_s_own_bytes(dtype: ElementType) -> None:
    kv = pool(dtype)
    k, v = kv.layer(1)
    assert k.shape == v.shape == (7, 4, 2, 8)
    assert k.stride() == v.stride() == (kv.layout.bundle_bytes // k.element_size(), 16, 8, 1)
    v[5] = 1.5
    changed = kv.data.view(7, -1).any(dim=1)
    assert changed.nonzero().flatten().tolist() == [5]
    plane = 4 * 2 * 8 * k.element_size()
    assert kv.data[5].nonzero().min() >= 3 * plane  # layer 0: K, V; layer 1: K
    assert kv.data[5].nonzero().max() < 4 * plane


def test_layers_and_k_and_v_do_not_overlap() -> None:
    kv = pool()
    for index in range(kv.num_layers):
        k, v = kv.layer(index)
        k.fill_(2 * index + 1)
        v.fill_(2 * index + 2)
    for index in range(kv.num_layers):
        k, v = kv.layer(index)
        assert (k == 2 * index + 1).all()
        assert (v == 2 * index + 2).all()


def test_other_sections_are_left_alone() -> None:
    layout = BundleLayout.of(
        4,
        (
            SectionShape("target", "bfloat16", (1, 2, 4, 1, 8)),
            SectionShape("draft", "bfloat16", (1, 2, 4, 1, 8)),
            SectionShape("index", "uint8", (1, 4, 3)),
            SectionShape("tail", "float32", (5,)),
        ),
    )
    kv = KVPool(layout, 2, CPU)
    for half in kv.layer(0):
        half.fill_(1)
    target = layout.section("target")
    assert not kv.data[:, target.num_bytes :].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_poisoned_pages_read_as_nan_and_only_they(dtype: ElementType) -> None:
    kv = pool(dtype)
    kv.poison([5, 1, 2])
    k, v = kv.layer(2)
    for page in range(7):
        is_poisoned = page in (1, 2, 5)
        assert bool(k[page].isnan().all()) == bool(v[page].isnan().all()) == is_poisoned
        assert kv.is_poisoned(page) == is_poisoned
        assert bool(k[page].isnan().any()) == is_poisoned
    assert (kv.data[1] == POISON).all()


def test_one_written_byte_ends_the_poison() -> None:
    kv = pool()
    kv.poison([3])
    kv.data[3, 77] = 0
    assert not kv.is_poisoned(3)


def test_the_dummy_page_is_never_poisoned_and_can_be_cleared() -> None:
    kv = pool()
    kv.poison_all()
    assert not kv.data[DUMMY_PAGE].any()
    with pytest.raises(AssertionError):
        kv.poison([0, 1])
    kv.layer(0)[0][DUMMY_PAGE] = 3
    kv.zero_dummy_page()
    assert not kv.data[DUMMY_PAGE].any()
    assert kv.is_poisoned(1)


def test_memory_that_is_gone_is_a_clear_error() -> None:
    layout = target_only(3, 4, 2, 8, "bfloat16")
    with pytest.raises(PoolSizeError, match=r"GiB of KV pages could not be allocated .*lower kv_gb"):
        allocate_pool(WorkerConfig(), layout, 1 << 50, CPU)
    with pytest.raises(PoolSizeError, match="lower num_pages"):
        allocate_pool(WorkerConfig(num_pages=1 << 50), layout, 1 << 50, CPU)
    assert allocate_pool(WorkerConfig(), layout, 3, CPU).num_pages == 3
