"""What an arena's slot headers say after its server died: which pages can be read, which grants are open."""

from collections.abc import Collection, Iterator
from typing import NamedTuple

import numpy
from numpy.typing import NDArray

from cache_service import arena_format
from cache_service.arena import Arena
from cache_service.arena_format import SlotState
from cache_service.keys import KEY_BYTES, PageKey


class FoundPage(NamedTuple):
    """A page that a former server left readable."""

    slot: int
    epoch: int
    key: PageKey
    parent: PageKey | None
    tenant: int


def found_pages(arena: Arena) -> Iterator[FoundPage]:
    """Yield the pages whose headers are whole and whose parents were yielded before; each key once."""
    by_parent: dict[bytes, list[FoundPage]] = {}
    headers = arena.headers[: arena.num_usable_slots]
    is_page = (_states(headers) == SlotState.READY) & (_epochs(headers) % 2 == 0) & _is_ours(arena)
    slots = numpy.flatnonzero(is_page)
    found = headers[slots]
    keys, parents = found["key"].tobytes(), found["parent"].tobytes()
    numbers = zip(slots.tolist(), _epochs(found).tolist(), found["tenant"].tolist(), strict=True)
    for index, (slot, epoch, tenant) in enumerate(numbers):
        place = slice(index * KEY_BYTES, (index + 1) * KEY_BYTES)
        parent = None if parents[place] == arena_format.NO_PARENT else PageKey(parents[place])
        page = FoundPage(slot, epoch, PageKey(keys[place]), parent, tenant)
        by_parent.setdefault(parents[place], []).append(page)
    seen: set[PageKey] = set()
    waiting = by_parent.get(arena_format.NO_PARENT, [])
    while waiting:
        continued: list[FoundPage] = []
        for page in waiting:
            if page.key not in seen:
                seen.add(page.key)
                yield page
                continued += by_parent.get(page.key, [])
        waiting = continued


def open_grants(arena: Arena, live_groups: Collection[int]) -> list[tuple[int, int]]:
    """Return (slot, group) of the slots that a live group may still be writing."""
    headers = arena.headers[: arena.num_usable_slots]
    is_open = (_states(headers) == SlotState.WRITING) & (_epochs(headers) % 2 == 1) & _is_ours(arena)
    is_open &= numpy.isin(headers["group"], list(live_groups))
    slots = numpy.flatnonzero(is_open)
    return list(zip(slots.tolist(), headers["group"][slots].tolist(), strict=True))


def free_the_rest(arena: Arena, taken: Collection[int]) -> tuple[list[int], set[int]]:
    """End whatever was under way in the slots that nobody took over.

    Returns the slots that are FREE now, and those that readers still hold, which are EVICTING.
    """
    headers = arena.headers[: arena.num_usable_slots]
    is_rest = numpy.ones(len(headers), dtype=bool)
    is_rest[list(taken)] = False
    epochs = _epochs(headers)
    stamps = (epochs + epochs % 2) << arena_format.STATE_BITS  # even: nothing is written now
    headers["stamp"][is_rest] = stamps[is_rest] | int(SlotState.EVICTING)
    arena.fence()
    is_leased = arena.leases[:, : len(headers)].any(axis=0) & arena.safety.leases
    headers["stamp"][is_rest & ~is_leased] = stamps[is_rest & ~is_leased] | int(SlotState.FREE)
    free, draining = numpy.flatnonzero(is_rest & ~is_leased), numpy.flatnonzero(is_rest & is_leased)
    return list(free.tolist()), set(draining.tolist())


def _is_ours(arena: Arena) -> NDArray[numpy.bool_]:
    headers = arena.headers[: arena.num_usable_slots]
    has_magic: NDArray[numpy.bool_] = headers["magic"] == arena_format.SLOT_MAGIC
    has_layout: NDArray[numpy.bool_] = headers["layout"] == arena.spec.layout_word
    return has_magic & has_layout


def _states(headers: NDArray[numpy.void]) -> NDArray[numpy.uint64]:
    states: NDArray[numpy.uint64] = headers["stamp"] & numpy.uint64(arena_format.STATE_MASK)
    return states


def _epochs(headers: NDArray[numpy.void]) -> NDArray[numpy.uint64]:
    epochs: NDArray[numpy.uint64] = headers["stamp"] >> numpy.uint64(arena_format.STATE_BITS)
    return epochs
