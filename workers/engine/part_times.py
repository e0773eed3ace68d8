"""PartTimes: what the parts of steps with a draft take on the device. Owned by the Engine, in its thread.

It is for the metrics alone: nothing that a rank does depends on it (I1), and nothing waits for it.
"""

import time
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Literal, Protocol

import torch

from workers.plan import Mode

TimedPart = Literal["target", "draft_extend", "accept", "draft"]
"""`target`: its pass, with draft-extend where that is part of it, else `draft_extend`; `accept`: the choice
of tokens, and which drafts they make right; `draft`: the passes that guess on."""

PartSeconds = defaultdict[tuple[Mode, TimedPart], float]


class PartTimes(Protocol):
    """Marks where parts begin and end."""

    @property
    def seconds(self) -> PartSeconds:
        """By mode of the step, as far as is known."""
        ...

    def begin(self, mode: Mode) -> None:
        """Begin a step's first part."""

    def ended(self, part: TimedPart) -> None:
        """End a part, and begin the next."""


class HostPartTimes:
    """For a device that is the host: by its clock."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: PartSeconds = defaultdict(float)
        self._clock = clock
        self._mode: Mode = "decode"
        self._began_s = 0.0

    def begin(self, mode: Mode) -> None:
        """Begin a step's first part."""
        self._mode, self._began_s = mode, self._clock()

    def ended(self, part: TimedPart) -> None:
        """End a part, and begin the next."""
        now_s = self._clock()
        self.seconds[self._mode, part] += now_s - self._began_s
        self._began_s = now_s


class CudaPartTimes:
    """By events on the current stream, which are read once they are over, at a later mark."""

    def __init__(self) -> None:
        self.seconds: PartSeconds = defaultdict(float)
        self._mode: Mode = "decode"
        self._began: torch.cuda.Event | None = None
        self._pending: deque[tuple[Mode, TimedPart, torch.cuda.Event, torch.cuda.Event]] = deque()

    def begin(self, mode: Mode) -> None:
        """Begin a step's first part."""
        self._mode, self._began = mode, self._mark()
        while self._pending and self._pending[0][3].query():  # type: ignore[no-untyped-call]
            of_mode, part, began, ended = self._pending.popleft()
            self.seconds[of_mode, part] += began.elapsed_time(ended) / 1e3

    def ended(self, part: TimedPart) -> None:
        """End a part, and begin the next."""
        assert self._began is not None, "a step begins before its parts end"
        now = self._mark()
        self._pending.append((self._mode, part, self._began, now))
        self._began = now

    @staticmethod
    def _mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


def part_times_of(device: torch.device) -> PartTimes:
    """Return those of a device."""
    return CudaPartTimes() if device.type == "cuda" else HostPartTimes()
