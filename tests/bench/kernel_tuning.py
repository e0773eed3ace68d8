"""Every way of dividing a product of few rows, timed beside torch's: what skinny_config should choose.

Compiling takes longest: the other processors do that first, into the cache that all processes share.
"""

import multiprocessing
import os

import torch
from torch.nn import functional

from tests.bench.kernel_timing import num_sets, seconds_per_call
from tests.bench.measuring import say
from tests.bench.timed_cases import projections, randn
from workers.triton_kernels.skinny_matmul import MAX_ROWS, SkinnyConfig, skinny_config, skinny_matmul

SHARED_BYTES = 227 << 10
"""Of a multiprocessor of an H100, for one program."""


def shapes(config):
    """Return (name, depth, width, is_gated) of the products."""
    found = [(name, depth, width, False) for name, depth, width in projections(config)]
    return [*found, ("gated", config.hidden_size, config.intermediate_size, True)]


def candidates(depth, rows, is_gated):
    """Return the configurations that a program has the memory for."""
    block_rows = max(8, 1 << (rows - 1).bit_length())
    whole = 1 << (depth - 1).bit_length()
    block_ks = {256, 512} if whole > 2048 else {128, 256, 512, whole}
    found = []
    if rows > 16:  # whole warp groups multiply
        for block_n in (64, 128):
            for block_k, stages in ((64, (4, 6, 8)), (128, (3, 4, 5)), (256, (2, 3))):
                for num_stages in stages:
                    tile = (block_n * (2 if is_gated else 1) + block_rows) * block_k * 2
                    if tile * num_stages <= SHARED_BYTES and block_k < depth:
                        found.append(SkinnyConfig(block_n, block_k, 1, num_stages, 8))
        return found if is_gated else [*found, *(SkinnyConfig(32, 256, 4, stages, 8) for stages in (3, 4))]
    for block_n in (16, 32, 64):
        for block_k in sorted(block_ks):
            for num_parts in (4, 8):
                for num_stages in (1,) if block_k >= depth else (3, 5):
                    for lines in (0,) if block_k >= depth else (0, 8):
                        tile = (block_n * (2 if is_gated else 1) + block_rows) * block_k * 2
                        held = tile * max(1, min(num_stages, -(-depth // block_k)) - 1)
                        too_many = block_n * block_rows * num_parts * (2 if is_gated else 1) > 16384
                        if held <= SHARED_BYTES and not too_many and block_k // num_parts >= 32:
                            found.append(SkinnyConfig(block_n, block_k, num_parts, num_stages, lines))
    return found


def compile_all(jobs):
    """Launch each once, over few columns; a process of `tune`'s pool."""
    for depth, rows, is_gated, config in jobs:
        x, weight = randn(rows, depth, seed=0), randn(128, depth, seed=1)
        try:
            skinny_matmul(x, weight, None, config, is_gated=is_gated, pdl=True)
            torch.cuda.synchronize()
        except Exception as error:
            say(f"{config} at depth {depth}: {error}")


def tune(config, batches, num_processes=None):
    """Return, by product and rows, the best five (microseconds, configuration), what the rule chooses, and
    torch by either of its libraries: of a gated product without the activation."""
    batches = [rows for rows in batches if rows <= MAX_ROWS]
    jobs = {
        (depth, rows, is_gated, candidate)
        for _, depth, _, is_gated in shapes(config)
        for rows in batches
        for candidate in candidates(depth, rows, is_gated)
    }
    if 8 in batches:  # 1 and 8 rows are one compiled kernel
        jobs = {job for job in jobs if job[1] != 1}
    jobs = sorted(jobs, key=repr)
    num_processes = num_processes or min(12, os.cpu_count() or 1)
    say(f"compiling {len(jobs)} kernels in {num_processes} processes")
    with multiprocessing.get_context("spawn").Pool(num_processes) as pool:
        pool.map(compile_all, [jobs[first::num_processes] for first in range(num_processes)], chunksize=1)
    found = {}
    for name, depth, width, is_gated in shapes(config):
        found[name] = {str(rows): _best(depth, width, rows, is_gated) for rows in batches}
        say(f"{name}: {found[name]}")
    return found


def _best(depth, width, rows, is_gated):
    weight_rows = width * (2 if is_gated else 1)
    sets = [
        (randn(rows, depth, seed=seed), randn(weight_rows, depth, seed=1000 + seed))
        for seed in range(num_sets(2 * weight_rows * depth))
    ]

    def microseconds(product):
        calls = [lambda x=x, weight=weight: product(x, weight) for x, weight in sets]
        return round(1e6 * seconds_per_call(calls, rounds=3), 2)

    def ours(config):
        return microseconds(
            lambda x, weight: skinny_matmul(x, weight, None, config, is_gated=is_gated, pdl=True)
        )

    timed = []
    for config in candidates(depth, rows, is_gated):
        try:
            timed.append((ours(config), list(vars(config).values())))
        except Exception as error:  # of Triton's own kinds: too much shared memory, say
            say(f"{config}: {error}")
    found = {"best": sorted(timed)[:5]}
    rule = skinny_config(width, depth, rows, is_gated=is_gated)
    found["rule"] = "torch" if rule is None else (ours(rule), list(vars(rule).values()))
    chosen = torch.backends.cuda.preferred_blas_library()
    for library in ("cublas", "cublaslt"):
        torch.backends.cuda.preferred_blas_library(library)
        found[library] = microseconds(functional.linear)
    torch.backends.cuda.preferred_blas_library(chosen)
    return found
