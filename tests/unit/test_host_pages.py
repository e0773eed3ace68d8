"""HostPages: what one rank asks of its node's cache."""

from cache_service.config import CacheConfig
from tests.unit.cache_nodes import SECRET, eventually, serving
from tests.unit.engine_plans import tiny_engine
from workers.config import WorkerConfig
from workers.host_pages import CachePlace, HostPages
from workers.parallel import TPGroup

NUM_SLOTS = 8192


def test_the_pages_of_a_long_step_can_all_be_saved(tmp_path) -> None:
    """Without a grant a page is not saved, nor is any that continues it."""
    engine = tiny_engine()
    num_bytes = NUM_SLOTS * (engine.layout.bundle_bytes + 256)
    config = WorkerConfig(page_size=engine.layout.page_size, max_tokens_per_step=2048)
    pages_per_step = config.max_tokens_per_step // config.page_size
    assert pages_per_step > 256
    with serving(tmp_path, CacheConfig(host_cache_gb=num_bytes / 2**30)) as server:
        pages = HostPages(CachePlace(server.core.endpoint, SECRET), config, engine, TPGroup.single(), 7)
        eventually(lambda: pages.client.num_grants >= pages_per_step)
        pages.close()
