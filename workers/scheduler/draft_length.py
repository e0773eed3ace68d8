"""DraftLength: how many tokens the draft guesses in a step, by what drafts bring and what steps take.

The Scheduler asks for each step, and tells what became of drafts and how long steps took. Only rank 0's
decides: its choice travels in the plan (I1).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from workers.plan import BatchPlan
from workers.scheduler.accept_rates import AcceptRates
from workers.scheduler.draft_costs import DraftCosts, kind_of

DraftSwitch = tuple[Literal["on", "off"], Literal["gain", "loss", "probe", "batch_size", "no_room"]]
"""And why: `gain`, `loss`: what was measured says so; `probe`: to measure the other way for a few steps;
`batch_size`: that was chosen for steps of as many rows, or is tried with them at first; `no_room`: a step has
no tokens for drafts."""

LEAST_GAIN_RATIO = 1.02
"""Another length is chosen once it is so much faster: else noise would change it all the time."""
SETTLED_STEPS = 8
"""And once the one that is chosen was kept so long: it is measured by then."""
_NEW_PROBE_STEPS = 4
"""With a new number of rows another length is probed so soon: what none costs is not known yet."""
FIRST_PROBE_STEPS = 16
"""Else after so many steps, and after twice as many each time that what is probed is not better, or four
times as many where it was far from that."""
MAX_PROBE_STEPS = 1024
"""But after so many at the latest while nothing is drafted."""
_MAX_PROBE_STEPS_ON = 256
"""While tokens are: how long steps without them take is not seen meanwhile."""
_PROBING_STEPS = 4
"""A probe's steps, of which the first still verifies drafts of the length before."""
_PROBING_ROWS = 16
"""Where nothing is drafted a probe goes on for so many rows: of what drafts bring there is no other news."""
_HOPELESS_RATIO = 0.8
"""A length that brings no more than this part of the chosen one's tokens a second is not probed, or, none and
the next, more rarely."""


@dataclass
class _Choice:
    """What is chosen for steps of one kind."""

    length: int
    num_kept: int = 0
    """Steps since it was chosen."""
    num_unprobed: int = 0
    """Steps since another was probed."""
    probe_after: int = _NEW_PROBE_STEPS
    probed: int = 0
    num_probing: int = 0
    """Steps left in which `probed` is used instead."""


class DraftLength:
    """Chooses the length, one of `lengths` or 0, that brings the most tokens a second.

    0 turns speculation off for a step: nothing is drafted in it. That is chosen where drafts would lose. All
    that is not chosen is probed from time to time, so that it comes back when texts or load have changed.
    """

    def __init__(self, lengths: Sequence[int], max_tokens_per_step: int, topk: int = 1) -> None:
        """`topk`: so many drafts are verified for each token of a length."""
        self._topk = topk
        self._lengths = [0, *sorted(lengths)]
        self._max_tokens = max_tokens_per_step
        self._rates = AcceptRates(self._lengths[-1])
        self._costs = DraftCosts()
        self._choices: dict[int, _Choice] = {}
        self._kind = 1
        """Of the last step."""
        self._num_steps = 0
        self._before: tuple[int, int] | None = None
        """Kind and length of the last step, if all its rows verified and drafted as many."""
        self.length = 0
        """The last step's."""
        self.switches: Counter[DraftSwitch] = Counter()

    def choose(self, num_rows: int) -> int:
        """Return how many tokens to draft for each row that a step samples: the next verifies them."""
        if num_rows == 0:
            return 0
        self._num_steps += 1
        room = max(self._max_tokens // num_rows - 1, 0) // self._topk
        lengths = [length for length in self._lengths if length <= room]
        if len(lengths) == 1:
            self.switches["off", "no_room"] += self.length > 0
            self.length = 0
            return 0
        choice = self._choice(kind_of(num_rows), lengths)
        choice.num_kept += 1
        choice.num_unprobed += 1
        if not choice.num_probing:
            speeds = self._speeds(lengths)
            self._settle(choice, speeds)
            if choice.num_unprobed >= choice.probe_after:
                self._begin_probe(choice, speeds, num_rows)
        self.length = choice.length
        if choice.num_probing:
            choice.num_probing -= 1
            self.length = min(choice.probed, lengths[-1])
        return self.length

    def verified(self, num_drafts: int, num_accepted: int, num_rows: int = 1) -> None:
        """Take in what became of the drafts of some rows, so many tokens ahead, of all the same."""
        self._rates.verified(num_drafts, num_accepted, num_rows)

    def stepped(self, plan: BatchPlan, seconds: float) -> None:
        """Take in how long a step took: it tells of a length if all its rows verified and drafted as many,
        and those of the step before did, which it may have waited for, or not."""
        if plan.num_drafts:
            self._rates.stepped()
        is_even = all(num_drafts == self._topk * plan.draft_len for num_drafts in plan.num_drafts or [0])
        before, self._before = self._before, None
        if plan.mode in ("decode", "verify") and plan.slots and is_even and seconds > 0:
            self._before = kind_of(len(plan.slots)), plan.draft_len
            if self._before == before:
                self._costs.measured(*self._before, seconds, self._num_steps)

    def _choice(self, kind: int, lengths: Sequence[int]) -> _Choice:
        """Return what is chosen for steps of a kind; at first, what is for those before."""
        before, self._kind = self._choices.get(self._kind), kind
        if (choice := self._choices.get(kind)) is None:
            choice = self._choices[kind] = _Choice(before.length if before else _best(self._speeds(lengths)))
        choice.length = min(choice.length, lengths[-1])
        if (before is not None and before.length > 0) != (choice.length > 0):
            self.switches["on" if choice.length else "off", "batch_size"] += 1
        return choice

    def _speeds(self, lengths: Sequence[int]) -> dict[int, float]:
        """Return the tokens a second that each length brings a row."""
        tokens = self._rates.expected_tokens(lengths)
        return {
            length: num_tokens / self._costs.seconds(self._kind, length)
            for length, num_tokens in zip(lengths, tokens, strict=True)
        }

    def _settle(self, choice: _Choice, speeds: dict[int, float]) -> None:
        """Choose the best length where it is better by enough."""
        best = _best(speeds)
        if choice.num_kept <= SETTLED_STEPS or speeds[best] <= LEAST_GAIN_RATIO * speeds[choice.length]:
            return
        if not best:
            self.switches["off", "loss"] += 1
        elif not choice.length:
            self.switches["on", "gain"] += 1
        choice.length, choice.num_kept, choice.probe_after = best, 0, FIRST_PROBE_STEPS

    def _begin_probe(self, choice: _Choice, speeds: dict[int, float], num_rows: int) -> None:
        """Use another length for a few steps: 0 or one next to the chosen, what was measured longest ago."""
        lengths = list(speeds)
        place = lengths.index(choice.length)
        least = _HOPELESS_RATIO * speeds[choice.length] if choice.length else 0.0
        near = {0, *lengths[max(place - 1, 0) : place + 2]} - {choice.length}
        near = {length for length in near if not length or speeds[length] > least}
        choice.probed = min(near, key=lambda length: (self._costs.measured_at(self._kind, length), length))
        choice.num_unprobed, choice.num_probing = 0, _PROBING_STEPS
        most = _MAX_PROBE_STEPS_ON if choice.length else MAX_PROBE_STEPS
        is_known = self._costs.measured_at(self._kind, choice.probed) >= 0
        is_hopeless = is_known and speeds[choice.probed] < _HOPELESS_RATIO * speeds[choice.length]
        choice.probe_after = min((4 if is_hopeless else 2) * choice.probe_after, most)
        if not choice.length:
            self._rates.age(_PROBING_ROWS // 2)
            choice.num_probing = max(_PROBING_STEPS, -(-_PROBING_ROWS // num_rows))
            self.switches["on", "probe"] += 1
        elif not choice.probed:
            self.switches["off", "probe"] += 1


def _best(speeds: dict[int, float]) -> int:
    return max(speeds, key=speeds.__getitem__)
