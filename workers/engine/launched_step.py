"""LaunchedStep: a step that the device may still be running, and what will come of it. Engine's thread."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from workers.engine.copies import Fence
from workers.engine.sampled import Sampled
from workers.plan import RelocationVersion, StepOutput
from workers.speculative.acceptance import Verified

STEP_TIMEOUT_S = 300.0
"""The longest that a device may take for a step; in a group of ranks it is their own timeout."""
_LOOKS_PER_CHECK = 200
"""Looks at the device between two at the peers."""
_LOOK_S = 20e-6
"""Between two looks at the device: sleeping leaves the interpreter to other threads."""
_SPIN_S = 2e-3
"""But for so long it looks again at once, which leaves them the interpreter, too: the shortest sleep takes
0.1 ms, and a step that verifies drafts has the device wait for what it says."""


class StepTimeoutError(RuntimeError):
    """The device did not end a step in time: it hangs, and the replica with it."""


@dataclass(frozen=True)
class LaunchedStep:
    """`sampled` is on its way to the host, None where no row was sampled here; `fence` is behind that and the
    target's whole pass, None where both are done. The draft goes on behind it, over places that are nobody's
    but its rows': what comes to them next, a step or a move, comes after it on the device."""

    step: int
    relocation_version: RelocationVersion
    sampled: Sampled | Verified | None
    fence: Fence | None

    @property
    def has_ended(self) -> bool:
        """Tell whether the device has done all of it, drafting on aside."""
        return self.fence is None or self.fence.query()

    def output(
        self,
        timeout_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        check: Callable[[], None] = lambda: None,
    ) -> StepOutput:
        """Wait for the device and return what came of the step. Raises StepTimeoutError, after STEP_TIMEOUT_S
        where none is given, and what `check` does: a device may wait for a rank that is gone."""
        timeout_s = timeout_s or STEP_TIMEOUT_S
        began_s, num_looks = clock(), 0
        while not self.has_ended:
            num_looks += 1
            if num_looks % _LOOKS_PER_CHECK == 0:
                check()
            waited_s = clock() - began_s
            if waited_s > timeout_s:
                raise StepTimeoutError(
                    f"step {self.step}: the device has not ended it in {timeout_s:g} s; restart the replica"
                )
            if waited_s > _SPIN_S:
                sleep(_LOOK_S)
        check()  # with a rank gone, the device may have gone on without its part of a sum
        if self.sampled is None:
            return StepOutput(self.step, self.relocation_version, [], [])
        token_ids, logprobs = self.sampled.read()
        return StepOutput(self.step, self.relocation_version, token_ids, logprobs, self.sampled.num_tokens)
