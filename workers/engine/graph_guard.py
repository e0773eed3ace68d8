"""GraphGuard: the one place that decides how a step runs, and the count of why. No torch."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from workers.plan import Mode

Outcome = Literal["replay", "replay_after_load", "eager"]
"""replay_after_load: the replay had to come after a LOAD in flight of a page that it reads. Loading is no
reason to run eager (I5)."""
EagerReason = Literal["no_bucket", "mixed", "disabled", "capture_failed", "unsupported"]
"""no_bucket: more rows than the largest bucket; mixed: extend and decode rows in one step; disabled: `graphs`
is off; capture_failed: the bucket could not be prepared; unsupported: no graph exists for extend steps, or
none on this device."""


@dataclass(frozen=True)
class Decision:
    """Either the bucket to replay or the reason to run eager."""

    bucket: int | None
    reason: EagerReason | None


class GraphGuard:
    """Decides by mode and number of rows alone: the plan's contents, equal on every rank (I1)."""

    def __init__(self, batch_sizes: Sequence[int], enabled: bool, supported: bool) -> None:
        self._batch_sizes = sorted(batch_sizes)
        self._enabled = enabled
        self._supported = supported
        self._failed: set[int] = set()
        self.steps: Counter[tuple[Mode, Outcome]] = Counter()
        self.eager_steps: Counter[tuple[Mode, EagerReason]] = Counter()

    def mark_failed(self, bucket: int) -> None:
        """Run `bucket`'s steps eager from now on: its capture failed."""
        self._failed.add(bucket)

    def decide(self, mode: Mode, num_rows: int, after_load: bool = False) -> Decision:
        """Choose for one step, and count it; whether it comes `after_load` changes its count alone."""
        bucket, reason = self._choose(mode, num_rows)
        replay: Outcome = "replay_after_load" if after_load else "replay"
        self.steps[mode, "eager" if reason else replay] += 1
        if reason:
            self.eager_steps[mode, reason] += 1
        return Decision(bucket, reason)

    def _choose(self, mode: Mode, num_rows: int) -> tuple[int | None, EagerReason | None]:
        if not self._enabled:
            return None, "disabled"
        if not self._supported or mode == "extend":
            return None, "unsupported"
        if mode == "mixed":
            return None, "mixed"
        place = bisect_left(self._batch_sizes, num_rows)
        if place == len(self._batch_sizes):
            return None, "no_bucket"
        bucket = self._batch_sizes[place]
        return (None, "capture_failed") if bucket in self._failed else (bucket, None)


def default_batch_sizes(max_rows: int) -> tuple[int, ...]:
    """Return buckets 1 .. 8, then a quarter apart: at most a fifth of a step's rows are pads."""
    sizes = [1]
    while sizes[-1] < max_rows:
        sizes.append(min(sizes[-1] + max(1, sizes[-1] // 4), max_rows))
    return tuple(sizes)
