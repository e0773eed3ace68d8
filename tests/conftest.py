"""Set before any test module imports torch: the suites run on few, shared cores."""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

NUM_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
SERVICE_FOLDERS = ("actors", "faults", "e2e")
TESTS = Path(__file__).parent

# A thread that spins for work takes the core from the process that would bring it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if NUM_WORKERS > 1:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(tryfirst=True)  # xdist reads the marks in its own
def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Tell xdist what stays together: tests that start services, which take turns; else each file.

    Slow tests go one by one: they are few and long.
    """
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        if item.get_closest_marker("slow"):
            continue
        starts_services = folder in SERVICE_FOLDERS and item.path.name != "test_greedy_oracle.py"
        item.add_marker(pytest.mark.xdist_group("services" if starts_services else item.path.name))
