"""PagePool: which pages are free, owned or quiescing, and under which generation.

Owned by the KVCacheManager in rank 0's step loop thread. Plain ints and lists; it never sees a page's bytes.

    FREE --allocate--> OWNED --last lease released--> QUIESCING --step completed on every rank--> FREE
"""

from dataclasses import dataclass
from enum import IntEnum


class PageState(IntEnum):
    """Where a page stands in its life (I2)."""

    FREE = 0
    OWNED = 1
    QUIESCING = 2


@dataclass(frozen=True)
class Safety:
    """What keeps pages safe. No configuration reaches it: tests switch one off and see a check fire."""

    leases: bool = True
    """A page is held until its last holder releases it."""
    generations: bool = True
    """A page handed out again is told from its former self."""
    fences: bool = True
    """A released page is not free before the steps that touch it are complete on every rank."""
    reservations: bool = True
    """The pages a step can need are owned before the step."""
    reserves_ahead: bool = True
    """They count the tokens that steps in flight are sampling (I4)."""
    voids_rows: bool = True
    """What a step brings for a request that has lost its slot since is void, though it has one again."""
    versions: bool = True
    """A step's output is taken only under the plan's relocation version."""
    save_leases: bool = True
    """The page of a SAVE is held until every rank is done with it (I6)."""
    load_leases: bool = True
    """The page of a LOAD is held until every rank is done with it, whatever came of it on one."""
    awaits_loads: bool = True
    """A request is planned once the LOADs of its pages are enqueued on every rank (I5)."""
    awaits_verdicts: bool = True
    """What a row made counts once the LOADs of all that it read are known to be good (I7)."""
    rolls_back: bool = True
    """Who is on a page whose LOAD failed computes it anew (I7)."""
    commits_in_order: bool = True
    """A SAVE that is over waits for those before it: its parent's may be one of them."""
    busy_stays: bool = True
    """A page is not evicted before its SAVE or LOAD is over (I11)."""
    counts_losses: bool = True
    """A page that leaves the device without a copy is counted (I11)."""
    awaits_fetches: bool = True
    """A request waits for its FETCH as its prefetch policy says."""
    fetch_deadlines: bool = True
    """Nobody waits for a FETCH beyond its deadline (I10)."""
    weighs_fetches: bool = True
    """Pages are fetched only where that takes less time than computing them (I10)."""


class PagePool:
    """Pages 1 .. num_pages; page 0 is the dummy page, never handed out. Every operation is O(1) a page."""

    def __init__(self, num_pages: int, safety: Safety | None = None) -> None:
        self.num_pages = num_pages
        self._safety = safety or Safety()
        self._states = [PageState.FREE] * (num_pages + 1)
        self._generations = [0] * (num_pages + 1)
        self._leases = [0] * (num_pages + 1)
        self._last_steps = [0] * (
            num_pages + 1
        )  # the last planned step that may touch the page; steps count from 1
        self._free = list(range(num_pages, 0, -1))
        self._quiescing: dict[int, list[int]] = {}  # last step -> pages
        self._num_quiescing = 0
        self._completed_step = 0
        self._freed: list[int] = []  # became FREE since take_freed

    @property
    def num_free(self) -> int:
        """Pages that can be allocated now; quiescing pages are not among them."""
        return len(self._free)

    @property
    def num_quiescing(self) -> int:
        """Pages nobody holds that some rank may still read or write."""
        return self._num_quiescing

    @property
    def num_owned(self) -> int:
        """Pages with at least one lease."""
        return self.num_pages - len(self._free) - self._num_quiescing

    def state(self, page: int) -> PageState:
        """Return where the page stands."""
        return self._states[page]

    def generation(self, page: int) -> int:
        """Return how often the page has been handed out."""
        return self._generations[page]

    def num_leases(self, page: int) -> int:
        """Return how many holders the page has."""
        return self._leases[page]

    def is_idle(self, page: int) -> bool:
        """Tell whether every step that its former holders were planned in is complete on every rank."""
        return self._last_steps[page] <= self._completed_step

    def allocate(self, num_pages: int) -> list[int]:
        """Hand out free pages, each under a new generation and with one lease, the caller's."""
        assert 0 < num_pages <= len(self._free), f"{num_pages} pages asked for, {len(self._free)} are free"
        pages = self._free[-num_pages:]
        del self._free[-num_pages:]
        for page in pages:
            self._states[page] = PageState.OWNED
            self._leases[page] = 1
            if self._safety.generations or self._generations[page] == 0:
                self._generations[page] += 1
        return pages

    def lease(self, page: int) -> None:
        """Hold an owned page once more."""
        assert self._states[page] is PageState.OWNED, f"page {page} is {self._states[page].name}, not OWNED"
        if self._safety.leases:
            self._leases[page] += 1

    def release(self, page: int, last_step: int = 0) -> None:
        """Give one lease back. `last_step` is the last planned step that may touch the page on its behalf.

        After the last lease the page quiesces until that step is complete on every rank.
        """
        assert self._states[page] is PageState.OWNED, f"page {page} is {self._states[page].name}, not OWNED"
        self._last_steps[page] = max(self._last_steps[page], last_step)
        self._leases[page] -= 1
        if self._leases[page] > 0:
            return
        if self.is_idle(page) or not self._safety.fences:
            self._free_page(page)
        else:
            self._states[page] = PageState.QUIESCING
            self._quiescing.setdefault(self._last_steps[page], []).append(page)
            self._num_quiescing += 1

    def completed(self, step: int) -> None:
        """Free what quiesced up to `step`: the minimum over all ranks of the steps they have completed."""
        for done in range(self._completed_step + 1, step + 1):
            for page in self._quiescing.pop(done, ()):
                self._num_quiescing -= 1
                self._free_page(page)
        self._completed_step = max(self._completed_step, step)

    def take_freed(self) -> list[int]:
        """Return the pages that became FREE since the last call; the ranks are told before any reuse."""
        freed, self._freed = self._freed, []
        return freed

    def held(self) -> list[tuple[int, str, int, int]]:
        """Return page, state, generation and number of leases of every page that is not free."""
        return [
            (page, PageState(state).name, self._generations[page], self._leases[page])
            for page, state in enumerate(self._states)
            if page and state is not PageState.FREE
        ]

    def check(self) -> None:
        """Prove free + owned + quiescing == total, and each page's state by its leases and lists."""
        free, quiescing = set(self._free), [page for pages in self._quiescing.values() for page in pages]
        assert len(free) == len(self._free), "a page is twice on the free list"
        assert len(quiescing) == len(set(quiescing)) == self._num_quiescing, "a page quiesces twice"
        owned = [page for page in range(1, self.num_pages + 1) if self._leases[page] > 0]
        assert len(free) + len(owned) + len(quiescing) == self.num_pages, (
            f"free {len(free)} + owned {len(owned)} + quiescing {len(quiescing)} != total {self.num_pages}"
        )
        for pages, state in (
            (free, PageState.FREE),
            (owned, PageState.OWNED),
            (quiescing, PageState.QUIESCING),
        ):
            for page in pages:
                assert self._states[page] is state, (
                    f"page {page} is {self._states[page].name}, not {state.name}"
                )
        assert 0 not in free and self._leases[0] == 0, "the dummy page is in the pool"
        assert all(fence > self._completed_step for fence in self._quiescing), "a page quiesces for nothing"

    def _free_page(self, page: int) -> None:
        self._states[page] = PageState.FREE
        self._free.append(page)
        self._freed.append(page)
