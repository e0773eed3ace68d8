"""FetchCalls: a CacheClient's FETCHes, asked in one thread, answered in the IO thread, taken in the former.

No call blocks; a FETCH that comes to nothing says why.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from cache_service.messages import Answer, Fetch, Fetched, FetchResult, WantedPage
from cache_service.server_connection import CallFailure, ServerConnection

ANSWER_S = 0.25
"""How long after a FETCH's own end its answer may come."""


class FetchAnswer(NamedTuple):
    """What came of one FETCH: a result for each page it asked for, or why there is none."""

    number: int
    """As `begin` returned it."""
    outcome: Sequence[FetchResult] | CallFailure
    seconds: float
    """From the question to the answer."""


class FetchCalls:
    """Numbers FETCHes from 1. `begin` and `take` are for one thread."""

    def __init__(self, connection: ServerConnection, clock: Callable[[], float] = time.monotonic) -> None:
        self._connection = connection
        self._clock = clock
        self._num_begun = 0
        self._answers: deque[FetchAnswer] = deque()

    def begin(self, pages: Sequence[WantedPage], peer: str | None, timeout_s: float) -> int:
        """Have the node's server bring pages into its arena; return the FETCH's number.

        Parents come before children; `peer` None means the remote store.
        """
        self._num_begun += 1
        number, begun_s, num_pages = self._num_begun, self._clock(), len(pages)
        self._connection.ask(
            Fetch(list(pages), peer, timeout_s),
            timeout_s + ANSWER_S,
            lambda outcome: self._answered(number, num_pages, begun_s, outcome),
        )
        return number

    def refuse(self, why: str) -> int:
        """Take a FETCH that is not worth asking for; return its number."""
        self._num_begun += 1
        self._answers.append(FetchAnswer(self._num_begun, CallFailure("refused", why), 0.0))
        return self._num_begun

    def take(self) -> list[FetchAnswer]:
        """Return the answers since the last call."""
        answers: list[FetchAnswer] = []
        while self._answers:
            answers.append(self._answers.popleft())
        return answers

    def _answered(self, number: int, num_pages: int, begun_s: float, outcome: Answer | CallFailure) -> None:
        results: Sequence[FetchResult] | CallFailure
        if isinstance(outcome, Fetched) and len(outcome.results) == num_pages:
            results = outcome.results
        elif isinstance(outcome, CallFailure):
            results = outcome
        else:
            results = CallFailure("refused", f"{type(outcome).__name__} to a FETCH of {num_pages} pages")
        self._answers.append(FetchAnswer(number, results, self._clock() - begun_s))
