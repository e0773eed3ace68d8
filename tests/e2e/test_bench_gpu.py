"""The GPU benchmark, rehearsed on a tiny model without a GPU: every part runs and tells all its figures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MULTITURN = {
    "wall_s",
    "chat_wall_s",
    "ttft_mean_ms",
    "ttft_p99_ms",
    "cached_share",
    "chat_tpot_mean_ms",
    "steady_mean_ms",
    "steady_p50_ms",
    "steady_p99_ms",
    "steady_max_ms",
    "graph_replay_ratio",
    "replayed_decode_token_ratio",
}


@pytest.mark.slow
def test_every_part_runs_and_the_tier_gives_back_what_the_device_forgot(tmp_path):
    out = tmp_path / "results.json"
    command = ["tests/bench/bench_gpu.py", "--device", "cpu", "--quick", "--json", "--out", str(out)]
    run = subprocess.run(
        [sys.executable, *command, "--model", "smol135m", "--max-tokens-per-step", "256"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    results = json.loads(run.stdout.splitlines()[-1])
    assert results == json.loads(out.read_text())
    assert results["floors"]["read_gb_s"] > 0
    assert results["decode"]["smol135m"]["b4"]["tpot_over_floor"] > 0
    assert results["moves"]["load_gb_s"] > 0 and results["moves"]["tier_tpot_penalty"] > 0
    off, on = results["multiturn"]["tier_off"], results["multiturn"]["tier_on"]
    assert off.keys() >= MULTITURN and on.keys() >= MULTITURN | {"load_gb_s", "save_gb_s"}
    assert on["cached_share"] > off["cached_share"], "the pool is too small for all chats, the arena is not"
    assert on["failed_loads"] == on["failed_saves"] == 0


def test_options_of_the_workers_are_flags_and_bad_ones_are_refused():
    run = subprocess.run(
        [sys.executable, "tests/bench/bench_gpu.py", "--device", "cpu", "--page-size", "3"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode != 0
    assert "page_size" in run.stderr and "1, 2, 4, 8, 16, 32 or 64" in run.stderr
