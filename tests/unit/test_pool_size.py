"""How many positions a rank has."""

from workers.config import WorkerConfig
from workers.kvcache.pool_size import PoolSize, num_positions


def test_positions_are_those_of_whole_pages_with_room_for_drafts():
    config = WorkerConfig(page_size=8, max_context_len=43, draft="self", draft_tokens=7)
    assert num_positions(config, 100, PoolSize(50, 43, 14)) == 64
    assert num_positions(config, 100, None) == 64, "also before the pool is measured"
    assert num_positions(WorkerConfig(page_size=8), 100, None) == 104
