"""The storm of requests, played without a GPU on a tiny model in float32; and what it finds if it may."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest

from tests.gpu.storm import Leg, parser
from workers.engine.mechanisms import Mechanisms
from workers.kvcache.moves import MoveInjection

ROOT = Path(__file__).parents[2]
SMALL = ["--device", "cpu", "--shape", "tiny", "--requests", "64", "--concurrency", "24"]
SMALL += ["--max-prompt-len", "60"]

pytestmark = pytest.mark.slow


def storm(*arguments):
    """Run the script; return its last line."""
    run = subprocess.run(
        [sys.executable, "tests/gpu/storm.py", *SMALL, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_a_storm_finds_nothing_and_goes_on_where_it_ended(tmp_path):
    progress = tmp_path / "progress.json"
    first = storm("--rounds", "2", "--progress", str(progress))
    assert first["num_rounds"] == 2 and first["num_requests"] == 128
    both = storm("--rounds", "1", "--progress", str(progress), "--page-size", "4")
    assert both["num_rounds"] == 3 and both["num_requests"] == 192
    assert both["num_violations"] == 0
    assert both["num_compared_tokens"] > 1_000
    assert both["num_evictions"] > 100 and both["num_loaded_pages"] > 10 and both["num_preemptions"] > 0
    written = json.loads(progress.read_text())
    assert [one["number"] for one in written["rounds"]] == [0, 1, 2]
    assert written["rounds"][2]["options"]["page_size"] == 4


@pytest.mark.parametrize("draft", ["self", "random-eagle3"])
def test_a_storm_with_a_draft_finds_nothing(draft):
    found = storm("--rounds", "1", "--page-size", "4", *drafting(draft))
    assert found["num_violations"] == 0
    assert found["num_compared_tokens"] > 300
    assert found["num_evictions"] > 50 and found["num_loaded_pages"] > 10
    assert found["outcomes"]["verify replay"] > 40


@pytest.mark.parametrize("draft", [None, "self"])
def test_a_storm_over_two_ranks_finds_nothing(draft):
    found = storm("--rounds", "1", "--tp-size", "2", "--page-size", "4", *drafting(draft))
    assert found["tp_size"] == 2 and found["num_violations"] == 0
    assert found["num_compared_tokens"] > 300
    assert found["num_evictions"] > 50 and found["num_loaded_pages"] > 10
    # Sampled answers often are not what was drafted.
    assert found["accept_len"] is None if draft is None else found["accept_len"] > 1.6


def drafting(draft):
    return [] if draft is None else ["--draft", draft, "--draft-tokens", "3"]


QUIET = parser().parse_args([*SMALL, "--page-size", "4", "--injection", "off", "--keep-logits"])


def first_found(leg):
    """Play until something is found, ten rounds at most."""
    return next(found for number in range(10) if (found := leg.play(number, QUIET)).violations)


def test_a_rank_that_reads_pages_before_they_are_loaded_is_found_out():
    late = MoveInjection(0, during_copy=lambda move: time.sleep(0.01 if move.kind == "load" else 0))
    with Leg(0, QUIET, Mechanisms(waits_for_loads=False), late) as leg:
        (told,) = first_found(leg).violations
    assert "SanitizerError" in told


def test_foreign_bytes_that_every_check_takes_for_right_are_found_by_the_tokens():
    ranks = []

    def replace(move):
        """Have a page's second half saved twice; the checksum, which comes after it, fits that."""
        if move.kind == "save" and ranks:
            pages, arena = ranks[0].engine.pool.data.numpy(), ranks[0].host_pages.client.arena
            half = pages.shape[1] // 2
            numpy.frombuffer(arena.bundle(move.slot, 0), numpy.uint8)[:half] = pages[move.page, half:]

    with Leg(0, QUIET, injection=MoveInjection(0, during_copy=replace)) as leg:
        ranks.append(leg.rank)
        found = first_found(leg)
    assert all("without the tier" in one for one in found.violations)
    # Each is told with where its bytes came from, and is no accident: the reference says the same again.
    assert len(found.diagnoses) == len(found.violations)
    assert any(page[1] == "loaded" for told in found.diagnoses for page in told["pages"])
    for told, violation in zip(found.diagnoses, found.violations, strict=True):
        assert f"token {told['place']} is {told['top'][0][0]}," in violation
        assert told["reference"] == told["reference_again"]
        assert f"without the tier {told['reference']['says']} " in violation
        assert told["reference"]["whole_differs_at"] == told["place"] and not told["reference"]["is_tie_now"]
