"""RelocationFollower: applies an owner's changes in order, whatever the wire does to them, and asks for help.

Pure: no sockets, time is an argument. Called by the one thread that hears the owner; its listener may be
read by others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from cache_service.relocation import Changes, Snapshot, Version
from cache_service.relocation_records import Change, Standing

MAX_PENDING = 1_024
PATIENCE_S = 0.05
"""How long a broadcast may lag behind a reply before it counts as lost."""


class RelocationListener(Protocol):
    """Who keeps what an owner tells. Called in the follower's thread, in the owner's order."""

    def restart(self, stored: Sequence[Standing]) -> None:
        """Forget everything; this is what is stored now."""

    def apply(self, changes: Sequence[Change]) -> None:
        """Take the next changes."""


@dataclass(frozen=True)
class FollowerSafety:
    """What keeps a replica true. No configuration reaches it: tests switch one off and see a check fire."""

    gaps: bool = True
    """Changes after a gap wait until those before them are there."""
    incarnations: bool = True
    """Another incarnation's changes are not applied to this one's state."""
    duplicates: bool = True
    """What is applied already is not applied again."""
    heartbeats: bool = True
    """A heartbeat, or a reply, ahead of what is applied tells that the last changes were lost."""
    snapshots: bool = True
    """A snapshot older than what is applied is dropped."""
    tickets: bool = True
    """A reply to an older question than the last answered one is dropped."""


ALL_ON = FollowerSafety()


@dataclass(frozen=True)
class ResyncTicket:
    """One question to the owner: which it is, and how many broadcasts had been heard when it was asked."""

    number: int
    num_heard: int


@dataclass
class FollowerStats:
    """Counters since the start."""

    num_changes: int = 0
    num_duplicates: int = 0
    """Broadcasts that said nothing new, heartbeats excepted."""
    num_gaps: int = 0
    num_restarts: int = 0
    """Incarnations seen after the first."""
    num_resyncs: int = 0
    num_snapshots: int = 0
    """Of the resyncs, those by snapshot."""
    num_dropped: int = 0
    """Broadcasts thrown away while waiting for a resync: too many, or of a dead incarnation."""


class RelocationFollower:
    """Follows one owner. While `needs_resync` is true, ask the owner: `begin_resync`, then `resynced`.

    A new follower needs a resync. Broadcasts may be received while the question is under way.
    """

    def __init__(
        self,
        listener: RelocationListener,
        *,
        patience_s: float = PATIENCE_S,
        max_pending: int = MAX_PENDING,
        safety: FollowerSafety = ALL_ON,
    ) -> None:
        self._listener = listener
        self._patience_s = patience_s
        self._max_pending = max_pending
        self._safety = safety
        self._applied: Version | None = None
        self._newest: Version | None = None
        self._behind_since_s: float | None = None
        self._heard_s: float | None = None
        self._pending: list[tuple[int, Changes]] = []  # (its number among all heard, the broadcast)
        self._num_heard = 0
        self._num_tickets = 0
        self._last_answered = 0
        self.stats = FollowerStats()

    @property
    def applied(self) -> Version | None:
        """The version of the listener's state; None before the first resync."""
        return self._applied

    @property
    def lag(self) -> int | None:
        """How many changes are known to be missing; None: another incarnation, or none yet, nobody knows."""
        applied, newest = self._applied, self._newest  # as they are now: others read this too
        if applied is None:
            return None
        if newest is None:
            return 0
        if newest.incarnation != applied.incarnation:
            return None
        return max(newest.counter - applied.counter, 0)

    def silence_s(self, now_s: float) -> float | None:
        """Return how long ago the owner was last heard; None: never."""
        return None if self._heard_s is None else now_s - self._heard_s

    def needs_resync(self, now_s: float) -> bool:
        """Tell whether something is missing that will not come by itself."""
        if self._applied is None or self._pending:
            return True
        return self._behind_since_s is not None and now_s - self._behind_since_s > self._patience_s

    def receive(self, changes: Changes, now_s: float) -> None:
        """Take a broadcast: apply it, or keep it until what is before it has come."""
        self._heard_s = now_s
        self._num_heard += 1
        applied = self._applied
        if applied is None or (self._safety.incarnations and changes.incarnation != applied.incarnation):
            self._keep(changes)
        elif changes.changes:
            self._take(changes)
        self.saw(Version(changes.incarnation, changes.counter), now_s)

    def saw(self, version: Version, now_s: float) -> None:
        """Take the version that a reply of the owner repeats: ahead of what is applied, it shows the lag."""
        if not self._safety.heartbeats:
            return
        newest = self._newest
        if newest is None or version.incarnation != newest.incarnation or version.counter > newest.counter:
            self._newest = version
        self._see_lag(now_s)

    def begin_resync(self) -> ResyncTicket:
        """Note that the owner is about to be asked for all after `applied`."""
        self._num_tickets += 1
        return ResyncTicket(self._num_tickets, self._num_heard)

    def resynced(self, reply: Changes | Snapshot, ticket: ResyncTicket, now_s: float) -> None:
        """Take the owner's answer to the question of `ticket`."""
        if self._safety.tickets and ticket.number <= self._last_answered:
            return
        self._heard_s = now_s
        self._last_answered = ticket.number
        self.stats.num_resyncs += 1
        if isinstance(reply, Snapshot):
            self._restart(reply)
        elif self._applied is not None and self._is_news(reply, self._applied):
            self._take(reply)
        if self._applied is None:
            return
        # The owner has spoken: what was heard of other incarnations before it was asked is of dead ones.
        incarnation = self._applied.incarnation
        alive = [
            (number, changes)
            for number, changes in self._pending
            if changes.incarnation == incarnation or number > ticket.num_heard
        ]
        self.stats.num_dropped += len(self._pending) - len(alive)
        self._pending = alive
        self._take_pending()
        if self._newest is not None and self._newest.incarnation != incarnation:
            self._newest = None
        self._see_lag(now_s)

    @staticmethod
    def _is_news(reply: Changes, applied: Version) -> bool:
        """Tell it from an answer that broadcasts have overtaken, and from one of a dead incarnation."""
        return reply.incarnation == applied.incarnation and reply.counter > applied.counter

    def _restart(self, snapshot: Snapshot) -> None:
        applied, version = self._applied, snapshot.version
        if applied is not None and applied.incarnation == version.incarnation:
            if self._safety.snapshots and version.counter < applied.counter:
                return  # broadcasts have overtaken it
        elif applied is not None:
            self.stats.num_restarts += 1
        self.stats.num_snapshots += 1
        self._listener.restart(snapshot.standing())
        self._applied = version

    def _take(self, changes: Changes) -> None:
        """Apply what is new of changes of this incarnation, or keep them behind their gap."""
        assert self._applied is not None
        counter = self._applied.counter
        if changes.counter <= counter and self._safety.duplicates:
            self.stats.num_duplicates += 1
            return
        if changes.first_counter > counter and self._safety.gaps:
            self.stats.num_gaps += 1
            self._keep(changes)
            return
        self._apply(changes)
        self._take_pending()

    def _apply(self, changes: Changes) -> None:
        assert self._applied is not None
        counter = self._applied.counter
        #   first_counter ....... counter ....... changes.counter
        #            applied already        new
        num_known = max(counter - changes.first_counter, 0) if self._safety.duplicates else 0
        new = changes.changes[num_known:]
        self._listener.apply(new)
        self.stats.num_changes += len(new)
        self._applied = Version(self._applied.incarnation, max(changes.counter, counter))

    def _keep(self, changes: Changes) -> None:
        self._pending.append((self._num_heard, changes))
        if len(self._pending) > self._max_pending:
            del self._pending[0]
            self.stats.num_dropped += 1

    def _take_pending(self) -> None:
        """Apply what no longer has a gap before it; forget what is applied."""
        if not self._pending or self._applied is None:
            return
        waiting, self._pending = self._pending, []
        waiting.sort(key=lambda pair: pair[1].first_counter)
        for number, changes in waiting:
            applied = self._applied
            if changes.incarnation != applied.incarnation or changes.first_counter > applied.counter:
                self._pending.append((number, changes))
            elif changes.counter > applied.counter:
                self._apply(changes)

    def _see_lag(self, now_s: float) -> None:
        applied, newest = self._applied, self._newest
        is_behind = (
            applied is not None
            and newest is not None
            and (newest.incarnation != applied.incarnation or newest.counter > applied.counter)
        )
        if not is_behind:
            self._behind_since_s = None
        elif self._behind_since_s is None:
            self._behind_since_s = now_s
