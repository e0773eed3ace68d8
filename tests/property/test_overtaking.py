"""Whoever a more urgent request overtakes while a step is planned has its one row in it, or no tokens."""

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.property.fake_group import FakeGroup
from tests.property.sanitized_rank import SanitizedRank
from workers.protocol import SamplingParams

_SAMPLING = SamplingParams(max_tokens=2, ignore_eos=True)


@settings(max_examples=100, deadline=None)
@given(
    common_len=st.integers(4, 16),
    own_len=st.integers(4, 12),
    urgent_len=st.integers(2, 12),
    num_free=st.integers(0, 12),
    num_unspent=st.integers(0, 3),
)
def test_every_planned_request_has_its_row(common_len, own_len, urgent_len, num_free, num_unspent):
    group = FakeGroup(
        num_pages=2 * common_len + own_len + num_free,
        page_size=1,
        max_tokens_per_step=common_len + num_unspent,
        make_rank=SanitizedRank,
    )
    group.submit([1] * common_len, _SAMPLING)
    group.submit([1] * common_len + [2] * own_len, _SAMPLING)  # still computing when overtaken
    group.step()
    group.submit([9] * urgent_len, _SAMPLING, priority=-1)
    group.run()  # FakeGroup.step holds the plan's rows against the budget that was spent
    group.settle()
