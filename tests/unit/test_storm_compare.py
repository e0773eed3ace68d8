"""When the storm takes a token for wrong, when for a tie, and that it looks at what follows a tie."""

import dataclasses

import pytest

from tests.gpu.storm_clients import Asked, StormClients
from tests.gpu.storm_compare import MAX_MARGINS, compare
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
    """Says after each token the next number; `margin` below it is the one beside it."""

    config = Config()

    def __init__(self, margin: float) -> None:
        self.margin = margin
        self.num_runs = 0

    def run(self, clients) -> None:
        self.num_runs += 1
        for submit in clients.ask(0.0):
            last, length = submit.token_ids[-1], submit.sampling.max_tokens
            for number in range(1, length + 1):
                told = TokenLogprobs(-1.0, [last + number, last + number + 50], [-1.0, -1.0 - self.margin])
                end = "length" if number == length else None
                clients.take([RequestOutput(submit.request_id, [last + number], [told], end)], 0.0)
        assert clients.are_done


def answer(prompt: list[int], token_ids: list[int]) -> Asked:
    return Asked(SubmitRequest(RequestId("a"), prompt, GREEDY), None, token_ids)


def test_equal_answers_are_right() -> None:
    verdict = compare(Reference(NO_TIE), [answer([1], [2, 3, 4]), answer([7, 9], [10, 11])], "x")
    assert (verdict.num_tokens, verdict.num_ties, verdict.wrong) == (5, 0, [])


@pytest.mark.parametrize(
    ("margin", "token_id"), [(NO_TIE, 53), (TIE, 54)], ids=["far below", "no candidate at all"]
)
def test_a_token_that_is_no_tie_is_wrong(margin: float, token_id: int) -> None:
    verdict = compare(Reference(margin), [answer([1], [2, token_id, 4])], "x")
    assert verdict.num_ties == 0
    (told,) = verdict.wrong
    assert f"token 1 is {token_id}, without the tier 3" in told


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
