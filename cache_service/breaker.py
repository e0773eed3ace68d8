"""Breaker: stops asking a server that does not answer, and tries again now and then. Time is an argument."""

from typing import Literal, get_args

BreakerState = Literal["closed", "open", "half_open"]
BREAKER_STATES: tuple[BreakerState, ...] = get_args(BreakerState)


class Breaker:
    """Closed: calls go out. Open: none does until `retry_s` has passed; then one, the probe (half-open).

    Each vain probe doubles the pause, up to `max_retry_s`; an answer closes it. Used by one thread, its
    state may be read by any.
    """

    def __init__(self, max_failures: int, retry_s: float, max_retry_s: float) -> None:
        assert max_failures >= 1 and 0 < retry_s <= max_retry_s
        self.state: BreakerState = "closed"
        self.num_opened = 0
        """Times it opened from closed."""
        self._max_failures = max_failures
        self._first_retry_s = retry_s
        self._max_retry_s = max_retry_s
        self._retry_s = retry_s
        self._num_failures = 0
        self._next_probe_s = 0.0

    def allows(self, now_s: float) -> bool:
        """Tell whether a call may go out now; of an open breaker that call is the probe."""
        if self.state == "open" and now_s >= self._next_probe_s:
            self.state = "half_open"
            return True
        return self.state == "closed"

    def succeeded(self) -> None:
        """Note an answer, to whatever call."""
        self.state = "closed"
        self._num_failures = 0
        self._retry_s = self._first_retry_s

    def told_nothing(self) -> None:
        """Note that the probe, if one is out, came to nothing that the server is to blame or praise for."""
        if self.state == "half_open":
            self.state = "open"  # its pause is over: the next call is the probe

    def failed(self, now_s: float) -> None:
        """Note a call without an answer. One that was under way when the breaker opened changes nothing."""
        self._num_failures += 1
        if self.state == "half_open":
            self._retry_s = min(2 * self._retry_s, self._max_retry_s)
        elif self.state == "closed" and self._num_failures >= self._max_failures:
            self.num_opened += 1
        else:
            return
        self.state = "open"
        self._next_probe_s = now_s + self._retry_s
