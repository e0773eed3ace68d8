"""When the storm takes a token for wrong, when for a tie, and that it looks at what follows a tie."""

import dataclasses

import pytest

from tests.gpu.storm_clients import Asked, StormClients
from tests.gpu.storm_compare import MAX_MARGINS, NUM_CANDIDATES, compare
from workers.protocol import (
    AbortRequest,
    RequestId,
    RequestOutput,
    SamplingParams,
    SubmitRequest,
    TokenLogprobs,
)

GREEDY = SamplingParams(temperature=0.0)
TIE, NO_TIE = MAX_MARGINS["float32"] / 2, MAX_MARGINS["float32"] * 2


@dataclasses.dataclass
class Config:
    dtype: str = "float32"


class Reference:
    """Says after each token the next number. So many as `crowd` lie `margin` below it, from 50 beyond it on;
    the others far below."""

    config = Config()

    def __init__(self, margin: float, crowd: int = 1) -> None:
        self.margin = margin
        self.crowd = crowd
        self.num_runs = 0

    def run(self, clients) -> None:
        self.num_runs += 1
        for submit in clients.ask(0.0):
            last, length = submit.token_ids[-1], submit.sampling.max_tokens
            num_others = submit.sampling.num_logprobs - 1
            logprobs = [-1.0 - (self.margin if other < self.crowd else 9.0) for other in range(num_others)]
            for number in range(1, length + 1):
                ids = [last + number, *(last + number + 50 + other for other in range(num_others))]
                told = TokenLogprobs(-1.0, ids, [-1.0, *logprobs])
                end = "length" if number == length else None
                clients.take([RequestOutput(submit.request_id, [last + number], [told], end)], 0.0)
        assert clients.are_done


def answer(prompt: list[int], token_ids: list[int]) -> Asked:
    return Asked(SubmitRequest(RequestId("a"), prompt, GREEDY), None, token_ids)


def test_equal_answers_are_right() -> None:
    verdict = compare(Reference(NO_TIE), [answer([1], [2, 3, 4]), answer([7, 9], [10, 11])], "x")
    assert (verdict.num_tokens, verdict.num_ties, verdict.wrong) == (5, 0, [])


@pytest.mark.parametrize(
    ("margin", "token_id", "found"),
    [(NO_TIE, 53, "0.002"), (TIE, 54, "9.000"), (TIE, 990, "at least 9.000")],
    ids=["just too far below", "far below", "no candidate at all"],
)
def test_a_token_that_is_no_tie_is_wrong(margin: float, token_id: int, found: str) -> None:
    verdict = compare(Reference(margin), [answer([1], [2, token_id, 4])], "x")
    assert verdict.num_ties == 0
    (wrong,) = verdict.wrong
    assert f"token 1 is {token_id}, without the tier 3 by a margin of {found}" in str(wrong)
    assert (wrong.token_id, wrong.prompt) == (token_id, [1, 2])


def test_a_tie_is_one_however_many_tokens_lie_before_it() -> None:
    """In bf16 six tokens have the best logit, or all but, every few thousand places."""
    for crowd, num_deep in ((3, 0), (20, 1)):
        verdict = compare(Reference(TIE, crowd), [answer([1], [2, 52 + crowd, 53 + crowd])], "x")
        assert (verdict.num_ties, verdict.num_deep_ties, verdict.wrong) == (1, num_deep, [])


def test_where_more_tokens_lie_within_the_margin_than_are_told_nothing_is_said() -> None:
    with pytest.raises(AssertionError, match="ask for more"):
        compare(Reference(TIE, NUM_CANDIDATES), [answer([1], [2, 990])], "x")


def test_after_a_tie_the_rest_is_compared_as_it_was_given() -> None:
    reference = Reference(TIE)
    verdict = compare(reference, [answer([1], [2, 53, 54, 55])], "x")  # 53 for 3, and on from there
    assert (verdict.num_tokens, verdict.num_ties, verdict.wrong) == (4, 1, [])
    assert verdict.largest_tie == pytest.approx(TIE)
    assert reference.num_runs == 2
    verdict = compare(Reference(TIE), [answer([1], [2, 53, 54, 9])], "x")
    assert len(verdict.wrong) == 1, "what follows a tie is not let off"


def test_an_answer_that_ends_with_a_tie_is_over() -> None:
    reference = Reference(TIE)
    assert compare(reference, [answer([1], [2, 53])], "x").num_ties == 1
    assert reference.num_runs == 1


def test_the_clients_are_a_function_of_their_name_and_keep_so_many_in_flight() -> None:
    first, again, other = (StormClients(name, 40, 16, 500, 60) for name in ("1", "1", "2"))
    asked = first.ask(0.0)
    assert asked == again.ask(0.0) != other.ask(0.0)
    assert len(asked) == 16 and not first.are_done
    while not first.are_done:
        ended = [
            RequestOutput(
                message.request_id, [5], [], "abort" if isinstance(message, AbortRequest) else "length"
            )
            for message in asked
        ]
        first.take(ended, 0.0)
        asked = first.ask(0.0)
    assert len(first.asked) == 40
    assert {"greedy", "sampled"} == {"greedy" if one.is_greedy else "sampled" for one in first.asked.values()}
    first.take([RequestOutput(RequestId("1/3"), [5], [])], 0.0)
    assert first.num_after_end == 1
