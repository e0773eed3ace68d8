"""What `eyrie serve` finds wrong before it starts anything."""

import pytest

from cache_service.arena_format import ArenaSizeError
from cache_service.config import CacheConfig
from cache_service.host_memory import HostMemory
from cluster.config import ClusterConfig
from cluster.serve import check_host_cache
from workers.card import load_card, page_layout
from workers.config import WorkerConfig

PLENTY = HostMemory(1 << 50, None, 1 << 50)


def check(host_cache_gb, memory=PLENTY, bundle_bytes=1 << 20):
    config = ClusterConfig(cache=CacheConfig(host_cache_gb=host_cache_gb))
    check_host_cache(config, bundle_bytes, lambda folder: memory)


def test_a_host_cache_larger_than_memory_or_shared_memory_is_refused():
    check(5)
    with pytest.raises(ArenaSizeError, match=r"needs 5\.000 GiB, but this machine has 4\.000 GiB free mem"):
        check(5, HostMemory(4 << 30, None, 1 << 50))
    with pytest.raises(ArenaSizeError, match=r"/dev/shm has 4\.000 GiB free space"):
        check(5, HostMemory(1 << 50, None, 4 << 30))


def test_a_host_cache_that_holds_no_page_is_refused():
    layout = page_layout(load_card("smollm2-135m"), WorkerConfig())
    assert layout.bundle_bytes == 30 * 2 * 16 * 3 * 64 * 2
    check(0.001, bundle_bytes=layout.bundle_bytes)
    with pytest.raises(ArenaSizeError, match=f"one page of {layout.bundle_bytes} bytes"):
        check(0.0003, bundle_bytes=layout.bundle_bytes)
