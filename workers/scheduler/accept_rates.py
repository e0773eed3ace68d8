"""AcceptRates: how often drafts are right, place by place, of late. Used by DraftLength."""

from collections.abc import Sequence

_KEPT = 0.99
"""Share of its weight that what was seen keeps when the next step's drafts are verified."""
_FIRST_RATE = 0.6
"""Of the first place, before any draft was verified."""
_FIRST_ROWS = 4.0
"""As if seen in so many rows. So every other place counts besides: with the rate of the one before it."""


class AcceptRates:
    """A place's rate is that of drafts right there among those right at all places before."""

    def __init__(self, max_drafts: int) -> None:
        others = [0.0] * (max_drafts - 1)
        self._reached = [_FIRST_ROWS, *others]
        self._accepted = [_FIRST_ROWS * _FIRST_RATE, *others]

    def verified(self, num_drafts: int, num_accepted: int, num_rows: int = 1) -> None:
        """Take rows in: of each one's drafts the first `num_accepted` were right."""
        for place in range(min(num_accepted + 1, num_drafts)):
            self._reached[place] += num_rows
            self._accepted[place] += num_rows * (place < num_accepted)

    def stepped(self) -> None:
        """Let what was seen count for less; called for each step that verified drafts."""
        self._scale(_KEPT)

    def age(self, max_rows: int) -> None:
        """Let what was seen count for no more than so many rows: drafts to come may be of another kind."""
        if self._reached[0] > max_rows:
            self._scale(max_rows / self._reached[0])

    def expected_tokens(self, lengths: Sequence[int]) -> list[float]:
        """Return how many tokens a row gets with drafts of each length, ascending, the one sampled behind
        those that are right included."""
        found = []
        rate, chance, expected, place = _FIRST_RATE, 1.0, 1.0, 0
        for length in lengths:
            while place < length:
                before = _FIRST_ROWS if place else 0.0
                rate = (self._accepted[place] + before * rate) / (self._reached[place] + before)
                chance *= rate
                expected += chance
                place += 1
            found.append(expected)
        return found

    def _scale(self, ratio: float) -> None:
        self._reached = [ratio * rows for rows in self._reached]
        self._accepted = [ratio * rows for rows in self._accepted]
