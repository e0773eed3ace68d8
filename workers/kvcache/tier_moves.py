"""Save and Load: a HostTier's moves under way, and what it tells of those that are over."""

from dataclasses import dataclass, field
from typing import Literal

from cache_service.page_records import Grant, Location
from workers.kvcache.radix_cache import Node


@dataclass(slots=True, eq=False)
class Save:
    """A page on its way into a granted slot. Its page is leased until every rank is done with it."""

    move: int
    node: Node
    grant: Grant
    is_leaving: bool = False
    """The page is to be evicted once it is saved."""


@dataclass(slots=True, eq=False)
class Load:
    """A page on its way out of a leased slot. Page and slot are leased until every rank is done with them."""

    move: int
    node: Node
    location: Location
    outcome: Literal["unknown", "readable", "failed"] = "unknown"
    """What was told of its node."""


@dataclass(frozen=True, slots=True)
class Settled:
    """What has come of loads since the last call."""

    readable: list[Node] = field(default_factory=list)
    """Verified on every rank; whatever reads them from now on comes after their copies (I5)."""
    failed: list[Node] = field(default_factory=list)
    """Not loaded: whoever is on them has to compute them."""
