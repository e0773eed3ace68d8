"""Without a mechanism of drafts a group goes wrong, and the named check says so."""

import msgspec
import pytest

from tests.property.fake_group import FakeGroup, plain_rank
from tests.property.sanitized_rank import SanitizedRank
from workers.kvcache.page_pool import Safety
from workers.kvcache.sanitizer import SanitizerError
from workers.protocol import SamplingParams
from workers.scheduler.scheduler import Scheduler


def play(rank=plain_rank, **options):
    group = FakeGroup(
        num_pages=80,
        page_size=2,
        draft_tokens=3,
        max_tokens_per_step=40,
        make_rank=rank,
        runs_checks=False,
        **options,
    )
    for number in range(4):
        group.submit([number + 1] * 5, SamplingParams(max_tokens=20, ignore_eos=True))
    group.run()
    group.check()
    return group


@pytest.mark.parametrize("rank", [plain_rank, SanitizedRank])
def test_with_all_mechanisms_drafts_are_right_and_wrong_and_answers_right(rank):
    group = play(rank)
    lengths = group.scheduler.stats.accept_lengths
    assert {length for _, length in lengths} == {1, 2, 3, 4}
    num_tokens = sum(length * count for (_, length), count in lengths.items())
    # each request's first token comes with its prompt; drafts may be right beyond its end
    assert 4 * 19 <= num_tokens < 4 * (19 + 4)


def test_a_window_that_is_not_reserved():
    with pytest.raises(AssertionError, match="drafts beyond its pages"):
        play(safety=Safety(reserves_ahead=False))


def test_wrong_drafts_that_count_as_computed(monkeypatch):
    compute = Scheduler._compute

    def counts_all(self, rows, plan, kept):
        compute(self, rows, msgspec.structs.replace(plan, num_drafts=[]), kept)

    monkeypatch.setattr(Scheduler, "_compute", counts_all)
    for rank in (plain_rank, SanitizedRank):
        with pytest.raises((AssertionError, SanitizerError)):
            play(rank)


def test_wrong_drafts_that_are_believed(monkeypatch):
    class Credulous(SanitizedRank):
        def verify(self, slot, context_len, num_drafts):
            return [*self.drafts.get(slot, [])[:num_drafts], self.sample(slot, context_len + num_drafts)]

    with pytest.raises(AssertionError, match="generates another's text"):
        play(Credulous)
