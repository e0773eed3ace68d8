"""The benchmark of speculation, rehearsed on a tiny model: every part runs and tells all its figures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_draft_that_is_always_right_is_believed_wherever_prompts_come_from(tmp_path):
    out = tmp_path / "results.json"
    command = ["--quick", "--json", "--model", "tiny", "--draft", "self", "--dtype", "float32"]
    command += ["--batch-sizes", "1,4", "--threads", "1", "--out", str(out)]
    run = subprocess.run(
        [sys.executable, "tests/bench/bench_speculation.py", *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    results = json.loads(run.stdout.splitlines()[-1])
    assert results == json.loads(out.read_text())
    by_origin = results["accept_length_by_origin"]
    assert by_origin.keys() == {"computed", "device", "host", "peer"}
    assert results["accept_length"] > 3.5
    assert set(by_origin.values()) == {results["accept_length"]}
    assert all(ratio > 0.5 for ratio in results["found_ratio"].values()), "whole pages of each prompt"
    assert results["replay_ratio"]["verify"] == results["replay_ratio"]["draft"] == 1
    for size in (1, 4):
        assert results[f"speedup_b{size}"] > 0 and sum(results[f"draft_steps_b{size}"].values()) > 0
