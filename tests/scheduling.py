"""Which tests share a process when they run in several: asked by conftest.py when xdist is there."""

from pathlib import PurePosixPath

from xdist.scheduler import LoadScopeScheduling

SERVICE_FOLDERS = ("actors", "faults", "e2e")
ORACLE = "test_greedy_oracle.py"


class Scheduling(LoadScopeScheduling):
    """Keeps tests that start services together, so that they take turns, and else each file's.

    The slow ones of the greedy oracle go one by one: they are few and long.
    """

    def _split_scope(self, nodeid: str) -> str:
        path = PurePosixPath(nodeid.partition("::")[0])
        if path.name == ORACLE:
            return nodeid if self.config.getoption("markexpr").startswith("slow") else str(path)
        return "services" if path.parts[1] in SERVICE_FOLDERS else str(path)
