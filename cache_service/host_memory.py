"""How much memory this machine, this container and its shared-memory folder can still give.

Read once, before an arena is created: afterwards the kernel answers with SIGBUS or kills a process.
"""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from cache_service.arena_format import ArenaSizeError

_MAX_SHARE_OF_FREE = 0.9
"""The part of free memory that an arena may take: processes go on growing after it is made."""
_GIB = 1 << 30


@dataclass(frozen=True)
class HostMemory:
    """Bytes that can still be had; None where no such limit exists."""

    available_bytes: int
    cgroup_free_bytes: int | None
    shared_memory_free_bytes: int

    @classmethod
    def read(cls, folder: Path, root: Path = Path("/")) -> Self:
        """Read the limits that hold for a file in `folder`. `root` is where proc and sys are mounted."""
        found = os.statvfs(folder)
        return cls(
            available_bytes=_mem_available(root / "proc/meminfo"),
            cgroup_free_bytes=_cgroup_free(root),
            shared_memory_free_bytes=found.f_bavail * found.f_frsize,
        )

    def require(self, num_bytes: int, folder: Path) -> None:
        """Raise ArenaSizeError unless an arena may take `num_bytes` more."""
        limits = [
            ("this machine has", self.available_bytes, _MAX_SHARE_OF_FREE, "free memory (MemAvailable)"),
            ("this container has", self.cgroup_free_bytes, _MAX_SHARE_OF_FREE, "left of its memory limit"),
            (f"{folder} has", self.shared_memory_free_bytes, 1.0, "free space"),
        ]
        for who, free, share, what in limits:
            if free is not None and num_bytes > free * share:
                raise ArenaSizeError(
                    f"the host cache needs {num_bytes / _GIB:.3f} GiB, but {who} {free / _GIB:.3f} GiB"
                    f" {what}, of which it may take {free * share / _GIB:.3f}; lower --host-cache-gb or"
                    f" {'enlarge the folder' if share == 1.0 else 'free memory'}"
                )


def _mem_available(path: Path) -> int:
    for line in path.read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    raise ArenaSizeError(f"{path} has no line MemAvailable; this needs Linux 3.14 or later")


def _cgroup_free(root: Path) -> int | None:
    """Return what the tightest of this process's cgroups leaves, version 1 or 2; None without any limit."""
    free: list[int] = []
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                names = ("memory.max", "memory.current", "inactive_file")
                free += _free_along(root / "sys/fs/cgroup", path, names)
            elif "memory" in controllers.split(","):
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
                free += _free_along(root / "sys/fs/cgroup/memory", path, names)
    return min(free, default=None)


def _free_along(mount: Path, path: str, names: tuple[str, str, str]) -> list[int]:
    """Return what each limit from a cgroup up to the mount leaves.

    A container that has not its own cgroup namespace is told a path which its mount does not show: the
    mount itself is its cgroup then.
    """
    limit_name, usage_name, reclaimable_name = names
    cgroup = mount / path.lstrip("/")
    free = []
    for folder in (cgroup, *cgroup.parents):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            limit = int((folder / limit_name).read_text())
            used = int((folder / usage_name).read_text())
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            free.append(max(0, limit - used + int(statistics.get(reclaimable_name, "0"))))
        if folder == mount:
            break
    return free
