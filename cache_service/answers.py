"""Answers: what a CacheServer answers to each request, and who has attached.

Called by the server's one thread; no sockets here.
"""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from cache_service import messages
from cache_service.arena_files import ArenaOwnedError
from cache_service.arena_format import ArenaSizeError
from cache_service.fetcher import Fetcher
from cache_service.messages import Answer, Count, Done, Refused, Request
from cache_service.node_arena import ArenaLayoutError, NodeArena
from cache_service.page_records import CommitStatus
from cache_service.page_store import PageStore
from cache_service.peer_exchange import PeerExchange
from cache_service.pins import PinBudgetError
from cache_service.processes import ProcessId
from cache_service.reader_rows import NoReaderRowError, ReaderRow
from cache_service.remote_tier import RemoteTier

logger = logging.getLogger(__name__)

_SHARE_OF_GRANTS = 8
"""Of the arena's slots, all groups together hold one in so many in advance: it has no page for anybody."""


@dataclass(frozen=True)
class _Client:
    """A connection whose process has attached."""

    process: ProcessId
    row: ReaderRow


class Answers:
    """Knows clients by their sockets' identities. `broadcasts` is where relocations are published.

    `counts` are the server's counters by (name, reason).
    """

    def __init__(
        self,
        arena: NodeArena,
        cluster_id: str,
        broadcasts: str,
        fetcher: Fetcher,
        remote: RemoteTier,
        peers: PeerExchange,
        counts: Counter[tuple[str, str]],
    ) -> None:
        self._arena = arena
        self._cluster_id = cluster_id
        self._broadcasts = broadcasts
        self._clients: dict[bytes, _Client] = {}
        self._fetcher = fetcher
        self._remote = remote
        self._peers = peers
        self._counts = counts

    def answer(
        self, identity: bytes, request: Request, now_s: float, later: Callable[[Answer], None]
    ) -> Answer | None:
        """Do what a client asks; None: `later` gets the answer, in this thread, now or when it is known."""
        self._counts["calls", type(request).__name__.lower()] += 1
        match request:
            case messages.Fetch():
                self._fetcher.fetch(request, later)
                return None
            case messages.LeasePages():
                answer = self._peers.leases.lease(identity, request, now_s)
                return self.refuse(answer.code, answer.reason) if isinstance(answer, Refused) else answer
            case messages.ReleasePages():
                return self._peers.leases.release(identity, request)
            case messages.AttachStore():
                self._remote.attach(request.store, lambda why: later(self._done_unless(why)))
                return None
            case messages.DetachStore():
                self._remote.detach(lambda why: later(self._done_unless(why)))
                return None
            case _:
                return self._answer(identity, request, now_s)

    def refuse(self, code: messages.RefusalCode, reason: str) -> Refused:
        """Count and return a refusal."""
        self._counts["refusals", code] += 1
        logger.warning("refused a call", extra={"code": code, "reason": reason})
        return Refused(code, reason)

    def _done_unless(self, why: str | None) -> Done | Refused:
        return Done() if why is None else self.refuse("store", why)

    def forget(self, identity: bytes) -> None:
        """Forget a connection that does not listen. What its process holds stays the process's own."""
        self._clients.pop(identity, None)

    def lost(self, identity: bytes) -> None:
        """Forget a connection that is closed."""
        self.forget(identity)
        self._peers.leases.lost(identity)

    def reclaim(self) -> None:
        """Take back what groups of dead processes hold, and forget their connections."""
        if self._arena.reclaim():
            assert self._arena.rows is not None
            living = self._arena.rows.processes
            self._clients = {
                identity: client for identity, client in self._clients.items() if client.process in living
            }

    def stats(self) -> messages.StatsReply:
        """Return the figures of this moment; of leases, those of the last look."""
        store, arena, ages, rows = self._arena.store, self._arena.arena, self._arena.ages, self._arena.rows
        counts = [Count(name, value, reason) for (name, reason), value in self._counts.items()]
        if store is None or arena is None or ages is None or rows is None:
            return messages.StatsReply(0, 0, 0, 0, 0, 0, 0, 0, counts, broadcasts=self._broadcasts)
        source = self._remote.source
        counts += [
            Count("evicted", store.num_evicted),
            Count("evictions_refused", store.num_refused),
            Count("recovered", store.num_recovered),
            *(Count("dropped", value, reason) for reason, value in store.num_dropped.items()),
        ]
        return messages.StatsReply(
            num_slots=arena.spec.num_slots,
            num_unusable=store.num_unusable,
            num_free=store.num_free,
            num_writing=store.num_writing,
            num_ready=store.num_ready,
            num_draining=store.num_draining,
            num_pinned=store.num_pinned,
            slot_bytes=arena.spec.slot_bytes,
            counts=counts,
            num_leased=ages.num_leased,
            oldest_lease_s=ages.oldest_s,
            num_readers=len(rows.processes),
            broadcasts=self._broadcasts,
            store=self._remote.address,
            num_known_remote=self._remote.num_known,
            num_put_waiting=self._remote.num_waiting,
            num_fetches=self._fetcher.num_calls,
            num_lingering=self._fetcher.num_lingering,
            num_lent=self._peers.leases.num_slots,
            oldest_lent_s=self._peers.leases.oldest_s,
            num_peers=self._peers.num_peers,
            num_peers_avoided=self._peers.num_avoided,
            relocations=self._arena.log.version.counter,
            put_breaker=source.put_breaker if source is not None else None,
            get_breaker=source.get_breaker if source is not None else None,
            why_no_store=self._remote.why_not,
        )

    def _answer(self, identity: bytes, request: Request, now_s: float) -> Answer:
        if isinstance(request, messages.Attach):
            return self._attach(identity, request, now_s)
        store = self._arena.store
        if isinstance(request, messages.Stats):
            return self.stats()
        if isinstance(request, messages.ChangesSince):
            stored = store.stored() if store is not None else ()
            return self._arena.log.resync(request.version, stored, self._remote.known_keys())
        if store is None:  # nobody has attached: there is no page yet
            return self._answer_without_pages(request)
        if isinstance(request, messages.Detach | messages.GrantSlots | messages.Commit | messages.Abort):
            client = self._clients.get(identity)
            if client is None:
                return self.refuse("not_attached", f"{type(request).__name__} before Attach; attach first")
            return self._answer_client(identity, client, store, request)
        return self._answer_anyone(store, request)

    def _answer_client(
        self,
        identity: bytes,
        client: _Client,
        store: PageStore,
        request: messages.Detach | messages.GrantSlots | messages.Commit | messages.Abort,
    ) -> Answer:
        group = client.row.group
        match request:
            case messages.GrantSlots():
                return messages.Granted(store.grant(group, request.num_slots), self._max_grants())
            case messages.Commit():
                results = store.commit(group, request.entries)
                for result in results:
                    self._counts["commits", result.status.name.lower()] += 1
                self._remote.offer(
                    [
                        entry.key
                        for entry, result in zip(request.entries, results, strict=True)
                        if result.status is CommitStatus.COMMITTED
                    ]
                )
                return messages.Committed(results)
            case messages.Abort():
                return Done(store.abort(group, request.grants))
            case messages.Detach():
                assert self._arena.rows is not None
                self._arena.rows.leave(client.process)
                del self._clients[identity]
                self.reclaim()
                return Done()

    def _answer_anyone(self, store: PageStore, request: Request) -> Answer:
        match request:
            case messages.Touch():
                store.touch(request.keys)
                return Done(len(request.keys))
            case messages.ReportCorrupt():
                return self._report_corrupt(store, request)
            case messages.Lookup():
                return messages.Found(store.lookup(request.keys))
            case messages.Pin():
                return self._pin(store, request)
            case messages.Unpin():
                return Done(sum(store.unpin(key) for key in request.keys))
            case messages.Clear():
                return Done(store.clear())
            case messages.Check():
                try:
                    store.check()
                except AssertionError as error:
                    logger.error("the store's check failed", exc_info=True)
                    return self.refuse("check_failed", str(error))
                return Done(store.num_ready)
        raise AssertionError(f"nobody answers {type(request).__name__}")

    def _answer_without_pages(self, request: Request) -> Answer:
        match request:
            case messages.Detach() | messages.GrantSlots() | messages.Commit() | messages.Abort():
                return self.refuse("not_attached", f"{type(request).__name__} before Attach; attach first")
            case messages.Lookup():
                return messages.Found([None] * len(request.keys))
            case _:
                return Done()

    def _attach(self, identity: bytes, request: messages.Attach, now_s: float) -> Answer:
        if request.protocol_version != messages.PROTOCOL_VERSION:
            return self.refuse(
                "protocol_version",
                f"the client speaks protocol {request.protocol_version}, this server"
                f" {messages.PROTOCOL_VERSION}; run the same release of eyrie in both",
            )
        if request.cluster_id != self._cluster_id:
            return self.refuse(
                "cluster", f"the client is of cluster {request.cluster_id}, this server of {self._cluster_id}"
            )
        process = ProcessId(request.pid, request.start_ticks)
        if not process.is_alive():
            return self.refuse(
                "process",
                f"the server sees no process {request.pid}: worker and server have to see each other's"
                " processes (one PID namespace), or a living reader's leases end as a dead one's",
            )
        try:
            row = self._arena.attach(request, now_s)
        except NoReaderRowError as error:
            return self.refuse("no_reader_row", str(error))
        except ArenaOwnedError as error:
            return self.refuse("arena_owned", str(error))
        except ArenaSizeError as error:
            return self.refuse("arena_size", str(error))
        except (ArenaLayoutError, ValueError) as error:
            return self.refuse("layout", str(error))
        except OSError as error:
            return self.refuse("arena_file", f"the arena's file cannot be made: {error}; look at its folder")
        arena, store = self._arena.arena, self._arena.store
        assert arena is not None and store is not None
        self._clients[identity] = _Client(process, row)
        logger.info("a process attached", extra={"pid": request.pid, "row": row.row, "group": row.group})
        return messages.Attached(
            str(arena.path),
            arena.spec.num_slots,
            arena.spec.num_readers,
            row.row,
            self._broadcasts,
            store.grants_of(row.group),
            self._max_grants(),
        )

    def _max_grants(self) -> int:
        arena, rows = self._arena.arena, self._arena.rows
        assert arena is not None and rows is not None
        return max(1, arena.spec.num_slots // _SHARE_OF_GRANTS // max(1, len(rows.groups)))

    def _report_corrupt(self, store: PageStore, request: messages.ReportCorrupt) -> Answer:
        """Drop a page; one that a peer complains of only if it is wrong here, not on the way or there."""
        assert self._arena.arena is not None
        if request.reason == "fetch" and self._arena.arena.is_intact(request.location.slot):
            self._counts["unconfirmed_corruption", ""] += 1
            return Done()
        num_dropped = store.drop(request.location, request.reason)
        logger.warning(
            "a page's bytes did not match its checksum",
            extra={"slot": request.location.slot, "while": request.reason, "dropped": num_dropped},
        )
        return Done(num_dropped)

    def _pin(self, store: PageStore, request: messages.Pin) -> Answer:
        """Pin all that are here, or over the budget none."""
        pinned = []
        try:
            for key in request.keys:
                if store.pin(key):
                    pinned.append(key)
        except PinBudgetError as error:
            for key in pinned:
                store.unpin(key)
            return self.refuse("pin_budget", str(error))
        return Done(len(pinned))
