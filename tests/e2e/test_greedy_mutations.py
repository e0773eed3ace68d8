"""With a mechanism off, some seed of test_greedy_seeds.py goes red: the seeds would notice its loss."""

import re
from dataclasses import replace

import pytest

from cache_service.arena_safety import ArenaSafety
from tests.scenario import Comparison
from tests.tier_seeds import FETCHES_ALL, TierSeed, TookPlace
from tests.tiny_oracle import make_tiny
from workers.engine.mechanisms import ALL_ON
from workers.kvcache.sanitizer_error import SanitizerError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]

NUM_SEEDS = 16
MANY_SEEDS = 100
"""Where one bit of some pages is wrong: of most bits no token depends."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return str(folder), make_tiny(folder, (14, 23, 30, 36, 36), common_len=9, seed=2)


def without(draw, **off):
    """Return a draw on one rank, in this process, without mechanisms of the engine and its mover."""
    mechanisms = replace(ALL_ON, **off)
    return replace(draw, mechanisms=mechanisms, faults=replace(draw.faults, mechanisms=mechanisms))


def unsafe(draw, **off):
    """Return the same without what keeps pages safe in the decider."""
    return replace(draw, safety=replace(FETCHES_ALL, **off))


def first_red(tiny, tmp_path, change, num_seeds=NUM_SEEDS, **options):
    """Return what the first red seed says; None if all are green."""
    model, cases = tiny
    for seed in range(num_seeds):
        draw = change(
            replace(TierSeed.draw(seed, ["host", "peer"], (2, 4, 8)), tp_size=1, restart="none", draft=None)
        )
        folder = tmp_path / str(seed)
        folder.mkdir()
        try:
            draw.play(cases, folder, None, Comparison(), TookPlace(), model=model, **options)
        except (AssertionError, SanitizerError) as error:
            return str(error)
    return None


def test_all_are_green_with_every_mechanism_on(tiny, tmp_path):
    assert first_red(tiny, tmp_path, lambda draw: draw) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda draw: without(draw, verifies_loads=False), "loaded_bytes: .* after a LOAD that is DONE"),
        (lambda draw: without(draw, waits_for_loads=False), "page_loaded: .* a LOAD that is done"),
        (lambda draw: unsafe(draw, awaits_loads=False), "page_owned: .* found loading"),
        (lambda draw: unsafe(draw, rolls_back=False), "will never be readable"),
        (lambda draw: unsafe(draw, load_leases=False), "leases, . holders"),
        (lambda draw: unsafe(draw, save_leases=False), "leases, . holders"),
        (lambda draw: unsafe(draw, leases=False), "leases, . locks"),
        (lambda draw: unsafe(draw, generations=False), "generation_rises"),
    ],
    ids=[
        "verifies_loads",
        "waits_for_loads",
        "awaits_loads",
        "rolls_back",
        "load_leases",
        "save_leases",
        "leases",
        "generations",
    ],
)
def test_some_seed_is_red_without(change, message, tiny, tmp_path):
    found = first_red(tiny, tmp_path, change)
    assert found is not None, f"{NUM_SEEDS} seeds are green"
    assert re.search(message, found), found


def unverified(draw):
    """Return a draw where nobody looks at checksums, neither after the wire nor before a LOAD."""
    draw = without(draw, verifies_loads=False)
    pages = replace(draw.faults.pages, corruption_ratio=0.5)
    safety = ArenaSafety(verification=False)
    return replace(draw, faults=replace(draw.faults, pages=pages, safety=safety))


@pytest.mark.parametrize(
    "change",
    [unverified, lambda draw: without(unsafe(draw, awaits_loads=False), waits_for_loads=False)],
    ids=["verification", "waiting"],
)
def test_where_the_sanitizer_is_off_too_the_tokens_are_wrong(change, tiny, tmp_path):
    found = first_red(tiny, tmp_path, change, MANY_SEEDS, kv_sanitizer=False)
    assert found is not None, f"{MANY_SEEDS} seeds are green"
    assert re.search("token .* expected .* by a margin of", found), found
