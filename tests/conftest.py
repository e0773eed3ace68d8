"""Set before any test module imports torch: the suites run on few, shared cores."""

import os
from pathlib import PurePosixPath

import pytest
from xdist.scheduler import LoadScopeScheduling

NUM_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
SERVICE_FOLDERS = ("actors", "faults", "e2e")

# A thread that spins for work takes the core from the process that would bring it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if NUM_WORKERS > 1:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


class Scheduling(LoadScopeScheduling):  # type: ignore[misc]
    """Says which tests stay together in one process: those that start services, which take turns; else a file's.

    Slow tests go one by one: they are few and long.
    """

    def _split_scope(self, nodeid: str) -> str:
        path = PurePosixPath(nodeid.partition("::")[0])
        if self.config.getoption("markexpr").startswith("slow"):
            return nodeid
        starts_services = path.parts[1] in SERVICE_FOLDERS and path.name != "test_greedy_oracle.py"
        return "services" if starts_services else str(path)


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> Scheduling:
    """Replace xdist's own ways, whichever --dist was given."""
    return Scheduling(config, log)
