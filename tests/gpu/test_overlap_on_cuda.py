"""Steps launched ahead on CUDA: the tokens of depth 0, from a host that waits for nothing but their ends."""

import pytest
import torch

from tests.unit.engine_plans import PlanLog, generate, tiny_engine
from tests.unit.test_sampler import VARIED
from workers.protocol import SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PROMPTS = [[5, 9, 2], [7] * 11, list(range(20)), [1]]


def generate_ahead(engine, prompts, num_tokens, samplings):
    """Run prompts together, one step ahead; launching one may not wait for the device, its pass aside."""
    compute = engine._compute

    def unwatched(batch):  # the reference backend waits
        torch.cuda.set_sync_debug_mode("default")
        logits = compute(batch)
        torch.cuda.set_sync_debug_mode("error")
        return logits

    engine._compute = unwatched
    log = PlanLog(engine.layout.page_size, engine.num_pages)
    slots = range(len(prompts))
    for slot in slots:
        log.open(slot, prompts[slot], samplings[slot])
    plans = [log.plan(**{f"s{slot}": len(prompts[slot]) for slot in slots})]
    launch_watched(engine, plans[0])
    for _ in range(num_tokens - 1):
        plans.append(log.plan_ahead(*slots))
        launch_watched(engine, plans[-1])
        log.take(plans[-2], engine.collect())
    log.take(plans[-1], engine.collect())
    return [log.tokens[slot][len(prompts[slot]) :] for slot in slots]


def launch_watched(engine, plan):
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.launch(plan)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_greedy_tokens_are_those_of_depth_0() -> None:
    greedy = [SamplingParams(temperature=0.0)] * len(PROMPTS)
    expected = generate(tiny_engine(device="cuda", overlap_depth=0), PROMPTS, 12)
    engine = tiny_engine(device="cuda", overlap_depth=1, kv_sanitizer=False)
    assert generate_ahead(engine, PROMPTS, 12, greedy) == expected


def test_requests_of_all_kinds_wait_for_nothing_and_sample_what_they_do_on_cpu() -> None:
    prompts = [[slot + 1] * (slot + 2) for slot in range(len(VARIED))]
    samplings = [SamplingParams(**params) for params in VARIED]
    found = [
        generate_ahead(
            tiny_engine(device=device, overlap_depth=1, kv_sanitizer=False, max_running_requests=8),
            prompts,
            10,
            samplings,
        )
        for device in ("cpu", "cuda")
    ]
    assert found[0] == found[1]
