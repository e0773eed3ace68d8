"""The benchmark of several GPUs, rehearsed on a tiny model over gloo: every part tells all its figures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench.plan_latency import until_the_last

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_every_part_runs_on_two_ranks(tmp_path):
    out = tmp_path / "results.json"
    command = ["tests/bench/bench_tp.py", "--device", "cpu", "--quick", "--json", "--out", str(out)]
    run = subprocess.run(
        [sys.executable, *command, "--models", "llama8b"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    results = json.loads(run.stdout.splitlines()[-1])
    assert results == json.loads(out.read_text())
    assert all(us > 0 for us in results["all_reduce"]["gloo"].values())
    assert all(told["p99_us"] >= told["p50_us"] > 0 for told in results["plans"].values())
    for figures in results["decode"]["llama8b"].values():
        assert figures["b4"]["tpot_ms"] > 0 and "all_reduce_share" in figures["b4"]["profile"]
    assert results["scaling"]["llama8b"]["tp2"]["b1"]["of_one_rank"] > 0
    multiturn = results["multiturn"]["tp2"]
    assert multiturn["failed_loads"] == multiturn["failed_saves"] == 0 and multiturn["cached_share"] > 0


def test_a_plan_has_arrived_once_its_last_follower_has_it():
    """Each follower is late for two plans of five, but for other ones: four of five are late somewhere."""
    early, late = [1e-6], [9e-6]
    first, second = (late * 2 + early * 3) * 20, (early * 2 + late * 2 + early) * 20
    assert until_the_last([first]) == {"p50_us": 1.0, "p99_us": 9.0}
    assert until_the_last([first, second]) == {"p50_us": 9.0, "p99_us": 9.0}


def test_more_ranks_than_cards_are_refused():
    run = subprocess.run(
        [sys.executable, "tests/bench/bench_tp.py", "--tp-sizes", "1,64"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode != 0 and "CUDA devices" in run.stderr
