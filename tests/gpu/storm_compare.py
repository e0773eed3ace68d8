"""Were greedy answers those of a rank without a cache tier? Compared token by token, under teacher forcing.

In bf16 the order of a sum depends on the batch, so nearly equal logits may change places. A token that is
not the other rank's best is a tie where its logit lies within MAX_MARGINS of the best, however many lie
between; the comparison then goes on after it, from the answer as it was given.
"""

from dataclasses import dataclass, field

from tests.bench.gpu_rank import BenchRank
from tests.gpu.storm_clients import Asked, Forced

MAX_MARGINS = {"float32": 1e-3, "bfloat16": 0.15, "float16": 0.03}
"""In logits; those of the random models have a standard deviation of 1, and the best of 50,000 lies at 4."""
MAX_ROUNDS = 60
NUM_CANDIDATES = 32
"""Of which the reference tells the logits. That far from the best of 50,000 they lie 0.24 / n apart on
average, in bf16's steps of 0.03: within a margin of 0.15 there are two on average, but five or more in 5 % of
all places, and 33 in one of 10^10."""
DEEP_RANK = 4
"""Ties that so many tokens lie before are counted apart."""


@dataclass(frozen=True)
class WrongToken:
    """A token that is no tie."""

    asked: Asked
    place: int
    """Of the answer."""
    wanted: int
    """What the reference says there."""
    margin: float
    """In logits, by which it lies below that."""
    is_least: bool
    """It is none of the candidates: the margin is no less."""

    @property
    def token_id(self) -> int:
        return self.asked.token_ids[self.place]

    @property
    def prompt(self) -> list[int]:
        """All that comes before it."""
        return self.asked.submit.token_ids + self.asked.token_ids[: self.place]

    def __str__(self) -> str:
        least = "at least " * self.is_least
        return (
            f"{self.asked.submit.request_id}: token {self.place} is {self.token_id}, without the tier"
            f" {self.wanted} by a margin of {least}{self.margin:.3f}; {self.asked.num_cached} of its prompt"
            " were cached"
        )


@dataclass
class Verdict:
    """What a comparison found."""

    num_tokens: int = 0
    num_ties: int = 0
    num_deep_ties: int = 0
    largest_tie: float = 0.0
    wrong: list[WrongToken] = field(default_factory=list)


@dataclass
class _Case:
    asked: Asked
    num_compared: int = 0

    @property
    def prompt(self) -> list[int]:
        return self.asked.submit.token_ids + self.asked.token_ids[: self.num_compared]

    @property
    def rest(self) -> list[int]:
        return self.asked.token_ids[self.num_compared :]


def compare(reference: BenchRank, answers: list[Asked], name: str) -> Verdict:
    """Compare answers with what `reference` says; each wrong token is told once, with its request."""
    verdict, max_margin = Verdict(), max_margin_of(reference)
    cases = [_Case(asked) for asked in answers if asked.token_ids]
    for round_ in range(MAX_ROUNDS):
        if not cases:
            return verdict
        forced = Forced(
            f"{name}/forced{round_}",
            [case.prompt for case in cases],
            [len(case.rest) for case in cases],
            NUM_CANDIDATES,
        )
        reference.run(forced)
        found = zip(cases, forced.token_ids, forced.candidates, strict=True)
        cases = [case for case, *said in found if not _is_over(case, *said, max_margin, verdict)]
    raise AssertionError(f"{len(cases)} answers are still not compared after {MAX_ROUNDS} ties each")


def max_margin_of(reference: BenchRank) -> float:
    """Return the margin up to which a token is a tie."""
    dtype = reference.config.dtype
    return MAX_MARGINS[reference.model.dtype if dtype == "auto" else dtype]


def margin_below(candidates: dict[int, float], token_id: int) -> float:
    """Return how far a token lies below the best, or, of one that is no candidate, how far at least."""
    lowest = min(candidates.values())
    return max(candidates.values()) - candidates.get(token_id, lowest)


def _is_over(
    case: _Case,
    token_ids: list[int],
    candidates: list[dict[int, float]],
    max_margin: float,
    verdict: Verdict,
) -> bool:
    """Compare up to the first difference; False where that is a tie and something follows it."""
    answer = case.rest
    assert len(token_ids) == len(answer), "the reference stopped early"
    for place, (token_id, wanted) in enumerate(zip(answer, token_ids, strict=True)):
        verdict.num_tokens += 1
        if token_id == wanted:
            continue
        told = candidates[place]
        margin, is_told = margin_below(told, token_id), token_id in told
        if margin > max_margin:
            verdict.wrong.append(
                WrongToken(case.asked, case.num_compared + place, wanted, margin, is_least=not is_told)
            )
            return True
        assert is_told, f"{len(told)} tokens lie within {margin:.3f} of the best: ask for more of them"
        verdict.num_ties += 1
        verdict.num_deep_ties += list(told).index(token_id) >= DEEP_RANK
        verdict.largest_tie = max(verdict.largest_tie, margin)
        case.num_compared += place + 1
        return not case.rest
    return True
