"""Pings: asks actors whether they live, without ever waiting for one. Used by the launcher, in its thread."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayError, RayTaskError

Handle = Any
"""Of an actor: Ray makes its methods at run time. Results are typed where they are awaited."""

MAX_SILENT_ROUNDS = 60
"""Of a second each. Rounds, not seconds: a launcher that was itself suspended has not listened meanwhile."""


@dataclass(frozen=True)
class Member:
    """One actor of the service."""

    name: str
    actor: Handle


@dataclass
class _Ping:
    answer: Any
    """Ray's reference."""
    num_rounds: int = 0
    """How often there was no answer."""


class Pings:
    """Keeps one ping under way for each actor.

    `wait` and `get` are ray's. An actor is lost when Ray says so, when it says so itself, or when it leaves
    one ping unanswered for `max_silent_rounds`.
    """

    def __init__(
        self,
        wait: Callable[..., tuple[list[Any], list[Any]]],
        get: Callable[[Any], Any],
        *,
        max_silent_rounds: int = MAX_SILENT_ROUNDS,
    ) -> None:
        self._wait = wait
        self._get = get
        self._max_silent_rounds = max_silent_rounds
        self._pings: dict[str, _Ping] = {}

    def lost(self, members: Sequence[Member]) -> dict[str, str]:
        """Look at the answers so far, ask again who has answered; return why who is lost, by name.

        Who is left out is forgotten: under its name another actor may come.
        """
        self._pings = {
            member.name: self._pings[member.name] for member in members if member.name in self._pings
        }
        for member in members:
            if member.name not in self._pings:
                self._pings[member.name] = _Ping(member.actor.ping.remote())
        refs = [self._pings[member.name].answer for member in members]
        answered = set(self._wait(refs, num_returns=len(refs), timeout=0)[0]) if refs else set()
        found: dict[str, str] = {}
        for member in members:
            ping = self._pings[member.name]
            if ping.answer in answered:
                del self._pings[member.name]
                why = self._complaint(ping)
            else:
                ping.num_rounds += 1
                is_silent = ping.num_rounds >= self._max_silent_rounds
                why = f"no answer in {ping.num_rounds} rounds" if is_silent else None
            if why is not None:
                found[member.name] = why
        return found

    def _complaint(self, ping: _Ping) -> str | None:
        try:
            is_well = bool(self._get(ping.answer))
        except RayError as error:
            return f"{type(error).__name__}: its process is gone or failed"
        return None if is_well else "it does not do its work any more"


def failure_of(error: RayError) -> str:
    """Return why a call failed: the actor's own words, where it had any."""
    if isinstance(error, RayTaskError):
        return str(error.cause)
    return f"an actor died while it started: {str(error).strip().splitlines()[0]}"
