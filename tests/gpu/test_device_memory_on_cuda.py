"""The pool that takes what its share of the device leaves. Run by hand: pytest -m gpu tests/gpu"""

import gc

import pytest
import torch

from tests.unit.engine_plans import generate, tiny_card, tiny_engine
from workers.config import WorkerConfig
from workers.engine.device_memory import work_bytes
from workers.kvcache.pool_size import PoolSizeError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

OPTIONS = {"device": "cuda", "num_pages": None, "page_size": 64, "kv_sanitizer": False}


def test_pages_take_their_share_less_what_is_in_use() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    ratio = (total - free) / total + 0.1  # a tenth of the device beyond what others have of it
    engine = tiny_engine(device_memory_ratio=ratio, **OPTIONS)
    taken = (engine.num_pages + 1) * engine.layout.bundle_bytes
    expected = total * 0.1 - work_bytes(WorkerConfig(), tiny_card())
    assert expected - (1 << 30) < taken <= total * 0.1, (taken, expected)
    print(f"\n{taken / 2**30:.2f} GiB of pages, {torch.cuda.mem_get_info()[0] / 2**30:.2f} GiB are left")
    assert len(generate(engine, [[5, 9, 2]], 4)[0]) == 4
    engine.close()


def test_a_share_that_others_have_is_a_clear_error() -> None:
    with pytest.raises(PoolSizeError, match=r"device_memory_ratio=0.0001 of .* leaves nothing for KV pages"):
        tiny_engine(device_memory_ratio=0.0001, **OPTIONS)
