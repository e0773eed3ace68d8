"""Rounds: what drafting along an answer comes to, round after round as a serving engine would go."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from workers.draft_training.batches import Batch


@dataclass(frozen=True)
class Evaluated:
    """What simulated drafting from greedy answers came to. `accept_length`: tokens that a verify step brings,
    the target's own included; `rates`: of the drafts at each place whose predecessors are right, the share
    that is right."""

    accept_length: float
    rates: list[float]


class Tally:
    """Counts rounds of at most `num_drafts` drafts each."""

    def __init__(self, num_drafts: int) -> None:
        self.num_rounds = 0
        self._num_kept = 0
        self._tried = np.zeros(num_drafts, np.int64)
        self._right = np.zeros(num_drafts, np.int64)

    def add(self, right: Tensor, batch: Batch) -> None:
        """Count the rounds along each answer of a batch; `right` [drafts, asks] bool is Simulated's."""
        guessed, behind = right.cpu().numpy(), batch.behind.cpu().numpy()
        firsts = np.flatnonzero(behind == 0)
        for first, end in zip(firsts, [*firsts[1:], len(behind)], strict=True):
            for num_tried, num_right in rounds(guessed[:, first:end]):
                self.num_rounds += 1
                self._num_kept += num_right + 1
                self._tried[: min(num_tried, num_right + 1)] += 1
                self._right[:num_right] += 1

    def evaluated(self) -> Evaluated:
        """Return what they came to."""
        rates = self._right / np.maximum(1, self._tried)
        return Evaluated(self._num_kept / max(1, self.num_rounds), rates.tolist())


def rounds(right: np.ndarray[Any, np.dtype[np.bool_]]) -> list[tuple[int, int]]:
    """Return how many drafts each round along one answer tries and gets right.

    `right` [drafts, entries]: the draft for `entry`'s next token, that many steps on, is right. A round from
    an entry on goes as far as its drafts are right, and one token more; the next begins there.
    """
    num_drafts, num_entries = right.shape
    found, entry = [], 0
    while entry < num_entries:
        num_tried = min(num_drafts, num_entries - entry)
        num_right = 0
        while num_right < num_tried and right[num_right, entry + num_right]:
            num_right += 1
        found.append((num_tried, num_right))
        entry += num_right + 1
    return found
