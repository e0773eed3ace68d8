"""DraftCosts: what steps take that draft and verify so many tokens in each of so many rows.

Measured where such steps have run, else told from those that come next to them. Used by DraftLength.
"""

from bisect import bisect_left
from collections import deque
from statistics import median

_KEPT_STEPS = 9
"""The newest of a kind count, and of these the median: what held one of them up was something else."""
_GUESSED_TOKEN_RATIO = 0.15
"""A token more in each row is taken for so much of a step, before anything was measured."""
_LEAST_TOKEN_RATIO = 0.03
"""And for so much at least: what seems cheaper was measured while the machine had less else to do."""
_SIZES = sorted([1, *(size << shift for shift in range(13) for size in (2, 3))])
"""1, 2, 3, 4, 6, 8, 12, ...: steps of numbers of rows between two of these are of the upper one's kind."""


def kind_of(num_rows: int) -> int:
    """Return the number of rows that stands for all near it."""
    return _SIZES[min(bisect_left(_SIZES, num_rows), len(_SIZES) - 1)]


class _Steps:
    """The newest steps of one kind and draft length."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=_KEPT_STEPS)
        self.median_s = 0.0
        self.measured_at = 0
        """Number of the last one."""

    def measured(self, seconds: float, step: int) -> None:
        self._seconds.append(seconds)
        self.median_s = median(self._seconds)
        self.measured_at = step


class DraftCosts:
    """Seconds by kind of step (`kind_of` its rows) and draft length; only their ratios in a kind count."""

    def __init__(self) -> None:
        self._steps: dict[int, dict[int, _Steps]] = {}

    def measured(self, kind: int, length: int, seconds: float, step: int) -> None:
        """Take in a step in which every row verified and drafted `length` tokens."""
        self._steps.setdefault(kind, {}).setdefault(length, _Steps()).measured(seconds, step)

    def measured_at(self, kind: int, length: int) -> int:
        """Return the number of the last such step; -1: there was none."""
        steps = self._steps.get(kind, {}).get(length)
        return -1 if steps is None else steps.measured_at

    def seconds(self, kind: int, length: int) -> float:
        """Return what such a step takes: measured, on the line through the next lengths, or as much longer
        than the one that is known as in the nearest kind of step; more than one that drafts less."""
        found_s = self._seconds(kind, length)
        if length == 0:
            return found_s
        return max(found_s, (1 + _LEAST_TOKEN_RATIO * length) * self._seconds(kind, 0))

    def _seconds(self, kind: int, length: int) -> float:
        steps = self._steps.get(kind, {})
        if length in steps:
            return steps[length].median_s
        if len(steps) > 1:
            low, high = sorted(sorted(steps, key=lambda known: abs(known - length))[:2])
            slope_s = max(0.0, (steps[high].median_s - steps[low].median_s) / (high - low))
            return max(steps[low].median_s + slope_s * (length - low), 0.5 * steps[low].median_s)
        ratio = self._ratio(kind, length)
        for known, single in steps.items():
            ratio *= single.median_s / self._ratio(kind, known)
        return ratio

    def _ratio(self, kind: int, length: int) -> float:
        """Return what a length costs in the nearest kind of step of which two lengths were measured."""
        others = [other for other, steps in self._steps.items() if other != kind and len(steps) > 1]
        if not others:
            return 1.0 + _GUESSED_TOKEN_RATIO * length
        return self._seconds(min(others, key=lambda other: max(other / kind, kind / other)), length)
