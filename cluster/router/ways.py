"""The ways a replica can have a prompt's KV, held, copied or computed, and their prices.

Pure; called on the event loop.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from workers.protocol import FetchHint, LoadReport

MAX_HINTS = 3
"""With one request."""
FIRST_LOAD_PAGE_S = 1e-4
"""Until a worker tells its own: a page of 1 MiB, verified and copied within a node at 10 GB/s."""
FIRST_PEER_PAGE_S = 6e-4
"""The same page over TCP between two arenas, at 1.8 GB/s."""
FIRST_REMOTE_PAGE_S = 1e-3
"""The same page from a remote store: over the same wire, after looking it up."""
PEER_LATENCY_S = 0.005
"""Of a fetch, however small; nobody measures it. The workers reckon with the same."""
REMOTE_LATENCY_S = 0.02


@dataclass(frozen=True)
class PageTimes:
    """Seconds that a page takes on its way to a replica's device."""

    load_s: float = FIRST_LOAD_PAGE_S
    """From its node's arena."""
    peer_s: float = FIRST_PEER_PAGE_S
    """From a peer's arena into its node's."""
    remote_s: float = FIRST_REMOTE_PAGE_S
    """From the remote store into its node's arena."""

    @staticmethod
    def measured(report: LoadReport) -> "PageTimes":
        """Return what a replica measured; what it has not yet, as first guessed."""
        return PageTimes(
            FIRST_LOAD_PAGE_S if report.load_page_s is None else report.load_page_s,
            FIRST_PEER_PAGE_S if report.peer_page_s is None else report.peer_page_s,
            FIRST_REMOTE_PAGE_S if report.remote_page_s is None else report.remote_page_s,
        )

    def fetch_s(self, source: FetchHint, num_pages: int) -> float:
        """Return what it takes to fetch so many."""
        if source.peer is None:
            return REMOTE_LATENCY_S + num_pages * self.remote_s
        return PEER_LATENCY_S + num_pages * self.peer_s


@dataclass(frozen=True)
class Residence:
    """How many leading pages of a prompt are where, seen from one replica."""

    num_on_device: int = 0
    num_in_arena: int = 0
    """Of its own node, on the device or not."""
    elsewhere: Sequence[FetchHint] = ()
    """Sources that reach beyond device and arena."""

    @property
    def num_on_node(self) -> int:
        """Nothing has to be fetched for so many."""
        return max(self.num_on_device, self.num_in_arena)


@dataclass(frozen=True)
class Way:
    """Leading pages held or copied, the rest computed."""

    num_computed_tokens: int
    copy_s: float
    hint: FetchHint | None = None
    """What it fetches by."""

    def seconds(self, token_s: float) -> float:
        """Return what the request waits, all else aside."""
        return self.copy_s + self.num_computed_tokens * token_s


def ways(
    residence: Residence, prompt_len: int, page_size: int, token_s: float, times: PageTimes
) -> list[Way]:
    """Return all ways, the quickest first."""
    num_held = residence.num_on_device

    #   0 ..... num_in_arena ..... num_on_device ..... hint.num_pages
    #           fetched, to be children of those in the arena
    #                              loaded
    # or, as mostly,
    #   0 ..... num_on_device ..... num_in_arena ..... hint.num_pages
    #                               fetched
    #                 loaded
    def way(num_pages: int, fetch_s: float = 0.0, hint: FetchHint | None = None) -> Way:
        load_s = (num_pages - num_held) * times.load_s
        return Way(max(1, prompt_len - num_pages * page_size), fetch_s + load_s, hint)

    found = [way(num_held)]
    if residence.num_in_arena > num_held:
        found.append(way(residence.num_in_arena))
    for hint in residence.elsewhere:
        fetch_s = times.fetch_s(hint, hint.num_pages - residence.num_in_arena)
        found.append(way(hint.num_pages, fetch_s, hint))
    return sorted(found, key=lambda way: way.seconds(token_s))


def hints(open_ways: Sequence[Way]) -> list[FetchHint]:
    """Return what the worker is told of a request's ways, best first. It weighs them itself."""
    return [way.hint for way in open_ways if way.hint is not None][:MAX_HINTS]
