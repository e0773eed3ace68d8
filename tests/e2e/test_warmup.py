"""`eyrie warmup`: ranks start and end, and what they compile is there for the next start."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.eyrie_process import tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_model(tmp_path_factory.mktemp("model") / "tiny"))


def warm_up(*arguments, cache):
    return subprocess.run(
        [sys.executable, "-m", "cluster", "warmup", *arguments],
        env={**os.environ, "HOME": str(cache)},
        capture_output=True,
        text=True,
        timeout=200,
    )


def compiled(cache: Path) -> dict[str, float]:
    return {library.name: library.stat().st_mtime for library in cache.rglob("*.so")}


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.timeout(300)
def test_what_a_rank_compiles_is_there_afterwards(model, tmp_path, tp_size):
    arguments = [model, "--tp-size", str(tp_size), "--kv-gb", "0.05", "--attention-backend", "native"]
    first = warm_up(*arguments, cache=tmp_path)
    assert first.returncode == 0, first.stderr
    assert first.stdout == ""
    assert f"building {tp_size} rank" in first.stderr
    built = compiled(tmp_path)
    assert built
    assert warm_up(*arguments, cache=tmp_path).returncode == 0
    assert compiled(tmp_path) == built


@pytest.mark.parametrize(
    ("arguments", "exit_code", "parts"),
    [
        (["--kv-gb", "100000"], 1, ["eyrie: kv_gb=100000", "lower kv_gb"]),
        (["--attention-backend", "flashinfer"], 1, ["eyrie: attention_backend=flashinfer: found cpu"]),
        (["--page-size", "17"], 2, ["`worker.page_size`", "16, 32 or 64"]),
        (["--start-timeout-s", "0.001"], 1, ["start_timeout_s=0.001", "repeat the command"]),
        (["--tp-size", "2", "--kv-gb", "100000"], 1, ["eyrie: kv_gb=100000"]),
    ],
)
@pytest.mark.timeout(300)
def test_what_keeps_a_rank_from_starting_is_told(model, tmp_path, arguments, exit_code, parts):
    result = warm_up(model, *arguments, cache=tmp_path)
    assert result.returncode == exit_code, result.stderr
    for part in parts:
        assert part in result.stderr
    assert "Traceback" not in result.stderr


def test_a_model_that_is_not_there_is_told(tmp_path):
    result = warm_up("/no/such/model", cache=tmp_path)
    assert result.returncode == 1
    assert "eyrie: " in result.stderr and "/no/such/model" in result.stderr
