"""Which tests stay together when they run in several processes, and which come first."""

from pathlib import PurePosixPath

SERVICE_FOLDERS = ("actors", "faults", "e2e")
SERVICES = "services"
GREEDY = "test_greedy_"
"""Files in tests/e2e that need no service."""


def scope_of(path: str, *, one_by_one: bool = False) -> str | None:
    """Return what a file's tests stay together with: those that start services take turns.

    `one_by_one`: for tests of greedy tokens None, each goes by itself; the slow ones are few and long.
    """
    parts = PurePosixPath(path)
    if parts.name.startswith(GREEDY):
        return None if one_by_one else path
    return SERVICES if parts.parts[1] in SERVICE_FOLDERS else path
