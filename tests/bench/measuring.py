"""What the parts of a benchmark share: progress on stderr, medians over rounds, the machine's name."""

import platform
import statistics
import sys
from collections import Counter
from pathlib import Path


def say(text):
    print(text, file=sys.stderr, flush=True)


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("model name", "CPU part")):
            return line.split(":")[1].strip()
    return platform.processor()


def compiled_kernels() -> Counter[str]:
    """Return how many forms of each of our Triton kernels this process has compiled, or read from the disk;
    a step waits for each that is new. None without Triton."""
    found: Counter[str] = Counter()
    for name, module in list(sys.modules.items()):
        if name.startswith("workers.triton_kernels."):
            for kernel in vars(module).values():
                for cache in getattr(kernel, "device_caches", {}).values():
                    found[kernel.__name__] = max(found[kernel.__name__], len(cache[0]))
    return found


class Medians:
    """Collects each measurement of each round, and tells it as it comes."""

    def __init__(self):
        self._found = {}

    def add(self, name, value):
        self._found.setdefault(name, []).append(value)

    def __getitem__(self, name):
        return statistics.median(self._found[name])

    def spread(self, name):
        """Least and greatest."""
        return min(self._found[name]), max(self._found[name])


def quantile(values, ratio):
    """Return the value that such a part of all does not exceed."""
    return sorted(values)[min(int(ratio * len(values)), len(values) - 1)]
