"""Ranks: real rank processes of a TP group, for the tests of workers.parallel."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

SCRIPT = Path(__file__).parent / "tensor_parallel_ranks.py"
ROOT = SCRIPT.parents[2]
QUIET = {"TORCH_CPP_LOG_LEVEL": "FATAL"}


class Ranks:
    """A process that forks groups of ranks and passes on what they say."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPT)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", **QUIET},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.said: list[dict] = []

    def start(self, scenario: str, timeout_s: float = 30, device: str = "cpu") -> list[dict]:
        """Start two ranks; return their fields, with their pids, when both have met."""
        assert self.process.stdin is not None
        group = {"scenario": scenario, "size": 2, "timeout_s": timeout_s, "device": device}
        self.process.stdin.write(json.dumps(group) + "\n")
        self.process.stdin.flush()
        self.said = [{}, {}]
        self.read_until(lambda: all("pid" in fields for fields in self.said))
        return self.said

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()

    def finish(self) -> list[dict]:
        """Return all that the ranks said when both have ended."""
        self.read_until(lambda: all("status" in fields for fields in self.said))
        return self.said

    def read_until(self, is_enough: Callable[[], bool]) -> None:
        """Read lines until `is_enough`."""
        assert self.process.stdout is not None
        while not is_enough():
            line = self.process.stdout.readline()
            assert line, "the ranks' process ended"
            fields = json.loads(line)
            self.said[fields["rank"]].update(fields)
