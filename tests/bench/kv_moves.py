"""SAVEs and LOADs through PageMover, arena and board beside a plain copy of the same pages.

The plain copy runs in as many threads as the mover has. Ratios of wall-clock time and of processor time are
told apart: on free cores they agree, on busy ones the second still holds.
"""

import resource
import tempfile
import threading
import time
from pathlib import Path

import numpy
import torch

from cache_service.arena_files import SHARED_MEMORY
from tests.bench.measuring import Medians, say
from tests.unit.tiers import CPU, Tier, keys
from workers.kvcache.kv_pool import KVPool
from workers.kvcache.layout import target_only
from workers.kvcache.page_mover import NUM_THREADS
from workers.move_board import MoveBoard, MoveStatus

KIB, MIB = 1 << 10, 1 << 20
LAYOUTS = {"1mib": target_only(32, 8, 8, 128, "bfloat16"), "256kib": target_only(32, 2, 8, 128, "bfloat16")}
"""Pages of an 8B model: 8 tokens, and 2."""
TIMEOUT_S = 60.0


def measure_moves(rounds, total_bytes):
    """Return save_ratio_*, load_ratio_* and their parts; `total_bytes` are moved in each arm and round."""
    results = {}
    for name, layout in LAYOUTS.items():
        with (
            tempfile.TemporaryDirectory(dir=SHARED_MEMORY) as folder,
            _Pages(Path(folder), layout, total_bytes) as pages,
        ):
            found = Medians()
            for round_ in range(-1, rounds):  # the first warms up
                for arm, (wall_s, cpu_s) in pages.one_round().items():
                    if round_ >= 0:
                        found.add(f"{arm} wall", wall_s)
                        found.add(f"{arm} cpu", cpu_s)
        for kind in ("save", "load"):
            for clock, suffix in (("wall", ""), ("cpu", "_cpu")):
                ratio = found[f"plain {kind} {clock}"] / found[f"{kind} {clock}"]
                results[f"{kind}_ratio_{name}{suffix}"] = round(ratio, 3)
            results[f"{kind}_gb_s_{name}"] = round(pages.num_bytes / found[f"{kind} wall"] / 1e9, 2)
            results[f"plain_{kind}_gb_s_{name}"] = round(
                pages.num_bytes / found[f"plain {kind} wall"] / 1e9, 2
            )
            mover_us, plain_us = (
                found[f"{arm} cpu"] / pages.num_pages * 1e6 for arm in (kind, f"plain {kind}")
            )
            say(f"{kind} of {name} pages: {mover_us:.1f} us of processor a page, plain copy {plain_us:.1f}")
    return results


class _Pages:
    """A pool, an arena of as many slots, a mover between them."""

    def __init__(self, folder, layout, total_bytes):
        self.num_pages = total_bytes // layout.bundle_bytes
        self.num_bytes = self.num_pages * layout.bundle_bytes
        pool = KVPool(layout, self.num_pages, CPU)
        pool.data.copy_(
            torch.from_numpy(numpy.random.default_rng(1).integers(0, 256, pool.data.shape, numpy.uint8))
        )
        self._pool = pool.data.numpy()
        self._numbers = list(range(1, self.num_pages + 1))
        self._keys = keys(self.num_pages)
        self._board = _ToldBoard.private()
        self._tier = Tier(folder, [pool], num_slots=self.num_pages, board=self._board)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._tier.close()

    def one_round(self):
        """Run every arm once; return the seconds of each, (wall clock, processor)."""
        tier = self._tier
        grants = tier.grant(self.num_pages)
        slots = [numpy.frombuffer(tier.arena.bundle(grant.slot, 0), numpy.uint8) for grant in grants]
        pages = [self._pool[number] for number in self._numbers]
        found = {"plain save": _timed(lambda: _copy(pages, slots))}
        save = tier.save_op(self._numbers, grants, self._keys)
        found["save"] = self._timed_moves(save)
        locations = tier.commit(grants, self._keys)
        found["plain load"] = _timed(lambda: _copy(slots, pages))
        load = tier.load_op(self._numbers, locations, self._keys)
        found["load"] = self._timed_moves(load)
        assert tier.store.clear() == self.num_pages
        return found

    def _timed_moves(self, op):
        moves = range(op.first_move, op.first_move + self.num_pages)
        self._board.expect(moves[-1])
        found = _timed(lambda: self._run(op))
        assert all(self._board.status(move) is MoveStatus.DONE for move in moves)
        return found

    def _run(self, op):
        self._tier.start(op)
        assert self._board.is_told.wait(TIMEOUT_S)
        while self._tier.mover.num_in_flight:  # other threads' last moves
            time.sleep(0)


class _ToldBoard(MoveBoard):
    """Tells when the last move is over: looking for it would take the interpreter from the mover."""

    def expect(self, move):
        self._last, self.is_told = move, threading.Event()

    def publish_all(self, told):
        told = list(told)
        super().publish_all(told)
        if any(move == self._last and status.is_over for move, status in told):
            self.is_told.set()


def _copy(sources, targets):
    def copy(first):
        for place in range(first, len(sources), NUM_THREADS):
            numpy.copyto(targets[place], sources[place])

    threads = [threading.Thread(target=copy, args=(first,)) for first in range(NUM_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _timed(run):
    began_s, usage = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    run()
    ended_s, ended = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = ended.ru_utime + ended.ru_stime - usage.ru_utime - usage.ru_stime
    return ended_s - began_s, cpu_s
