"""DraftCosts: what steps take that draft and verify so many tokens in each of so many rows.

Measured where such steps have run, else told from those that come next to them. Used by DraftLength.

A machine is slow at one time and fast at another, and lengths are measured at different times. So those that
are tried for a few steps are held against what runs most of the time, as that ran just before.
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

    @property
    def num_measured(self) -> int:
        return len(self._seconds)

    def measured(self, seconds: float, step: int) -> None:
        self._seconds.append(seconds)
        self.median_s = median(self._seconds)
        self.measured_at = step


class _Kind:
    """The lengths of one kind of step. Seconds are those of a machine as fast as it was at first."""

    def __init__(self, length: int) -> None:
        self.steps: dict[int, _Steps] = {}
        self._usual = length
        """The length of most steps: it tells how slow the machine is, and keeps its seconds."""
        self._num_others = 0
        """Steps of another length in a row."""
        self._slowness: deque[float] = deque(maxlen=_KEPT_STEPS)
        """By the newest steps of the usual length."""

    def measured(self, length: int, seconds: float, step: int) -> None:
        steps = self.steps.setdefault(length, _Steps())
        slowness = median(self._slowness) if self._slowness else 1.0
        if length != self._usual:
            steps.measured(seconds / slowness, step)
            self._num_others += 1
            if self._num_others == _KEPT_STEPS:
                self._usual, self._num_others = length, 0
                self._slowness.clear()
                self._slowness.append(slowness)
            return
        self._num_others = 0
        if self._slowness or steps.num_measured == _KEPT_STEPS:
            self._slowness.append(seconds / steps.median_s)
            steps.measured_at = step
        else:
            steps.measured(seconds, step)


class DraftCosts:
    """Seconds by kind of step (`kind_of` its rows) and draft length; only their ratios in a kind count."""

    def __init__(self) -> None:
        self._kinds: dict[int, _Kind] = {}

    def measured(self, kind: int, length: int, seconds: float, step: int) -> None:
        """Take in a step in which every row verified and drafted `length` tokens."""
        self._kinds.setdefault(kind, _Kind(length)).measured(length, seconds, step)

    def measured_at(self, kind: int, length: int) -> int:
        """Return the number of the last such step; -1: there was none."""
        steps = self._steps(kind).get(length)
        return -1 if steps is None else steps.measured_at

    def seconds(self, kind: int, length: int) -> float:
        """Return what such a step takes: measured, on the line through the next lengths, or as much longer
        than the one that is known as in the nearest kind of step; more than one that drafts less."""
        found_s = self._seconds(kind, length)
        if length == 0:
            return found_s
        return max(found_s, (1 + _LEAST_TOKEN_RATIO * length) * self._seconds(kind, 0))

    def _steps(self, kind: int) -> dict[int, _Steps]:
        found = self._kinds.get(kind)
        return {} if found is None else found.steps

    def _seconds(self, kind: int, length: int) -> float:
        steps = self._steps(kind)
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
        others = [other for other in self._kinds if other != kind and len(self._steps(other)) > 1]
        if not others:
            return 1.0 + _GUESSED_TOKEN_RATIO * length
        return self._seconds(min(others, key=lambda other: max(other / kind, kind / other)), length)
