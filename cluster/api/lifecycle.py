"""What the API process is doing for whom, and how it stops: refuse, wait, end the rest. On the event loop."""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from cluster.api.errors import draining

logger = logging.getLogger(__name__)

LAST_WORDS_S = 5.0
"""After the drain's deadline: time for the finish reasons to reach the clients."""


class Endable(Protocol):
    """A running call that can be told to finish early."""

    async def end(self) -> None:
        """Finish with `shutdown`; what was generated so far reaches the client."""


class Lifecycle:
    """Counts calls from their first byte to their last, and drains them."""

    def __init__(self) -> None:
        self._num_calls = 0
        self._running: set[Endable] = set()
        self._is_draining = False
        self._is_ending = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def is_draining(self) -> bool:
        """New work is refused."""
        return self._is_draining

    @property
    def num_calls(self) -> int:
        """Calls under way."""
        return self._num_calls

    @contextmanager
    def call(self) -> Iterator[None]:
        """Count a call while it runs; raise ApiError (503) when draining."""
        if self._is_draining:
            raise draining()
        self._num_calls += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._num_calls -= 1
            if self._num_calls == 0:
                self._idle.set()

    @contextmanager
    def generating(self, generation: Endable) -> Iterator[None]:
        """Let `drain` end a generation; raise ApiError (503) when its deadline has passed already."""
        if self._is_ending:
            raise draining()
        self._running.add(generation)
        try:
            yield
        finally:
            self._running.discard(generation)

    def refuse_new(self) -> None:
        """Begin to drain: `/ready` and new calls answer 503 from now on."""
        self._is_draining = True

    async def drain(self, drain_s: float) -> None:
        """Refuse new calls, let those running finish for `drain_s`, end the rest with `shutdown`."""
        self.refuse_new()
        if await self._becomes_idle(drain_s) or self._is_ending:
            return
        logger.info("drain deadline passed, ending running calls", extra={"num_calls": self._num_calls})
        await self._end_running()

    async def end_now(self) -> None:
        """Refuse new calls and end those running with `shutdown`, whatever time their drain had left."""
        self.refuse_new()
        if self._idle.is_set():
            return
        logger.info("stopped before all calls finished, ending them", extra={"num_calls": self._num_calls})
        await self._end_running()

    async def _end_running(self) -> None:
        self._is_ending = True
        await asyncio.gather(*(generation.end() for generation in tuple(self._running)))
        if not await self._becomes_idle(LAST_WORDS_S):
            logger.warning("calls did not end in time", extra={"num_calls": self._num_calls})

    async def _becomes_idle(self, timeout_s: float) -> bool:
        if self._idle.is_set():  # wait_for without time would not even look
            return True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True
