"""HeldGrants: slots that a client may write, asked for in advance, and what it owes the server for them."""

from collections import deque
from collections.abc import Iterable, Sequence

from cache_service.page_records import Grant

RETRY_S = 0.05
"""Before asking again where the server had too few, or did not answer."""


class HeldGrants:
    """`take` and `give_back` may be called by any thread, all else by the IO thread.

    A grant is known from the server's answer until the server has ended it. What the server lists and nobody
    knows is held: an answer was lost.
    """

    def __init__(self, max_grants: int) -> None:
        self._max_grants = max_grants
        self._num_wanted = 0
        self._held: deque[Grant] = deque()
        self._unused: deque[Grant] = deque()
        self._known: set[Grant] = set()
        self._is_asked = False
        self._next_s = 0.0

    def __len__(self) -> int:
        return len(self._held)

    @property
    def is_low(self) -> bool:
        """Tell whether more should be asked for."""
        return 2 * len(self._held) <= self._num_wanted and self._num_wanted > 0

    def take(self) -> Grant | None:
        """Return a slot to write; None: there is none now."""
        try:
            return self._held.popleft()
        except IndexError:
            return None

    def give_back(self, grants: Iterable[Grant]) -> None:
        """Note grants to be aborted, sooner or later."""
        self._unused.extend(grants)

    def want(self, num_allowed: int) -> None:
        """Hold as many as are allowed from now on, and wanted; those beyond are given back."""
        self._num_wanted = min(self._max_grants, num_allowed)
        while len(self._held) > self._num_wanted and (grant := self.take()) is not None:
            self._unused.append(grant)

    def num_to_ask(self, now_s: float) -> int:
        """Return how many slots to ask for now, and take them for asked; 0: none."""
        if self._is_asked or not self.is_low or now_s < self._next_s:
            return 0
        self._is_asked = True
        return self._num_wanted - len(self._held)

    def answered(self, grants: Sequence[Grant] | None, num_asked: int, now_s: float) -> None:
        """Take the answer; None: there was none."""
        self._is_asked = False
        if grants is None or len(grants) < num_asked:
            self._next_s = now_s + RETRY_S
        self.hold(grants or ())

    def hold(self, grants: Iterable[Grant]) -> None:
        """Take grants, except those that are known."""
        new = [grant for grant in grants if grant not in self._known]
        self._known.update(new)
        self._held.extend(new)

    def take_unused(self) -> list[Grant]:
        """Return what is to be aborted now."""
        unused = []
        while self._unused:
            unused.append(self._unused.popleft())
        return unused

    def ended(self, grants: Iterable[Grant]) -> None:
        """Note grants that the server has ended, one way or another."""
        self._known.difference_update(grants)
