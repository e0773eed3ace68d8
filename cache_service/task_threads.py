"""TaskThreads: a few threads for what would block, so that the core's thread never waits."""

import logging
import queue
import threading
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)


class TaskThreads:
    """Runs tasks in the order given, `max_threads` at once. Threads start when first needed."""

    def __init__(self, name: str, max_threads: int) -> None:
        self._name = name
        self._max_threads = max_threads
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def run(self, task: Callable[[], None]) -> None:
        """Have `task` run; it ends by its own deadline. From one thread."""
        self._queue.put(task)
        if len(self._threads) < self._max_threads:
            name = f"{self._name}-{len(self._threads)}"
            thread = threading.Thread(target=self._run, name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def close(self, timeout_s: float) -> bool:
        """End the threads after what has been given; False where that takes longer."""
        for _ in self._threads:
            self._queue.put(None)
        end_s = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, end_s - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        while (task := self._queue.get()) is not None:
            try:
                task()
            except Exception:  # the thread's top: the next task goes on
                logger.exception("a task failed", extra={"threads": self._name})
