"""Inbox: what background threads want done in the core's thread; it wakes that thread's poller."""

import os
import threading
from collections import deque
from collections.abc import Callable


class Inbox:
    """`put` from any thread; its owner polls `descriptor` and calls `run`."""

    def __init__(self) -> None:
        self.descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        """Readable when `run` has something to do."""
        self._tasks: deque[Callable[[], None]] = deque()
        self._lock = threading.Lock()
        self._is_closed = False

    def put(self, task: Callable[[], None]) -> None:
        """Have `task` called in the owner's thread, soon; never, once the inbox is closed."""
        with self._lock:
            if self._is_closed:
                return
            self._tasks.append(task)
            os.eventfd_write(self.descriptor, 1)

    def run(self) -> None:
        """Do what has been put so far, in order. In the owner's thread."""
        with self._lock:
            if not self._tasks:
                return
            os.eventfd_read(self.descriptor)
            tasks, self._tasks = self._tasks, deque()
        for task in tasks:
            task()

    def close(self) -> None:
        """Do nothing more. In the owner's thread; idempotent."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                self._tasks.clear()
                os.close(self.descriptor)
