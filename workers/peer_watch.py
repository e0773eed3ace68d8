"""PeerWatch: a thread that ends a CUDA group's collectives once a rank is gone, or a step takes too long.

The engine's thread may be inside a call that waits for the device, and the device inside a collective that
waits for a rank: neither of them looks at anything else. Made and stopped by TPGroup. No torch.
"""

import select
import socket
import threading
import time
from collections.abc import Callable, Sequence

LOOK_S = 0.05


class PeerWatch:
    """Looks at the plan links and at how far this rank is, until `stop`; calls `end` once, in its thread.

    `steps` returns how many steps this rank has begun and how many of them are complete: some that are under
    way for `timeout_s` without one more that is begun or complete are taken to wait for another rank.
    """

    def __init__(
        self,
        links: Sequence[socket.socket],
        steps: Callable[[], tuple[int, int]],
        timeout_s: float,
        end: Callable[[], None],
    ) -> None:
        self._poll = select.poll()
        for link in links:
            self._poll.register(link, select.POLLRDHUP)  # whatever there is still to be read
        self._steps = steps
        self._timeout_s = timeout_s
        self._end = end
        self._stopping = threading.Event()
        self.reason: str | None = None
        """Why it has ended the collectives; what the device has computed since is worth nothing."""
        self._thread = threading.Thread(target=self._run, name="peer-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread before the links are closed. Idempotent."""
        self._stopping.set()
        if self._thread is not threading.current_thread():
            self._thread.join(LOOK_S * 20)

    def _run(self) -> None:
        seen, since_s = self._steps(), time.monotonic()
        while not self._stopping.wait(LOOK_S):
            steps = self._steps()
            if steps != seen or steps[0] == steps[1]:
                seen, since_s = steps, time.monotonic()
            if self._poll.poll(0):
                self.reason = "a rank closed its connection"
            elif time.monotonic() - since_s > self._timeout_s:
                self.reason = f"step {steps[1] + 1} is not over after {self._timeout_s:g} s"
            if self.reason is not None:
                self._end()
                return
