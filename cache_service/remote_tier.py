"""RemoteTier: the remote store behind a node's arena: attached, detached, and back after a change of arena.

An ArenaUser; used by the CacheServer's thread. Stores are opened and closed in a thread of their own, where a
master that does not answer, or a disk that hangs, holds up nobody.
"""

import functools
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from cache_service.arena_user import ArenaAccess
from cache_service.attached_store import AttachedStore
from cache_service.inbox import Inbox
from cache_service.keys import PageKey
from cache_service.put_queue import PutLimits
from cache_service.relocation_records import ChangeSink
from cache_service.remote import RecordLayout, RemoteStore
from cache_service.remote_keys import RemoteKeys
from cache_service.store_address import (
    StoreAddress,
    StoreAddressError,
    StoreOpenError,
    open_store,
    parse_store_address,
)
from cache_service.task_threads import TaskThreads

logger = logging.getLogger(__name__)

MAX_KNOWN_RATIO = 4
"""Pages known to be in the store, by the arena's slots,"""
MAX_KNOWN = 65_536
"""and at most."""
OPEN_TIMEOUT_S = 25.0
CLOSE_TIMEOUT_S = 5.0
RETRY_S = 10.0
MAX_SILENCE_S = 300.0
"""The same failure is told again after `RETRY_S`, then after twice as long, and so on up to this."""
END_S = 2.0
"""How long the end of an arena waits for its store."""

Told = Callable[[str | None], None]
"""Hears, in the server's thread, why something was refused, or None: it is done."""


class OpenStore(Protocol):
    """Opens a store, as store_address.open_store does."""

    def __call__(
        self, address: StoreAddress, layout: RecordLayout, memory: memoryview, node: str
    ) -> RemoteStore:
        """Return the store; raise StoreOpenError. In a thread where it may block."""
        ...


@dataclass(eq=False)
class _Opening:
    """A store that is being opened, for whom, and until when."""

    text: str
    access: ArenaAccess
    deadline_s: float
    told: Told | None
    """None: nobody waits; it is tried again."""


@dataclass(eq=False)
class _Closing:
    """A store that is being closed, and who waits for that until when."""

    deadline_s: float
    told: Told


class RemoteTier:
    """`address` is the configuration's: attached whenever there is an arena, tried again until that succeeds.

    One attached at run time takes its place once it is open, and a detach takes it away.
    `node` is this node's address, `changes` the relocation log; `counts` are the server's counters by (name,
    reason).
    """

    def __init__(
        self,
        address: str | None,
        node: str,
        inbox: Inbox,
        changes: ChangeSink,
        counts: Counter[tuple[str, str]],
        *,
        open_store: OpenStore = open_store,
        limits: PutLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._address = address
        self._node = node
        self._inbox = inbox
        self._changes = changes
        self._counts = counts
        self._open_store = open_store
        self._limits = limits or PutLimits()
        self._clock = clock
        self._threads = TaskThreads("store-setup", 1)
        self._access: ArenaAccess | None = None
        self._keys = RemoteKeys(0, changes)
        self._opening: _Opening | None = None
        self._retry_s: float | None = None
        self._why_not = ""
        self._silence_s, self._silent_until_s = RETRY_S, 0.0
        self._attached: AttachedStore | None = None
        self._former: list[AttachedStore] = []
        self._closings: list[_Closing] = []

    @property
    def address(self) -> str:
        """Of the store in use; empty: there is none."""
        return self._address or "" if self._attached is not None else ""

    @property
    def why_not(self) -> str:
        """Why the store that was wanted is not in use; empty: it is, or none is wanted."""
        return self._why_not if self._attached is None else ""

    @property
    def source(self) -> AttachedStore | None:
        """Where the Fetcher gets pages from."""
        return self._attached

    @property
    def num_known(self) -> int:
        """Pages that the store is known to have."""
        return len(self._keys)

    @property
    def num_waiting(self) -> int:
        """Pages that wait to be put."""
        return self._attached.num_waiting if self._attached is not None else 0

    def known_keys(self) -> Iterator[PageKey]:
        """Yield the pages that the store is known to have, for snapshots."""
        return iter(self._keys)

    def offer(self, keys: Sequence[PageKey]) -> None:
        """Have pages put that workers have committed."""
        if self._attached is not None:
            self._attached.offer(keys)

    def begin(self, access: ArenaAccess) -> None:
        """See ArenaUser."""
        self._access = access
        if self._address is not None:
            self._open(self._address, access, None)

    def end(self) -> bool:
        """See ArenaUser."""
        self._give_up("the node's arena was given up")
        self._access = None
        end_s = time.monotonic() + END_S
        attached = self._take_attached()
        if attached is not None:
            self._close(attached.store, END_S)
        former, self._former = self._former, []
        return all(store.wait_until_quiet(max(0.0, end_s - time.monotonic())) for store in former)

    def close(self, timeout_s: float) -> bool:
        """End the thread; False where a store keeps it. After `end`."""
        return self._threads.close(timeout_s)

    def attach(self, text: str, told: Told) -> None:
        """Use the store at an address instead of the present one; `told` hears of it in time.

        The present one is closed first, as both may be one folder. Where the other cannot be opened, it is
        opened again.
        """
        try:
            parse_store_address(text)
        except StoreAddressError as error:
            told(str(error))
            return
        access = self._access
        if access is None:
            told(
                "no worker has attached to this node's cache yet, so it has no pages; attach the store later"
            )
            return
        self._give_up("another store was to be attached, or none")
        self._detach(None)
        self._open(text, access, told)

    def detach(self, told: Told) -> None:
        """Use no store any more; `told` hears once it is closed, or was given the time for it."""
        self._give_up("the store was detached")
        self._address, self._why_not = None, ""
        self._detach(told)

    def tick(self, now_s: float) -> bool:
        """Do what is due; tell whether there is more at once."""
        if self._opening is not None and now_s >= self._opening.deadline_s:
            self._failed(self._opening, f"the store was not open within {OPEN_TIMEOUT_S:g} s; it may hang")
        if self._retry_s is not None and now_s >= self._retry_s and self._access is not None:
            assert self._address is not None
            self._open(self._address, self._access, None)
        for closing in [closing for closing in self._closings if now_s >= closing.deadline_s]:
            self._closed(closing)  # its calls have failed; only their thread is there still
        self._former = [store for store in self._former if not store.wait_until_quiet(0.0)]
        return self._attached.tick() if self._attached is not None else False

    def _open(self, text: str, access: ArenaAccess, told: Told | None) -> None:
        self._retry_s = None
        opening = _Opening(text, access, self._clock() + OPEN_TIMEOUT_S, told)
        self._opening = opening

        def work() -> None:
            if self._opening is not opening:  # another task took too long
                return
            try:
                store = self._open_store(
                    parse_store_address(text), access.layout, access.arena.pages(), self._node
                )
            except StoreOpenError as error:
                self._inbox.put(functools.partial(self._failed, opening, str(error)))
                return
            if self._opening is not opening:  # it is wanted no more
                self._close(store, CLOSE_TIMEOUT_S)
            else:
                listed = store.known_keys()
                self._inbox.put(lambda: self._opened(opening, store, listed))

        self._threads.run(work)

    def _opened(self, opening: _Opening, store: RemoteStore, listed: list[PageKey]) -> None:
        if self._opening is not opening:  # since a moment
            self._threads.run(lambda: self._close(store, CLOSE_TIMEOUT_S))
            return
        self._opening, self._address, self._why_not = None, opening.text, ""
        max_keys = min(MAX_KNOWN_RATIO * opening.access.arena.spec.num_slots, MAX_KNOWN)
        self._keys = RemoteKeys(max_keys, self._changes)
        self._attached = AttachedStore(
            store,
            listed[-max_keys:],
            opening.access,
            self._keys,
            self._inbox,
            self._counts,
            self._limits,
            self._clock,
        )
        self._counts["stores", "attached"] += 1
        logger.info("a remote store is attached", extra={"store": opening.text, "pages": len(listed)})
        if opening.told is not None:
            opening.told(None)

    def _failed(self, opening: _Opening, why: str) -> None:
        if self._opening is not opening:
            return
        self._opening = None
        self._counts["stores", "failed"] += 1
        self._tell_failure(opening, why)
        if opening.told is None:
            self._retry_s = self._clock() + RETRY_S
            return
        if self._address is not None:
            self._open(self._address, opening.access, None)
            why = f"{why}; the node goes back to its store {self._address}"
        opening.told(why)

    def _tell_failure(self, opening: _Opening, why: str) -> None:
        """Log why a store could not be opened, the same not at every try."""
        now_s = self._clock()
        is_news = opening.told is not None or why != self._why_not
        if is_news or now_s >= self._silent_until_s:
            self._silence_s = RETRY_S if is_news else min(2 * self._silence_s, MAX_SILENCE_S)
            self._silent_until_s = now_s + self._silence_s
            logger.warning("a remote store cannot be used", extra={"store": opening.text, "why": why})
        self._why_not = why

    def _give_up(self, why: str) -> None:
        """Wait for no store any more: what is opened yet is closed at once."""
        opening, self._opening, self._retry_s = self._opening, None, None
        if opening is not None and opening.told is not None:
            opening.told(f"{why} before this was done")

    def _detach(self, told: Told | None) -> None:
        closing = _Closing(self._clock() + 2 * CLOSE_TIMEOUT_S, told or _unheard)
        self._closings.append(closing)
        attached = self._take_attached()
        if attached is None:
            self._closed(closing)
            return
        logger.info("the remote store is detached")

        def work() -> None:
            self._close(attached.store, CLOSE_TIMEOUT_S)
            self._inbox.put(lambda: self._closed(closing))

        self._threads.run(work)

    def _closed(self, closing: _Closing) -> None:
        if closing in self._closings:
            self._closings.remove(closing)
            closing.told(None)

    def _take_attached(self) -> AttachedStore | None:
        """Take the store out of use; what it has is no longer told."""
        attached, self._attached = self._attached, None
        if attached is not None:
            attached.end()
            self._former.append(attached)
            self._counts["stores", "detached"] += 1
        return attached

    @staticmethod
    def _close(store: RemoteStore, timeout_s: float) -> None:
        if not store.close(timeout_s):
            logger.warning("a remote store's call hangs: its thread ends when that returns")


def _unheard(why: str | None) -> None:
    """Stand in for somebody who waits."""
