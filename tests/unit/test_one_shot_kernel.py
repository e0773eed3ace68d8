"""The kernel of one-shot sums in Triton's interpreter: ranks are processes, inboxes a file they all map."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("triton") is None:  # not imported here: test_triton_kernels interprets it
    pytest.skip("Triton is not installed: it comes with torch's CUDA builds", allow_module_level=True)

SCRIPT = Path(__file__).parent / "one_shot_rank.py"
ROOT = SCRIPT.parents[2]


@pytest.mark.parametrize("num_ranks", [2, 3, 8])
def test_ranks_that_come_at_different_times_get_the_same_right_sums(tmp_path: Path, num_ranks: int) -> None:
    said = said_by_ranks(tmp_path, num_ranks, num_sums=20)
    assert [each["wrong"] for each in said] == [[]] * num_ranks
    assert all(each == said[0] for each in said), "not bit by bit the same"
    assert said[0]["epochs"][0] < 0, "the counts have not wrapped"


def test_what_a_rank_computes_once_it_waits_no_more_is_added_by_nobody(tmp_path: Path) -> None:
    first, left, last = said_by_ranks(tmp_path, 3, num_sums=0)
    assert left["has_left"] and left["first"] != 6.0, "it waited for the rank that was late"
    assert first == last == {"first": 6.0, "has_left": False, "waited": True}


def said_by_ranks(folder: Path, num_ranks: int, num_sums: int) -> list[dict]:
    """Return what one_shot_rank says on each rank."""
    inboxes = folder / "inboxes"
    inboxes.write_bytes(bytes(1 << 20))
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(inboxes), str(rank), str(num_ranks), str(num_sums)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(num_ranks)
    ]
    try:
        return [json.loads(rank.communicate(timeout=200)[0]) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
