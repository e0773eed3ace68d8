"""Were greedy answers those of a rank without a cache tier? Compared token by token, under teacher forcing.

In bf16 the order of a sum depends on the batch, so two nearly equal logits may change places. A token that is
not the other rank's best is a tie where its logit lies within MAX_MARGINS of the best; the comparison then
goes on after it, from the answer as it was given.
"""

from dataclasses import dataclass, field

from tests.bench.gpu_rank import BenchRank
from tests.gpu.storm_clients import Asked, Forced

MAX_MARGINS = {"float32": 1e-3, "bfloat16": 0.15, "float16": 0.03}
"""In logits; those of the random models have a standard deviation of 1, and the best of 50,000 lies at 4."""
MAX_ROUNDS = 60


@dataclass
class Verdict:
    """What a comparison found."""

    num_tokens: int = 0
    num_ties: int = 0
    largest_tie: float = 0.0
    wrong: list[str] = field(default_factory=list)


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
    verdict = Verdict()
    max_margin = MAX_MARGINS[
        reference.model.dtype if reference.config.dtype == "auto" else reference.config.dtype
    ]
    cases = [_Case(asked) for asked in answers if asked.token_ids]
    for round_ in range(MAX_ROUNDS):
        if not cases:
            return verdict
        forced = Forced(
            f"{name}/forced{round_}", [case.prompt for case in cases], [len(case.rest) for case in cases]
        )
        reference.run(forced)
        found = zip(cases, forced.token_ids, forced.candidates, strict=True)
        cases = [case for case, *said in found if not _is_over(case, *said, max_margin, verdict)]
    raise AssertionError(f"{len(cases)} answers are still not compared after {MAX_ROUNDS} ties each")


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
        best = candidates[place][wanted]
        margin = best - candidates[place].get(token_id, float("-inf"))
        if margin > max_margin:
            verdict.wrong.append(
                f"{case.asked.submit.request_id}: token {case.num_compared + place} is {token_id}, without"
                f" the tier {wanted} by a margin of {margin:.3f}; {case.asked.num_cached} of its prompt were"
                " cached"
            )
            return True
        verdict.num_ties += 1
        verdict.largest_tie = max(verdict.largest_tie, margin)
        case.num_compared += place + 1
        return not case.rest
    return True
