"""Set before any test module imports torch: the suites run on few, shared cores."""

import logging
import os

import pytest

from tests.scopes import SERVICES, scope_of

NUM_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))

# A thread that spins for work takes the core from the process that would bring it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if NUM_WORKERS > 1:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser):
    parser.addoption(
        "--seeds",
        type=int,
        default=200,
        help="seeds of tests/e2e/test_greedy_seeds.py, for all but a few of which it is slow",
    )
    parser.addoption(
        "--tp-size",
        type=int,
        default=2,
        help="ranks of the groups in tests/faults/test_rank_drills.py and tests/gpu, where each needs a GPU",
    )


@pytest.fixture(scope="session")
def tp_size(request):
    return request.config.getoption("--tp-size")


@pytest.fixture(scope="session")
def cuda_tp_size(tp_size):
    """Skip where there are too few cards for the ranks."""
    import torch

    if torch.cuda.device_count() < tp_size:
        pytest.skip(f"needs {tp_size} CUDA devices")
    return tp_size


@pytest.fixture(autouse=True)
def logging_as_before():
    """Take back what an actor built in a test's own process did to the process's loggers."""
    loggers = [logging.getLogger(name) for name in ("", "cluster", "workers", "cache_service", "deploy")]
    levels, handlers = [logger.level for logger in loggers], list(loggers[0].handlers)
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
    loggers[0].handlers[:] = handlers


def pytest_collection_modifyitems(items):
    """Begin with the tests that start services: in one process, they are the longest of a run."""
    items.sort(key=lambda item: scope_of(item.nodeid.partition("::")[0]) != SERVICES)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Replace xdist's own ways, whichever --dist was given."""
    from tests.scheduling import Scheduling

    return Scheduling(config, log)
