"""The engine and the reference backend on CUDA. Run by hand: pytest -m gpu tests/gpu."""

import pytest
import torch

from tests.unit.engine_plans import PlanLog, generate, tiny_card, tiny_engine
from tests.unit.test_reference_attention import MIXES, PagedRows, layer
from workers.attention.reference import ReferenceAttention
from workers.engine.copies import CudaCopies
from workers.engine.forward_batch import ForwardBatch
from workers.engine.graph_guard import Bucket
from workers.engine.model_runner import ModelRunner
from workers.engine.staging import BucketInputs, Stager
from workers.kvcache.kv_pool import KVPool
from workers.kvcache.page_table import PageTable
from workers.kvcache.sanitizer import SanitizerError
from workers.plan import SetRow

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PROMPTS = [[5, 9, 2], [7] * 11, list(range(20)), [1]]
CUDA = torch.device("cuda")


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("mix", MIXES)
def test_reference_attention_equals_the_cpu_s(mix: str, window: int | None) -> None:
    rows = PagedRows(*MIXES[mix], 16)
    pool = KVPool(rows.pool.layout, rows.pool.num_pages, CUDA)
    pool.data.copy_(rows.pool.data)
    batch = rows.batch
    names = ("token_ids", "positions", "page_rows", "query_starts", "context_lens", "out_locations")
    moved = {name: getattr(batch, name).cuda() for name in (*names, "sample_indices")}
    on_cuda = type(batch)(**{**vars(batch), **moved})
    backend = ReferenceAttention(pool)
    backend.plan(on_cuda)
    q, k, v = (tensor.cuda() for tensor in rows.new_tokens())
    found = backend.forward(layer(window), q, k, v).cpu()
    torch.testing.assert_close(found, rows.attend(window), rtol=1e-4, atol=1e-5)


def test_tokens_equal_the_cpu_s_and_the_sanitizer_is_content() -> None:
    on_cpu = generate(tiny_engine(), PROMPTS, 12)
    engine = tiny_engine(device="cuda")
    assert generate(engine, PROMPTS, 12) == on_cpu
    assert engine.num_sanitized_steps >= 12
    assert (
        engine.eager_steps["decode", "unsupported"] > 0
    )  # no graph holds the reference, and the guard says so


def test_the_sanitizer_sees_a_poisoned_page_on_cuda() -> None:
    engine, log = tiny_engine(device="cuda"), PlanLog()
    log.open(0, [1, 2, 3])
    log.run(engine, s0=3)
    engine._pool.data[log.pages[0][0]] = 0xFF
    with pytest.raises(SanitizerError, match="finite_logits"):
        log.run(engine, s0=1)


def test_bfloat16_decodes() -> None:
    card = tiny_card(dtype="bfloat16")
    assert len(generate(tiny_engine(device="cuda", card=card), PROMPTS, 5)[0]) == 5


def test_a_delayed_compute_stream_reads_each_step_s_own_inputs() -> None:
    """Plan ahead of a stream that sleeps: each pass must still see what was staged for it (I3)."""
    log, table = PlanLog(4, 30), PageTable(2, 4, 4, 30, checked=True)
    stager = Stager(table, 16, CUDA, CudaCopies(CUDA))
    bucket = BucketInputs(Bucket("decode", 2), 2, 4, 4, CUDA)
    log.open(0, list(range(1, 16)))
    found = []
    for _ in range(10):
        plan = log.plan(s0=1)
        for op in plan.ops:
            if isinstance(op, SetRow):
                table.set_row(op)
        torch.cuda._sleep(20_000_000)  # about 10 ms in front of every copy
        batch, _ = stager.stage_bucket(plan, bucket)
        found.append((batch.token_ids.clone(), batch.page_rows.clone()))
    assert [tokens.tolist() for tokens, _ in found] == [[step + 1, 0] for step in range(10)]
    assert [rows[0].tolist() for _, rows in found] == [list(range(1, step // 4 + 2)) for step in range(10)]


class SlowPasses:
    """A ModelRunner whose passes the device finishes about 0.1 s after they were enqueued."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner

    def plan(self, batch: ForwardBatch) -> None:
        self.runner.plan(batch)

    def compute(self, batch: ForwardBatch) -> torch.Tensor | None:
        logits = self.runner.compute(batch)
        torch.cuda._sleep(200_000_000)
        return logits


def test_a_step_that_samples_nothing_is_complete_when_it_returns() -> None:
    """Its completion is published next, and its pages may be freed (I2)."""
    engine, log = tiny_engine(device="cuda", kv_sanitizer=False), PlanLog()
    log.open(0, [1, 2, 3])
    engine._runner = SlowPasses(engine._runner)  # type: ignore[assignment]
    assert log.run(engine, s0=1).token_ids == []
    assert torch.cuda.current_stream().query()


def test_too_little_device_memory_is_a_clear_error() -> None:
    with pytest.raises(ValueError, match="lower kv_gb"):
        tiny_engine(device="cuda", num_pages=None, kv_gb=100_000.0)
