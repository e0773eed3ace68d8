"""Each mechanism between device and arena, switched off alone, is caught by a check that has its name."""

from dataclasses import replace

import pytest

from tests.property.fake_group import FakeGroup, plain_rank
from tests.property.fake_mover import Faults
from tests.property.random_tier import live
from tests.property.sanitized_rank import SanitizedRank
from tests.property.stored_group import KEYS, TEXT, advance, corrupt, stored_group
from workers.kvcache.page_pool import Safety
from workers.kvcache.sanitizer import SanitizerError
from workers.protocol import SamplingParams

ALL_ON = Safety()
SEEDS = range(1000, 1040)


def live_until_it_shows(safety: Safety, runs_checks: bool) -> None:
    for seed in SEEDS:
        live(seed, safety=safety, runs_checks=runs_checks)


def test_with_all_mechanisms_on_nothing_fires() -> None:
    live_until_it_shows(ALL_ON, runs_checks=True)


@pytest.mark.parametrize(
    ("switch", "own_check", "ranks_check"),
    [
        # What check() finds at once, and what is found when it is not asked; None: it does not look for this.
        ("save_leases", r"page \d+ has \d leases, \d holders", None),
        ("load_leases", r"page \d+ has \d leases, \d holders", None),
        ("awaits_loads", None, r"load: slot \d reads page \d+, whose LOAD is PENDING"),
        (
            "rolls_back",
            r"(page \d+ of the tree will never be readable|generates another's text|requests left)",
            r"(holds another's text|requests left)",
        ),
        ("commits_in_order", None, r"order: slot \d+ comes before its parent, whose SAVE is under way"),
        ("busy_stays", None, r"evict: \d+ pages left the device in their SAVE"),
        ("counts_losses", None, r"loss: \d+ pages left the device unsaved, 0 are counted"),
    ],
)
def test_a_mechanism_switched_off_is_noticed(switch, own_check, ranks_check) -> None:
    mutant = replace(ALL_ON, **{switch: False})
    if ranks_check is not None:
        with pytest.raises(AssertionError, match=ranks_check):
            live_until_it_shows(mutant, runs_checks=False)
    with pytest.raises(AssertionError, match=own_check or ranks_check):
        live_until_it_shows(mutant, runs_checks=True)


def fail_a_load_above_a_save(safety: Safety, make_rank) -> FakeGroup:
    """A page is saved whose parent turns out not to be loaded: both leave the tree, the SAVE is under way."""
    group = stored_group(3, safety, make_rank)
    view, group.tier.client.view = group.tier.client.view, {}
    group.submit(TEXT, SamplingParams(max_tokens=1))
    group.step()
    group.tier.client.view = view
    corrupt(group, KEYS[2])
    group.submit(TEXT, SamplingParams(max_tokens=1), priority=-1)
    group.step()  # the second loads the third page, the first computes it and goes over to the other's
    advance(group, 0)
    group.step()
    assert group.tier.stats.failed_loads == {"corrupt": 1}
    group.end()
    return group


def fail_a_load_on_one_rank(safety: Safety, make_rank) -> FakeGroup:
    """A page is not loaded on rank 0; rank 1 has not begun yet."""
    group = stored_group(2, safety, make_rank, num_ranks=2)
    corrupt(group, KEYS[0])
    group.submit(TEXT, SamplingParams(max_tokens=1))
    group.step()
    advance(group, 0)
    group.step()
    assert group.tier.stats.failed_loads == {"corrupt": 1}
    group.end()
    return group


def read_a_page_that_is_torn(safety: Safety) -> FakeGroup:
    """A step reads a page that its device copies; that it was torn is known only after the step."""
    group = stored_group(2, safety, plain_rank)
    mover = group.tier.movers[0]
    mover._faults = Faults(torn_ratio=1.0, late_ratio=1.0)
    request_id = group.submit(TEXT, SamplingParams(max_tokens=3))
    for _ in range(6):
        group.step()
        if mover._verdicts:
            break
        advance(group, 0)
    group.check_stream(request_id)
    for _ in range(3):
        group.step()
        group.check_stream(request_id)
    mover._faults = Faults()
    group.end()
    group.check_stream(request_id)
    return group


def test_what_a_row_made_counts_once_its_loads_are_proven() -> None:
    group = read_a_page_that_is_torn(ALL_ON)
    assert group.scheduler.stats.num_unproven_rows > 0
    assert group.tier.stats.failed_loads["torn"] > 0
    mutant = replace(ALL_ON, awaits_verdicts=False)
    with pytest.raises(AssertionError, match=r"generates another's text"):
        read_a_page_that_is_torn(mutant)


@pytest.mark.parametrize(
    ("scene", "switch", "kind"),
    [
        (fail_a_load_above_a_save, "save_leases", "save"),
        (fail_a_load_on_one_rank, "load_leases", "load"),
    ],
)
def test_a_page_stays_until_its_move_is_over_on_every_rank(scene, switch, kind) -> None:
    for make_rank in (plain_rank, SanitizedRank):
        scene(ALL_ON, make_rank)
    mutant = replace(ALL_ON, **{switch: False})
    with pytest.raises(AssertionError, match=rf"page \d+ is freed while Move\(.* kind='{kind}'"):
        scene(mutant, plain_rank)
    with pytest.raises(
        SanitizerError, match=rf"free_{kind}: .* expected move \d+ over, found (PENDING|ENQUEUED)"
    ):
        scene(mutant, SanitizedRank)
