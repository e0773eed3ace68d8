"""Each mechanism of the KV bookkeeping, switched off alone, makes a named check fire; on, none does."""

from dataclasses import replace

import pytest

from tests.property.fake_group import FakeGroup
from tests.property.fake_ranks import FakeRank
from workers.kvcache.page_pool import Safety
from workers.plan import BatchPlan, FreePages, RelocationVersionError
from workers.protocol import SamplingParams

ALL_ON = Safety()


def drive(*, safety: Safety, runs_checks: bool, num_ranks: int = 1, lags: tuple[int, ...] = ()) -> FakeGroup:
    """Requests that share a prefix in a pool too small for all, on ranks that lag: all is needed."""
    group = FakeGroup(
        num_pages=9,
        page_size=2,
        max_context_len=16,
        num_ranks=num_ranks,
        safety=safety,
        runs_checks=runs_checks,
    )
    for number in range(6):
        group.submit([1, 1, 1, number, 1], SamplingParams(max_tokens=14 - 2 * number, ignore_eos=True))
        group.step(lags=lags)
    for _ in range(40):
        group.step(lags=lags)
    group.run()
    group.check()
    group.settle()
    return group


@pytest.mark.parametrize("lags", [(0, 0), (0, 1), (2, 1)])
def test_with_everything_on_no_check_fires(lags):
    group = drive(safety=ALL_ON, runs_checks=True, num_ranks=2, lags=lags)
    assert group.scheduler.stats.num_preemptions > 0
    assert group.cache.stats().num_evictions > 0
    assert sum(group.num_cached.values()) > 0


@pytest.mark.parametrize(
    ("switch", "own_check", "ranks_check"),
    [
        # What check() finds at once, and what a rank finds when nobody checks.
        (
            "leases",
            r"page \d+ (of the tree )?has \d leases, \d (holders|locks)",
            r"page \d+ is (FREE|QUIESCING), not OWNED",
        ),
        ("generations", None, r"generation: page \d+ is not told from before"),
        ("reservations", r"writes beyond its pages", r"reserve: slot \d writes beyond its pages"),
        ("fences", None, r"fence: page \d+ is freed while step \[.*\] may touch it"),
    ],
)
def test_a_mechanism_switched_off_is_noticed(switch, own_check, ranks_check):
    mutant = replace(ALL_ON, **{switch: False})
    with pytest.raises(AssertionError, match=ranks_check):
        drive(safety=mutant, runs_checks=False, num_ranks=2, lags=(0, 2))
    with pytest.raises(AssertionError, match=own_check or ranks_check):
        drive(safety=mutant, runs_checks=True, num_ranks=2, lags=(0, 2))


class ForgetfulRank(FakeRank):
    """Skips one FreePages op and runs on: the rank's own version check is off."""

    has_forgotten = False

    def free(self, op: FreePages) -> None:
        if self.has_forgotten:
            super().free(op)
        self.has_forgotten = True

    def check_version(self, plan: BatchPlan) -> None:
        pass


def forgetful_group(safety: Safety) -> FakeGroup:
    """A group that has just run a request; its pages are given back, and forgotten, in the next step."""
    group = FakeGroup(num_pages=6, safety=safety, runs_checks=False, prefix_caching=False)
    (rank,) = group.ranks
    group.ranks = [ForgetfulRank(6, rank.page_size, rank.vocab_size, rank.version.incarnation)]
    group.submit([1] * 6, SamplingParams(max_tokens=4, ignore_eos=True))
    group.run()
    return group


def test_a_rank_that_lost_a_relocation_is_caught_in_that_step():
    group = forgetful_group(ALL_ON)
    with pytest.raises(RelocationVersionError, match=r"found relocation version 11\.2, allowed is 11\.3"):
        group.step()


def test_without_the_version_check_it_is_noticed_only_when_the_page_is_handed_out_again():
    group = forgetful_group(replace(ALL_ON, versions=False))
    group.step()
    group.submit([2] * 6, SamplingParams(max_tokens=4, ignore_eos=True))
    with pytest.raises(AssertionError, match=r"own: page \d+ has an owner"):
        group.run()
