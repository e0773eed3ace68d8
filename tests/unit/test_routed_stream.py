"""What a request's first token says about the prefill rate, and when it says nothing."""

import pytest

from cluster.router.costs import FIRST_PREFILL_TOKEN_S, PrefillRate
from cluster.router.routed_stream import RoutedStream
from workers.protocol import RequestId, RequestOutput

NUM_TOKENS = 200
TOOK_S = 4.0


class Stream:
    """The answer was read already; then the first token comes."""

    def __init__(self, num_cached_tokens):
        self.num_cached_tokens = num_cached_tokens

    async def __anext__(self):
        return RequestOutput(RequestId("r"), [7], [], None, self.num_cached_tokens)


async def token_s(num_held_tokens, num_cached_tokens):
    rate, times = PrefillRate(), iter([0.0, TOOK_S])
    answer = RequestOutput(RequestId("r"), [], [])
    stream = RoutedStream(
        Stream(num_cached_tokens), answer, rate, NUM_TOKENS, num_held_tokens, lambda: next(times, TOOK_S)
    )
    assert [(await anext(stream)).token_ids for _ in range(2)] == [[], [7]]
    return rate.token_s


async def test_a_prefill_of_what_the_device_has_not_is_measured():
    assert await token_s(0, 0) == pytest.approx(TOOK_S / 200)
    assert await token_s(160, 160) == pytest.approx(TOOK_S / 40)
    assert await token_s(160, 0) == pytest.approx(TOOK_S / 200), "the index was wrong, the worker is right"


@pytest.mark.parametrize(("num_held_tokens", "num_cached_tokens"), [(None, 160), (None, 0), (16, 160)])
async def test_time_that_may_have_gone_into_copies_says_nothing(num_held_tokens, num_cached_tokens):
    assert await token_s(num_held_tokens, num_cached_tokens) == FIRST_PREFILL_TOKEN_S
