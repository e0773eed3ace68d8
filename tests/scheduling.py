"""How tests are dealt out to several processes: asked by conftest.py when xdist is there."""

from xdist.scheduler import LoadScopeScheduling

from tests.scopes import scope_of


class Scheduling(LoadScopeScheduling):
    """Keeps together what scopes.py says."""

    def _split_scope(self, nodeid: str) -> str:
        is_slow = self.config.getoption("markexpr").startswith(("slow", "long"))
        return scope_of(nodeid.partition("::")[0], one_by_one=is_slow) or nodeid
