"""Keeps slow work off the event loop: bodies, templates and encoding; each step's small jobs; metrics.

Owned by the API process; all parts are closed by `close`.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")

NUM_PROMPT_THREADS = 2
"""Encoding releases the interpreter lock, so two long prompts do not wait for one another."""
PROMPT_TIMEOUT_S = 30.0
METRICS_TIMEOUT_S = 10.0


class TextThreads:
    """Threads for prompts; one thread for tokens and one for metrics, which long prompts never delay."""

    def __init__(self) -> None:
        self.prompts = ThreadPoolExecutor(NUM_PROMPT_THREADS, thread_name_prefix="text-prompt")
        self.tokens = ThreadPoolExecutor(1, thread_name_prefix="text-tokens")
        self.metrics = ThreadPoolExecutor(1, thread_name_prefix="metrics")
        self._ready: list[tuple[Callable[[], None], asyncio.Future[None]]] = []

    async def run_prompt(self, job: Callable[[], Result], timeout_s: float) -> Result:
        """Run a job on prompt text; raise TimeoutError when it takes too long (its thread goes on)."""
        loop = asyncio.get_running_loop()
        return await asyncio.wait_for(loop.run_in_executor(self.prompts, job), timeout_s)

    async def run_metrics(self, job: Callable[[], Result]) -> Result:
        """Run a job on the metrics; raise TimeoutError past METRICS_TIMEOUT_S."""
        loop = asyncio.get_running_loop()
        return await asyncio.wait_for(loop.run_in_executor(self.metrics, job), METRICS_TIMEOUT_S)

    async def run_tokens(self, job: Callable[[], None]) -> None:
        """Run a job on one step's tokens of one choice.

        A step's message wakes all its choices in one turn of the event loop, so their jobs are gathered until
        the turn ends and cross to the thread, and back, as one.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        if not self._ready:
            loop.call_soon(self._send, loop)
        self._ready.append((job, done))
        await done

    def close(self) -> None:
        """End the threads; jobs not begun are dropped."""
        self.prompts.shutdown(wait=False, cancel_futures=True)
        self.tokens.shutdown(wait=False, cancel_futures=True)
        self.metrics.shutdown(wait=False, cancel_futures=True)

    def _send(self, loop: asyncio.AbstractEventLoop) -> None:
        batch, self._ready = self._ready, []
        self.tokens.submit(_run_batch, batch, loop)


def _run_batch(
    batch: list[tuple[Callable[[], None], asyncio.Future[None]]], loop: asyncio.AbstractEventLoop
) -> None:
    outcomes: list[tuple[asyncio.Future[None], Exception | None]] = []
    for job, done in batch:
        try:
            job()
        # The top of this thread's work: the failure belongs to the job's own choice and is raised there.
        except Exception as error:
            outcomes.append((done, error))
        else:
            outcomes.append((done, None))
    loop.call_soon_threadsafe(_settle, outcomes)


def _settle(outcomes: list[tuple[asyncio.Future[None], Exception | None]]) -> None:
    for done, error in outcomes:
        if done.cancelled():
            continue
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)
