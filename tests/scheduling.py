"""Which tests share a process when they run in several: asked by conftest.py when xdist is there."""

from pathlib import PurePosixPath

from xdist.scheduler import LoadScopeScheduling

SERVICE_FOLDERS = ("actors", "faults", "e2e")


class Scheduling(LoadScopeScheduling):
    """Keeps tests that start services together, so that they take turns, and else each file's.

    Slow tests go one by one: they are few and long.
    """

    def _split_scope(self, nodeid: str) -> str:
        path = PurePosixPath(nodeid.partition("::")[0])
        if self.config.getoption("markexpr").startswith("slow"):
            return nodeid
        starts_services = path.parts[1] in SERVICE_FOLDERS and path.name != "test_greedy_oracle.py"
        return "services" if starts_services else str(path)
