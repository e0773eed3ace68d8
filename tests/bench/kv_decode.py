"""Steady decodes, with and without SAVEs and LOADs going on beside them; and the moves by themselves.

One rank's Scheduler and Engine in a plain process. The moves come with the steps' plans, as in service, over
pages of the same pool that no request owns; stretches with and without them take turns within one batch.
"""

import contextlib
import dataclasses
import gc
import os
import resource
import tempfile
import time
from dataclasses import dataclass
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
from workers.kvcache.arena_part import VerifyPolicy
from workers.kvcache.manager import KVCacheManager
from workers.kvcache.mover import mover_for
from workers.move_board import MoveStatus
from workers.parallel import TPGroup
from workers.protocol import RequestId, SamplingParams, SubmitRequest
from workers.scheduler.scheduler import Scheduler

NUM_STEPS = 8
"""Of one stretch, and one more at its beginning that does not count."""


@dataclass(frozen=True)
class DecodeSetup:
    """What decodes, and what moves beside it."""

    config: WorkerConfig
    """All but `num_pages`."""
    rate: float = 500e6
    """Bytes a second, of SAVEs and of LOADs."""
    num_requests: int = 8
    prompt_len: int = 128
    num_request_pages: int = 1_024
    num_moved: int = 256
    """Pages, and slots, of each kind of moves; by default 90 MB of SmolLM2's, more than the caches hold."""
    verify: VerifyPolicy = "always"


def measure_decode(num_stretches):
    """Return decode_penalty, the latencies behind it and the rates that the moves came to."""
    torch.set_num_threads(os.cpu_count() or 1)
    config = WorkerConfig(max_running_requests=8, max_tokens_per_step=512)
    with Decode(DecodeSetup(config)) as decode:
        return decode.measure(num_stretches)


class Decode:
    """Use as a context manager."""

    def __init__(self, setup):
        self._setup = setup
        self._num_launched, self._depth = 0, setup.config.depth
        config = dataclasses.replace(setup.config, num_pages=setup.num_request_pages + 2 * setup.num_moved)
        card = load_card(config.model)
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(dir=SHARED_MEMORY))
            group = TPGroup.single()
            self._engine = Engine(config, card, group)
            gc.collect()  # as a Worker does
            gc.freeze()
            stack.callback(gc.unfreeze)
            cache = KVCacheManager(
                setup.num_request_pages,
                config.page_size,
                self._engine.namespace.digest(),
                1,
                prefix_caching=False,
            )
            self._scheduler = Scheduler(
                config,
                cache,
                end_token_ids=list(card.end_token_ids),
                max_context_len=self._engine.max_context_len,
                vocab_size=card.vocab_size,
                seeds=Random(0),
            )
            self._num_tokens = min(20_000, card.vocab_size - 100)  # to choose from
            self.traffic = Traffic(Path(folder), self._engine, group, setup)
            stack.callback(self.traffic.close)
            self._resources = stack.pop_all()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._resources.close()

    def measure(self, num_stretches):
        num_tokens = (2 * num_stretches + 2) * (NUM_STEPS + 1) + 8
        sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        for number in range(self._setup.num_requests):
            places = range(number * 7_919, number * 7_919 + 31 * self._setup.prompt_len, 31)
            prompt = [100 + place % self._num_tokens for place in places]
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
        traffic = self.traffic
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
        """Launch a step and commit the oldest, as the step loop does; tell if every request got a token."""
        plan = self._scheduler.plan(time.monotonic())
        self._engine.launch(msgspec.structs.replace(plan, ops=[*plan.ops, *ops]))
        self._num_launched += 1
        if self._num_launched <= self._depth:
            return False
        self._num_launched -= 1
        output = self._engine.collect()
        self._scheduler.completed(output.step)
        outputs = self._scheduler.commit(output)
        return sum(len(output.token_ids) for output in outputs) == self._setup.num_requests


class Traffic:
    """SAVEs and LOADs of pages above those that requests may own."""

    def __init__(self, folder, engine, group, setup):
        self._setup = setup
        num_moved, first = setup.num_moved, setup.num_request_pages + 1
        self._tier = Tier(
            folder,
            [engine.pool],
            num_slots=2 * num_moved,
            board=group.moves,
            make=mover_for,
            verify=setup.verify,
        )
        self._mover = self._tier.mover
        engine.attach(self._mover)
        self._bundle_bytes = engine.layout.bundle_bytes
        self._keys = keys(num_moved)
        self._saved = list(range(first, first + num_moved))
        self._loaded = [page + num_moved for page in self._saved]
        engine.pool.data[first:] = 1
        self._locations = self._tier.save(self._loaded, self._keys)
        self._grants = self._tier.grant(num_moved)  # never committed: they may be written again and again
        self._num_issued = 0
        self._began_s = 0.0

    def begin(self):
        """Count time from now on: a pause is not made up for."""
        while self._mover.num_in_flight:
            time.sleep(0.001)
        self._num_issued, self._began_s = 0, time.perf_counter()

    def ops(self):
        """Return the moves that are due by now, of either kind as many; fewer where the mover lags."""
        num_moved = self._setup.num_moved
        num_due = int(self._setup.rate * (time.perf_counter() - self._began_s) / self._bundle_bytes)
        num = max(0, min(num_due - self._num_issued, num_moved - self._mover.num_in_flight))
        places = [(self._num_issued + place) % num_moved for place in range(num)]
        self._num_issued += num
        return [self._op(kind, places) for kind in ("save", "load")] if places else []

    def move_all(self, *kinds):
        """Move every page of these kinds while nothing decodes; return bytes, seconds, processor seconds."""
        self.begin()
        ops = [self._op(kind, range(self._setup.num_moved)) for kind in kinds]
        began_s, usage = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
        for op in ops:
            self._tier.start(op)
        for op in ops:
            outcome = self._tier.outcome(op)
            assert outcome == [MoveStatus.DONE] * len(outcome), "a move failed"
        seconds, ended = time.perf_counter() - began_s, resource.getrusage(resource.RUSAGE_SELF)
        cpu_s = ended.ru_utime + ended.ru_stime - usage.ru_utime - usage.ru_stime
        return len(kinds) * self._setup.num_moved * self._bundle_bytes, seconds, cpu_s

    def _op(self, kind, places):
        names = [self._keys[place] for place in places]
        if kind == "save":
            pages, grants = [self._saved[p] for p in places], [self._grants[p] for p in places]
            return self._tier.save_op(pages, grants, names)
        pages, locations = [self._loaded[p] for p in places], [self._locations[p] for p in places]
        return self._tier.load_op(pages, locations, names)

    def num_bytes(self):
        return dict(self._mover.stats.num_bytes)

    def close(self):
        self._tier.close()
