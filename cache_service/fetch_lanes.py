"""FetchLanes: threads for each source that pages are fetched from, so that a source that hangs keeps nobody
else's pages waiting.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from cache_service.task_threads import TaskThreads


@dataclass(eq=False)
class _Lane:
    """A source with tasks under way. Its threads end with the last of them."""

    threads: TaskThreads
    num_tasks: int = 0


class FetchLanes:
    """Of each source, `max_threads` tasks run at once and `max_tasks` are under way. Used by one thread."""

    def __init__(self, max_threads: int, max_tasks: int) -> None:
        self._max_threads = max_threads
        self._max_tasks = max_tasks
        self._lanes: dict[object, _Lane] = {}

    def has_room(self, source: object) -> bool:
        """Tell whether a source may have one task more."""
        lane = self._lanes.get(source)
        return lane is None or lane.num_tasks < self._max_tasks

    def run(self, source: object, task: Callable[[], None]) -> None:
        """Have `task` run; `ended` is to be called once it has."""
        lane = self._lanes.get(source)
        if lane is None:
            lane = self._lanes[source] = _Lane(TaskThreads("fetch", self._max_threads))
        lane.num_tasks += 1
        lane.threads.run(task)

    def ended(self, source: object) -> None:
        """Note that one of a source's tasks has ended."""
        lane = self._lanes[source]
        lane.num_tasks -= 1
        if not lane.num_tasks:
            del self._lanes[source]
            lane.threads.close(0.0)

    def close(self, timeout_s: float) -> bool:
        """End the threads after what they have been given; False where that takes longer."""
        end_s = time.monotonic() + timeout_s
        are_over = [
            lane.threads.close(0.0) for lane in self._lanes.values()
        ]  # all are told before any is waited for
        return all(are_over) or all(
            lane.threads.close(max(0.0, end_s - time.monotonic())) for lane in self._lanes.values()
        )
