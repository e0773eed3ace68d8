"""Which process is meant, and the proof that it is dead: pid with start time, and pidfds.

Used by the arena's owner for what dead processes leave behind; never by time alone (I7). Linux only.
"""

import os
import select
from dataclasses import dataclass
from pathlib import Path
from typing import Self


@dataclass(frozen=True)
class ProcessId:
    """One process of this machine since its boot: pids are used again, start times tell them apart.

    `start_ticks` is field 22 of /proc/PID/stat: clock ticks since boot.
    """

    pid: int
    start_ticks: int

    @classmethod
    def current(cls) -> Self:
        """Return the calling process."""
        process = cls.of(os.getpid())
        assert process is not None, "/proc does not show the process that reads it"
        return process

    @classmethod
    def of(cls, pid: int) -> Self | None:
        """Return the process that has a pid now."""
        status = _read_status(pid)
        return None if status is None else cls(pid, status[1])

    def is_alive(self) -> bool:
        """Tell whether the process still runs; one that has ended but is not waited for does not."""
        status = _read_status(self.pid)
        return status is not None and status[1] == self.start_ticks and status[0] not in "ZX"


class ProcessWatch:
    """Processes whose death is to be noticed, each by a pidfd. Used by one thread."""

    def __init__(self) -> None:
        self._descriptors: dict[ProcessId, int] = {}
        self._poll = select.poll()
        self._processes: dict[int, ProcessId] = {}  # descriptor -> process
        self._found_dead: set[ProcessId] = set()  # dead before they could be watched

    def watch(self, process: ProcessId) -> None:
        """Watch a process; one that is dead already shows up in the next `take_dead`. Idempotent."""
        if process in self._descriptors or process in self._found_dead:
            return
        try:
            descriptor = os.pidfd_open(process.pid)
        except ProcessLookupError:
            self._found_dead.add(process)
            return
        # The pid may have passed to another process before pidfd_open; afterwards the pidfd holds it.
        if not process.is_alive():
            os.close(descriptor)
            self._found_dead.add(process)
            return
        self._descriptors[process] = descriptor
        self._processes[descriptor] = process
        self._poll.register(descriptor, select.POLLIN)

    def forget(self, process: ProcessId) -> None:
        """Stop watching a process. Idempotent."""
        self._found_dead.discard(process)
        descriptor = self._descriptors.pop(process, None)
        if descriptor is not None:
            self._poll.unregister(descriptor)
            del self._processes[descriptor]
            os.close(descriptor)

    def take_dead(self) -> list[ProcessId]:
        """Return the watched processes proven dead by now, each once; never waits."""
        dead = [*self._found_dead, *(self._processes[descriptor] for descriptor, _ in self._poll.poll(0))]
        for process in dead:
            self.forget(process)
        return dead

    def close(self) -> None:
        """Stop watching. Idempotent."""
        for process in list(self._descriptors):
            self.forget(process)


def _read_status(pid: int) -> tuple[str, int] | None:
    """Return state letter and start time of a process, None where there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the command's name in parentheses, which may hold spaces and parentheses.
    fields = text[text.rindex(")") + 2 :].split()
    return fields[0], int(fields[19])
