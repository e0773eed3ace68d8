"""Captured graphs against the same engine's eager steps, on CUDA with FlashInfer.

Compiles kernels for heads of 64 in bfloat16, as test_flashinfer.py does.
"""

from collections.abc import Callable

import pytest
import torch

from tests.property.test_mutations_engine import decode_with_varying_neighbours, prefill_beside_decodes
from tests.unit.engine_plans import PlanLog, tiny_card, tiny_engine
from workers.engine.cuda_graphs import CudaGraphs
from workers.engine.engine import Engine
from workers.engine.mechanisms import ALL_ON, Mechanisms
from workers.kvcache.kv_pool import DUMMY_PAGE
from workers.kvcache.sanitizer import SanitizerError
from workers.plan import BatchPlan, StepOutput

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(900),
]

PROMPTS = [[5, 9, 2], [7] * 11, list(range(20)), [1]]
NUM_TOKENS = 12
ROUNDING_RATIO = 2**-5
"""Of the largest logit: a replay divides contexts otherwise than an eager step, in a model of bfloat16."""


def cuda_engine(mechanisms: Mechanisms = ALL_ON, **options: object) -> Engine:
    card = tiny_card(hidden_size=64, head_dim=64, dtype="bfloat16", tied_embeddings=True)
    fields: dict[str, object] = {
        "device": "cuda",
        "attention_backend": "flashinfer",
        "graph_batch_sizes": (1, 2, 4),
        "graph_token_sizes": (8, 48),
        **options,
    }
    return tiny_engine(mechanisms, card, **fields)


class Watched:
    """An engine whose steps' logits are kept: those of the sampled rows, on the host."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.logits: list[torch.Tensor] = []
        sampler = engine._sampler
        assert sampler is not None
        sample = sampler.sample

        def spy(logits: torch.Tensor, *arguments: object):
            self.logits.append(logits.float().cpu())
            return sample(logits, *arguments)

        sampler.sample = spy  # type: ignore[method-assign]

    def run(self, plan: BatchPlan) -> StepOutput:
        return self.engine.run(plan)


def forced(
    log: PlanLog, watched: tuple[Watched, Watched], prompts: list[list[int]], chunk_len: int
) -> list[float]:
    """Run the same plans, with the first engine's tokens, on both; return how far each step's logits differ,
    as a part of the largest."""
    for slot, prompt in enumerate(prompts):
        log.open(slot, prompt)
    while any(len(log.tokens[slot]) - len(prompt) < NUM_TOKENS for slot, prompt in enumerate(prompts)):
        lens = {
            f"s{slot}": min(chunk_len, len(log.tokens[slot]) - log.num_computed[slot])
            for slot in range(len(prompts))
        }
        plan = log.plan(**lens)
        output = watched[0].run(plan)
        watched[1].run(plan)
        log.take(plan, output)
    for slot in range(len(prompts)):
        log.close(slot)
    return differences(*watched)


def differences(first: Watched, second: Watched) -> list[float]:
    assert len(first.logits) == len(second.logits) > 0
    return [
        ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(first.logits, second.logits, strict=True)
    ]


@pytest.mark.parametrize("page_size", [1, 2, 4, 8, 16, 32, 64])
def test_replays_give_the_logits_of_eager_steps(page_size: int) -> None:
    options = {"page_size": page_size, "num_pages": max(6, 256 // page_size)}
    graphed, eager = cuda_engine(**options), cuda_engine(graphs=False, **options)
    watched = Watched(graphed), Watched(eager)
    log = PlanLog(page_size, graphed.num_pages)
    for chunk_len in (3, 256):
        assert max(forced(log, watched, PROMPTS, chunk_len)) < ROUNDING_RATIO
    assert not graphed.eager_steps
    assert graphed.graph_steps["decode", "replay"] >= 11
    assert graphed.graph_steps["mixed", "replay"] >= 2
    assert {outcome for _, outcome in eager.graph_steps} == {"eager"}


def test_rows_come_and_go_and_pages_are_handed_on_under_replays() -> None:
    for run in (decode_with_varying_neighbours, prefill_beside_decodes, pages_change_hands):
        graphed, eager = cuda_engine(), cuda_engine(graphs=False)
        watched = Watched(graphed), Watched(eager)
        run(Both(*watched))  # type: ignore[arg-type]
        assert max(differences(*watched)) < ROUNDING_RATIO
        assert sum(graphed.eager_steps.values()) == 0


class Both:
    """Runs each plan on two engines; the tokens are the first one's."""

    def __init__(self, first: Watched, second: Watched) -> None:
        self.first, self.second = first, second

    def run(self, plan: BatchPlan) -> StepOutput:
        self.second.run(plan)
        return self.first.run(plan)


def pages_change_hands(engine: Engine) -> None:
    """Slots end and begin, so that each time other pages are another slot's."""
    log = PlanLog()
    for generation in range(5):
        for slot in range(3):
            log.open(slot, [(generation * 7 + slot * 3 + token) % 101 for token in range(6 + slot)])
        log.run(engine, s0=6, s1=7, s2=8)
        for _ in range(4):
            log.run(engine, s2=1, s0=1, s1=1)
        log.close(1)
        log.run(engine, s0=1, s2=1)
        log.close(generation % 2 * 2)
        log.run(engine, **{f"s{2 - generation % 2 * 2}": 1})
        log.close(2 - generation % 2 * 2)


def test_prefills_alone_replay_as_far_as_buckets_go() -> None:
    engine, log = cuda_engine(), PlanLog()
    log.open(0, list(range(60)))
    log.run(engine, s0=49)
    log.run(engine, s0=8)
    assert engine.graph_steps == {("extend", "eager"): 1, ("extend", "replay"): 1}
    assert engine.eager_steps == {("extend", "no_bucket"): 1}


def test_what_capturing_took_is_reported() -> None:
    stats = cuda_engine().capture_stats
    assert stats.num_graphs == 5
    assert stats.seconds > 0
    assert stats.num_bytes >= 0


def test_pads_leave_the_dummy_page_zero() -> None:
    engine = cuda_engine(kv_sanitizer=False)
    log = PlanLog()
    for slot in range(3):
        log.open(slot, [slot + 1] * 9)
    log.run(engine, s0=9, s1=8)  # 17 tokens in a bucket of 48
    log.run(engine, s0=1, s1=1, s2=1)  # 3 rows in a bucket of 4
    assert engine.graph_steps == {("extend", "replay"): 1, ("decode", "replay"): 1}
    assert not engine.pool.data[DUMMY_PAGE].any().item()


def logits_kept_and_seen(mechanisms: Mechanisms) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Run five replays in three buckets; return their logits as they are at the end and as they were then."""
    engine = cuda_engine(mechanisms, kv_sanitizer=False)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    replay = engine._graphs.replay

    def spy(batch):
        logits = replay(batch)
        seen.append((logits, logits.clone()))
        return logits

    engine._graphs.replay = spy  # type: ignore[method-assign]
    log = PlanLog()
    log.open(0, [1, 2, 3])
    log.open(1, [4, 5, 6, 7])
    log.run(engine, s0=3, s1=4)
    for lens in ({"s0": 1, "s1": 1}, {"s1": 1}, {"s0": 1}, {"s1": 1, "s0": 1}):
        log.run(engine, **lens)
    return seen


def check_that_logits_last(mechanisms: Mechanisms) -> None:
    last = [torch.equal(logits, copy) for logits, copy in logits_kept_and_seen(mechanisms)]
    assert all(last), f"replayed_logits: they last {last}"


def test_logits_of_a_replay_outlive_the_next() -> None:
    check_that_logits_last(ALL_ON)
    with pytest.raises(AssertionError, match=r"replayed_logits: they last \[False"):
        check_that_logits_last(Mechanisms(clones_outputs=False))


@pytest.mark.parametrize("run", [decode_with_varying_neighbours, prefill_beside_decodes])
@pytest.mark.parametrize(
    ("mechanisms", "check"),
    [(Mechanisms(pads_rows=False), "pad_rows"), (Mechanisms(copies_rows=False), "staged_row")],
)
def test_mechanisms_switched_off_are_noticed(
    run: Callable[[Engine], None], mechanisms: Mechanisms, check: str
) -> None:
    options = {"graph_batch_sizes": (3,), "graph_token_sizes": (12,)}
    run(cuda_engine(**options))
    with pytest.raises(SanitizerError) as caught:
        run(cuda_engine(mechanisms, **options))
    assert caught.value.check == check


def test_a_pass_that_waits_cannot_be_captured_and_the_next_can() -> None:
    graphs = CudaGraphs(torch.device("cuda"))
    x = torch.ones(3, device="cuda")
    out = torch.zeros(3, device="cuda")
    with pytest.raises(RuntimeError, match="captur"):
        graphs.capture(lambda: x.sum().item())
    replay = graphs.capture(lambda: out.copy_(x * 2))
    out.zero_()
    x.fill_(5)
    replay()
    assert out.tolist() == [10, 10, 10]


def test_a_replay_waits_for_nothing() -> None:
    engine, log = cuda_engine(kv_sanitizer=False), PlanLog()
    log.open(0, [1, 2, 3])
    log.open(1, [4, 5])
    log.run(engine, s0=3, s1=2)
    log.run(engine, s0=1, s1=1)
    plan = log.plan(s0=1, s1=1)
    staged, _ = engine._stager.stage_bucket(plan, engine._graphs.inputs(engine._guard.buckets[1]))
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.inference_mode():
            assert engine._graphs.replay(staged) is not None
    finally:
        torch.cuda.set_sync_debug_mode("default")
