"""Arrivals: pages that a FETCH brought into the arena, or found there, and no request has loaded yet.

Written by the Prefetcher, read by the HostTier, both in rank 0's step loop thread.
"""

from collections import OrderedDict
from collections.abc import Iterable
from typing import Literal

from cache_service.keys import PageKey
from cache_service.page_records import Location

SourceKind = Literal["peer", "remote"]
"""Where FETCH gets pages: another node's arena, or the remote store."""
Origin = Literal["device", "host", "peer", "remote"]
"""Where a request found a page of its prefix: in the pool, in the arena, or there because of a FETCH."""

MAX_ARRIVALS = 16_384


class Arrivals:
    """Where they lie and whence they came. The arena's own news of them may be late, or they may be gone."""

    def __init__(self) -> None:
        self._pages: OrderedDict[PageKey, tuple[Location, Origin]] = OrderedDict()

    def add(self, key: PageKey, location: Location, origin: Origin) -> None:
        """Note a page; the longest known are forgotten."""
        self._pages[key] = (location, origin)
        self._pages.move_to_end(key)
        if len(self._pages) > MAX_ARRIVALS:
            self._pages.popitem(last=False)

    def location(self, key: PageKey) -> Location | None:
        """Return where a page was put."""
        page = self._pages.get(key)
        return None if page is None else page[0]

    def take_origin(self, key: PageKey) -> Origin:
        """Return whence a page comes that is loaded; from now on it is the arena's like any other."""
        page = self._pages.pop(key, None)
        return "host" if page is None else page[1]

    def forget(self, keys: Iterable[PageKey]) -> None:
        """Leave pages to the arena's own news: they left it, or were not where they were put."""
        for key in keys:
            self._pages.pop(key, None)
