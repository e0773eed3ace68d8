"""What planning and committing a step costs rank 0's host, without engine and messages; one line of JSON.

    python tests/bench/bench_scheduler.py --json

us_per_request_b*   microseconds of plan and commit, each request and step, at so many decoding requests
plan_us_b*          of these, planning's part
*_ahead             the same with a step in flight while the next is planned
"""

import argparse
import gc
import json
import time
from collections import deque
from itertools import product
from random import Random
from typing import Literal

from cache_service.keys import NamespaceDigest
from workers.config import WorkerConfig
from workers.kvcache.manager import KVCacheManager
from workers.plan import BatchPlan, StepOutput
from workers.protocol import RequestId, SamplingParams, SubmitRequest
from workers.scheduler.scheduler import Scheduler

BATCH_SIZES = (1, 64, 256)
PROMPT_LEN = 128
NUM_STEPS = 256
PAGE_SIZE = 16


def make_scheduler(num_requests: int, depth: Literal[0, 1]) -> Scheduler:
    """Return a scheduler whose requests have all been prefilled."""
    num_pages = num_requests * (PROMPT_LEN + 4 * NUM_STEPS) // PAGE_SIZE + 8
    config = WorkerConfig(
        page_size=PAGE_SIZE,
        num_pages=num_pages,
        max_running_requests=num_requests,
        max_tokens_per_step=num_requests * PROMPT_LEN,
        overlap_depth=depth,
    )
    cache = KVCacheManager(num_pages, PAGE_SIZE, NamespaceDigest(b"n" * 16), 1)
    scheduler = Scheduler(
        config, cache, end_token_ids=[0], max_context_len=8192, vocab_size=50_000, seeds=Random(0)
    )
    random = Random(1)
    for number in range(num_requests):
        prompt = [random.randrange(1, 50_000) for _ in range(PROMPT_LEN)]
        submit = SubmitRequest(RequestId(str(number)), prompt, SamplingParams(temperature=0.0))
        scheduler.add(submit, 0.0)
    return scheduler


def answer(plan: BatchPlan) -> StepOutput:
    """Return what an engine would: some token for each sampled row."""
    num = len(plan.sampled)
    return StepOutput(plan.step, plan.relocation_version, [7 + plan.step % 100] * num, [None] * num)


def measure(num_requests: int, rounds: int, depth: Literal[0, 1]) -> tuple[float, float]:
    """Return the microseconds a request and step of plan and commit, and of plan alone: the best round's."""
    scheduler = make_scheduler(num_requests, depth)
    in_flight: deque[StepOutput] = deque()
    clock = time.thread_time  # whatever else the machine does
    found: list[tuple[float, float]] = []
    for _ in range(rounds + 1):  # the first warms up, and has the prefills
        plan_s = commit_s = 0.0
        for _ in range(NUM_STEPS):
            scheduler.completed(scheduler._num_steps - len(in_flight))
            begin_s = clock()
            plan = scheduler.plan(0.0)
            planned_s = clock()
            assert plan is not None
            plan_s += planned_s - begin_s
            in_flight.append(answer(plan))
            if len(in_flight) <= depth:
                continue
            output = in_flight.popleft()
            answered_s = clock()
            outputs = scheduler.commit(output)
            commit_s += clock() - answered_s
            assert len(outputs) == num_requests
        scale = 1e6 / (NUM_STEPS * num_requests)
        found.append(((plan_s + commit_s) * scale, plan_s * scale))
    return min(found[1:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Measure the scheduler's own time for each request and step."
    )
    parser.add_argument("--json", action="store_true", help="print the JSON line only, without the table")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    gc.freeze()
    result: dict[str, float] = {}
    depths: tuple[Literal[0, 1], ...] = (0, 1)
    for depth, num_requests in product(depths, BATCH_SIZES):
        both, plan = measure(num_requests, arguments.rounds, depth)
        name = f"b{num_requests}_ahead" if depth else f"b{num_requests}"
        result[f"us_per_request_{name}"] = round(both, 3)
        result[f"plan_us_{name}"] = round(plan, 3)
    if not arguments.json:
        for name, value in result.items():
            print(f"{name:24} {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
