"""StepBudget: how many tokens a step may have, so that running answers keep their inter-token target.

The Scheduler asks before it plans a step and tells how long each took: what a rank's own clock says never
enters (I1).
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from workers.plan import BatchPlan

MIN_PREFILL_TOKENS = 32
"""A step has room for so many tokens of prompts at least, whatever it takes: else they might never end."""
FIRST_PREFILL_TOKENS = 128
"""Until a step with prompts was measured."""
MAX_GROWTH = 2
"""A step has at most so many times the tokens of those measured: the line says little about longer ones."""
_KEPT = 0.95
"""Share of its weight that a step keeps when the next is measured."""
_LEAST_SPREAD_RATIO = 0.05
"""Steps whose lengths differ by less than this part say nothing of the line's slope."""
_LEAST_SLOPE_RATIO = 0.1
"""Of the seconds a token takes on average; less is chance."""
_MAX_OUTLIER_RATIO = 2.0
"""A step counts as no longer than so many times what was expected: what held it up was something else."""


class StepLine:
    """seconds = base + slope * tokens, by weighted least squares in which the newest steps count most.

    As long as steps are all of about one length it goes through zero, which is careful about longer ones.
    """

    def __init__(self) -> None:
        self._weight = 0.0
        self._tokens = 0.0
        self._seconds = 0.0
        self._tokens_tokens = 0.0
        self._tokens_seconds = 0.0
        self._longest = 0.0

    @property
    def is_known(self) -> bool:
        """Tell whether any step was measured."""
        return self._weight > 0

    def measured(self, num_tokens: int, seconds: float) -> None:
        """Take a step in."""
        if self.is_known:
            base_s, slope_s = self._line()
            seconds = min(seconds, _MAX_OUTLIER_RATIO * (base_s + slope_s * num_tokens))
        self._weight = _KEPT * self._weight + 1
        self._tokens = _KEPT * self._tokens + num_tokens
        self._seconds = _KEPT * self._seconds + seconds
        self._tokens_tokens = _KEPT * self._tokens_tokens + num_tokens * num_tokens
        self._tokens_seconds = _KEPT * self._tokens_seconds + num_tokens * seconds
        self._longest = max(_KEPT * self._longest, num_tokens)

    def num_tokens(self, seconds: float) -> int:
        """Return how many tokens a step may have to take so long, as far as is known."""
        base_s, slope_s = self._line()
        return int(max(0.0, min((seconds - base_s) / slope_s, MAX_GROWTH * self._longest)))

    def _line(self) -> tuple[float, float]:
        """Return base and slope, the latter > 0."""
        mean_tokens, mean_s = self._tokens / self._weight, self._seconds / self._weight
        through_zero_s = mean_s / mean_tokens
        variance = max(0.0, self._tokens_tokens / self._weight - mean_tokens * mean_tokens)
        covariance = self._tokens_seconds / self._weight - mean_tokens * mean_s
        least = (_LEAST_SPREAD_RATIO * mean_tokens) ** 2
        slope_s = (covariance + least * through_zero_s) / (variance + least)
        slope_s = max(slope_s, _LEAST_SLOPE_RATIO * through_zero_s)
        return max(0.0, mean_s - slope_s * mean_tokens), slope_s


class StepBudget:
    """At most `max_tokens`; `target_s` is what a step may take while answers run, None: any time.

    `sizes` are the tokens of steps that graphs were prepared for: one in between takes as long as the next.
    """

    def __init__(self, max_tokens: int, target_s: float | None, sizes: Sequence[int] = ()) -> None:
        self._max_tokens = max_tokens
        self._target_s = target_s
        self._sizes = sorted(sizes)
        self._mixed = StepLine()

    def num_tokens(self, num_decoding: int) -> int:
        """Return the tokens of a step in which so many requests decode."""
        if self._target_s is None or num_decoding == 0:
            return self._max_tokens
        if self._mixed.is_known:
            num_tokens = self._mixed.num_tokens(self._target_s)
        else:
            num_tokens = num_decoding + FIRST_PREFILL_TOKENS
        least = self._padded(num_decoding + MIN_PREFILL_TOKENS)
        return min(max(self._whole(num_tokens), least), self._max_tokens)

    def stepped(self, plan: BatchPlan, seconds: float) -> None:
        """Take in how long a step took. Those that only decode, or only prefill, hold up no answer."""
        if self._target_s is not None and plan.mode == "mixed" and seconds > 0:
            self._mixed.measured(self._padded(plan.num_tokens), seconds)

    def _padded(self, num_tokens: int) -> int:
        """Return the tokens that a step really computes."""
        place = bisect_left(self._sizes, num_tokens)
        return self._sizes[place] if place < len(self._sizes) else num_tokens

    def _whole(self, num_tokens: int) -> int:
        """Return the most tokens up to so many that leave no pads."""
        place = bisect_right(self._sizes, num_tokens)
        return self._sizes[place - 1] if 0 < place < len(self._sizes) else num_tokens
