"""Supervisor: watches the replicas; one that loses a rank is torn down whole and started again in its place.

Part of the Launcher, in its thread. It counts rounds, of a second each: a launcher that was itself suspended
has not looked meanwhile. Requests that ran on a lost replica end with an error; caches are found again.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from cluster.pings import Member, Pings
from cluster.replica_actors import ReplicaStarted, ReplicaStartError
from workers.protocol import ReplicaId

logger = logging.getLogger(__name__)

STEADY_ROUNDS = 300
"""A replica that has served for so long has its restarts back."""
MAX_PAUSE_ROUNDS = 60


class Actors(Protocol):
    """What is kept of one incarnation; cluster.replica_actors.ReplicaActors."""

    @property
    def members(self) -> Sequence[Member]:
        """Its ranks."""
        ...

    @property
    def may_be_stopped(self) -> bool:
        """Whether the ranks have begun."""
        ...

    def poll(self) -> ReplicaStarted | None:
        """Go on with the start; return what serves in the end. Raise ReplicaStartError."""
        ...

    def kill(self) -> None:
        """End every rank."""


class ReplicaNews(Protocol):
    """Who has to know where replicas are: the API servers."""

    def lost(self, replica_id: ReplicaId, why: str) -> None:
        """Take a replica out until it serves again; `why` is fit for the user."""

    def serves(self, replica_id: ReplicaId, started: ReplicaStarted) -> None:
        """Take a restarted replica in."""


@dataclass
class _Kept:
    """One replica."""

    actors: Actors | None
    """None while it pauses or is down."""
    state: Literal["starting", "serving", "pausing", "down"] = "starting"
    num_rounds: int = 0
    """In this state."""
    num_restarts: int = 0
    """In a row."""
    why: str = ""
    """It was lost, or its last start failed."""

    def enter(self, state: Literal["starting", "serving", "pausing", "down"]) -> None:
        self.state, self.num_rounds = state, 0


class Supervisor:
    """`start` begins a replica's next incarnation, `max_start_rounds` is what that gets.

    A lost replica is started again at once, after failures in a row after 2, 4, 8 ... rounds, and stays down
    after `max_restarts` in a row.
    """

    def __init__(
        self,
        start: Callable[[ReplicaId], Actors],
        news: ReplicaNews,
        pings: Pings,
        *,
        max_restarts: int,
        max_start_rounds: int,
    ) -> None:
        self._start = start
        self._news = news
        self._pings = pings
        self._max_restarts = max_restarts
        self._max_start_rounds = max_start_rounds
        self._replicas: dict[ReplicaId, _Kept] = {}

    @property
    def actors(self) -> list[Actors]:
        """All incarnations that are not known to be dead."""
        return [kept.actors for kept in self._replicas.values() if kept.actors is not None]

    def add(self, replica_id: ReplicaId, actors: Actors) -> None:
        """Take a replica whose first start is under way; the caller polls it, then tells `serving`."""
        self._replicas[replica_id] = _Kept(actors)

    def serving(self) -> None:
        """Note that the first start of all replicas has succeeded: from now on `keep` keeps them."""
        for kept in self._replicas.values():
            kept.enter("serving")

    def failure(self) -> str | None:
        """Return why no replica is left, None while one serves or may serve again."""
        if any(kept.state != "down" for kept in self._replicas.values()):
            return None
        return "; ".join(f"{replica_id}: {kept.why}" for replica_id, kept in self._replicas.items())

    def keep(self) -> None:
        """Look for lost replicas, go on with their restarts. Never blocks: call it every second."""
        serving = [kept.actors for kept in self._replicas.values() if kept.state == "serving" and kept.actors]
        lost = self._pings.lost([member for actors in serving for member in actors.members])
        for name, why in lost.items():
            logger.error("lost an actor", extra={"actor": name, "why": why})
        for replica_id, kept in self._replicas.items():
            kept.num_rounds += 1
            if kept.state == "serving":
                self._look(replica_id, kept, lost)
            elif kept.state == "starting":
                self._go_on(replica_id, kept)
            elif kept.state == "pausing" and kept.num_rounds >= _pause_rounds(kept.num_restarts):
                self._restart(replica_id, kept)

    def _look(self, replica_id: ReplicaId, kept: _Kept, lost: dict[str, str]) -> None:
        assert kept.actors is not None
        whys = [
            f"{member.name.removeprefix(f'{replica_id} ')}: {lost[member.name]}"
            for member in kept.actors.members
            if member.name in lost
        ]
        if whys:
            self._lose(replica_id, kept, "; ".join(whys))
        elif kept.num_rounds >= STEADY_ROUNDS:
            kept.num_restarts = 0

    def _go_on(self, replica_id: ReplicaId, kept: _Kept) -> None:
        assert kept.actors is not None
        try:
            started = kept.actors.poll()
        except ReplicaStartError as error:
            self._lose(replica_id, kept, f"its start failed: {error}")
            return
        if started is not None:
            kept.enter("serving")
            logger.info("a replica serves again", extra={"replica": replica_id})
            self._news.serves(replica_id, started)
        elif kept.num_rounds > self._max_start_rounds:
            self._lose(replica_id, kept, f"its start took over {self._max_start_rounds} s")

    def _lose(self, replica_id: ReplicaId, kept: _Kept, why: str) -> None:
        """Tear the group down and decide what becomes of the replica."""
        assert kept.actors is not None
        kept.actors.kill()
        kept.actors = None
        kept.why = why
        if kept.num_restarts >= self._max_restarts:
            kept.enter("down")
            told = f"it stays down after {kept.num_restarts} restarts in a row ({why})"
        else:
            kept.enter("pausing")
            told = f"it is being restarted ({why})"
        extra = {"replica": replica_id, "restarts": kept.num_restarts, "why": why}
        logger.error("a replica stays down" if kept.state == "down" else "lost a replica", extra=extra)
        self._news.lost(replica_id, told)
        if kept.state == "pausing" and _pause_rounds(kept.num_restarts) == 0:
            self._restart(replica_id, kept)

    def _restart(self, replica_id: ReplicaId, kept: _Kept) -> None:
        kept.num_restarts += 1
        logger.info("restarting a replica", extra={"replica": replica_id, "restarts": kept.num_restarts})
        kept.actors = self._start(replica_id)
        kept.enter("starting")


def _pause_rounds(num_restarts: int) -> int:
    """Return how long to wait after so many restarts in a row."""
    return min(2**num_restarts, MAX_PAUSE_ROUNDS) if num_restarts else 0
