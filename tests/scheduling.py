"""Which tests share a process when they run in several: asked by conftest.py when xdist is there."""

from pathlib import PurePosixPath

from xdist.scheduler import LoadScopeScheduling

SERVICE_FOLDERS = ("actors", "faults", "e2e")
GREEDY = "test_greedy_"
"""Files in tests/e2e that need no service."""


class Scheduling(LoadScopeScheduling):
    """Keeps tests that start services together, so that they take turns, and else each file's.

    Slow tests of greedy tokens go one by one: they are few and long.
    """

    def _split_scope(self, nodeid: str) -> str:
        path = PurePosixPath(nodeid.partition("::")[0])
        if path.name.startswith(GREEDY):
            return nodeid if self.config.getoption("markexpr").startswith("slow") else str(path)
        return "services" if path.parts[1] in SERVICE_FOLDERS else str(path)
