"""Steady decodes, with and without SAVEs and LOADs going on beside them.

One rank's Scheduler and Engine in a plain process. The moves come with the steps' plans, as in service, over
pages of the same pool that no request owns; stretches with and without them take turns within one batch.
"""

import os
import tempfile
import time
from pathlib import Path
from random import Random

import msgspec
import torch

from cache_service.arena_files import SHARED_MEMORY
from tests.bench.measuring import Medians, say
from tests.unit.tiers import Tier, keys
from workers.card import load_card
from workers.config import WorkerConfig
from workers.engine.engine import Engine
from workers.kvcache.manager import KVCacheManager
from workers.parallel import TPGroup
from workers.protocol import RequestId, SamplingParams, SubmitRequest
from workers.scheduler.scheduler import Scheduler

RATE = 500e6
"""Bytes a second, of SAVEs and of LOADs."""
NUM_REQUESTS = 8
PROMPT_LEN = 128
NUM_STEPS = 8
"""Of one stretch, and one more at its beginning that does not count."""
NUM_REQUEST_PAGES = 1_024
NUM_MOVED = 256
"""Pages, and slots, of each kind of moves: 90 MB, more than the caches hold."""


def measure_decode(num_stretches):
    """Return decode_penalty, the latencies behind it and the rates that the moves came to."""
    torch.set_num_threads(os.cpu_count() or 1)
    with tempfile.TemporaryDirectory(dir=SHARED_MEMORY) as folder:
        decode = _Decode(Path(folder))
        try:
            return decode.measure(num_stretches)
        finally:
            decode.close()


class _Decode:
    def __init__(self, folder):
        num_pages = NUM_REQUEST_PAGES + 2 * NUM_MOVED
        config = WorkerConfig(num_pages=num_pages, max_running_requests=NUM_REQUESTS, max_tokens_per_step=512)
        card = load_card(config.model)
        self._group = TPGroup.single()
        self._engine = Engine(config, card, self._group)
        cache = KVCacheManager(
            NUM_REQUEST_PAGES, config.page_size, self._engine.namespace.digest(), 1, prefix_caching=False
        )
        self._scheduler = Scheduler(
            config,
            cache,
            end_token_ids=list(card.end_token_ids),
            max_context_len=self._engine.max_context_len,
            vocab_size=card.vocab_size,
            seeds=Random(0),
        )
        self._traffic = _Traffic(folder, self._engine, self._group)

    def measure(self, num_stretches):
        num_tokens = (2 * num_stretches + 2) * (NUM_STEPS + 1) + 8
        sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        for number in range(NUM_REQUESTS):
            prompt = [100 + (number * 7_919 + place * 31) % 20_000 for place in range(PROMPT_LEN)]
            self._scheduler.add(SubmitRequest(RequestId(str(number)), prompt, sampling), time.monotonic())
        while not self._step([]):
            pass
        found, totals = Medians(), Medians()
        for stretch in range(-1, num_stretches):  # the first warms up
            arms = ("alone", "beside") if stretch % 2 else ("beside", "alone")
            for arm in arms:
                step_s = self._stretch(arm, totals)
                say(f"stretch {stretch}: {1000 * step_s:.2f} ms {arm}")
                if stretch >= 0:
                    found.add(arm, step_s)
        return {
            "decode_penalty": round(found["beside"] / found["alone"], 3),
            "decode_ms": round(1000 * found["alone"], 2),
            "decode_ms_beside_moves": round(1000 * found["beside"], 2),
            "save_mb_s": round(totals["save"] / 1e6),
            "load_mb_s": round(totals["load"] / 1e6),
        }

    def _stretch(self, arm, totals):
        """Return the mean inter-token latency of some steps."""
        traffic = self._traffic
        traffic.begin()
        self._step(traffic.ops() if arm == "beside" else [])
        before, began_s = traffic.num_bytes(), time.perf_counter()
        for _ in range(NUM_STEPS):
            self._step(traffic.ops() if arm == "beside" else [])
        seconds = time.perf_counter() - began_s
        if arm == "beside":
            for kind, num_bytes in traffic.num_bytes().items():
                totals.add(kind, (num_bytes - before[kind]) / seconds)
        return seconds / NUM_STEPS

    def _step(self, ops):
        """Run one step; tell whether every request got a token."""
        plan = self._scheduler.plan(time.monotonic())
        outputs = self._scheduler.commit(
            self._engine.run(msgspec.structs.replace(plan, ops=[*plan.ops, *ops]))
        )
        self._scheduler.completed(plan.step)
        return sum(len(output.token_ids) for output in outputs) == NUM_REQUESTS

    def close(self):
        self._traffic.close()


class _Traffic:
    """SAVEs and LOADs at a steady rate, of pages above those that requests may own."""

    def __init__(self, folder, engine, group):
        self._tier = Tier(folder, [engine.pool], num_slots=2 * NUM_MOVED, board=group.moves)
        self._mover = self._tier.mover
        engine.attach(self._mover)
        self._bundle_bytes = engine.layout.bundle_bytes
        self._keys = keys(NUM_MOVED)
        self._saved = list(range(NUM_REQUEST_PAGES + 1, NUM_REQUEST_PAGES + NUM_MOVED + 1))
        self._loaded = [page + NUM_MOVED for page in self._saved]
        engine.pool.data[NUM_REQUEST_PAGES + 1 :] = 1
        self._locations = self._tier.save(self._loaded, self._keys)
        self._grants = self._tier.grant(NUM_MOVED)  # never committed: they may be written again and again
        self._num_issued = 0
        self._began_s = 0.0

    def begin(self):
        """Count time from now on: a pause is not made up for."""
        while self._mover.num_in_flight:
            time.sleep(0.001)
        self._num_issued, self._began_s = 0, time.perf_counter()

    def ops(self):
        """Return the moves that are due by now, of either kind as many; fewer where the mover lags."""
        num_due = int(RATE * (time.perf_counter() - self._began_s) / self._bundle_bytes)
        num = min(num_due - self._num_issued, NUM_MOVED - self._mover.num_in_flight)
        places = [(self._num_issued + place) % NUM_MOVED for place in range(num)]
        self._num_issued += num
        if not places:
            return []
        pages, grants = [self._saved[place] for place in places], [self._grants[place] for place in places]
        targets = [self._loaded[place] for place in places]
        locations, names = (
            [self._locations[place] for place in places],
            [self._keys[place] for place in places],
        )
        return [self._tier.save_op(pages, grants, names), self._tier.load_op(targets, locations, names)]

    def num_bytes(self):
        return dict(self._mover.stats.num_bytes)

    def close(self):
        self._tier.close()
