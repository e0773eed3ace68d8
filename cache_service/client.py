"""CacheClient: a worker's way to its node's host cache. No call blocks; whatever fails is a miss, counted.

Pages are found in a replica of the server's index and read and written in shared memory, under leases and
grants held in advance; only the bookkeeping is told to the server, by an IO thread.
"""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from cache_service import messages
from cache_service.arena import Arena, ArenaMismatchError
from cache_service.arena_format import ArenaSpec
from cache_service.client_stats import ClientStats
from cache_service.fetch_calls import FetchAnswer, FetchCalls
from cache_service.held_grants import HeldGrants
from cache_service.identity import cluster_id_of
from cache_service.injection import NO_INJECTION, ClientInjection
from cache_service.keys import PageKey
from cache_service.lease_row import LeaseRow
from cache_service.messages import Answer
from cache_service.page_records import Entry, Grant, Location
from cache_service.page_replica import PageReplica
from cache_service.processes import ProcessId
from cache_service.relocation import Changes, Snapshot, Version
from cache_service.server_connection import CallFailure, Patience, ServerConnection
from cache_service.subscriber import Subscriber

logger = logging.getLogger(__name__)

MAX_GROUP = (1 << 32) - 1


class CacheAttachError(Exception):
    """The host cache cannot be used; the message says why and what to change."""


class CacheSilentError(CacheAttachError):
    """The server does not answer. The client goes on asking, and is attached once it does."""


@dataclass(frozen=True)
class ClientSpec:
    """Whose pages a client moves."""

    fingerprint: bytes
    """Of the bundle's layout, 16 bytes."""
    bundle_bytes: int
    num_ranks: int
    group: int
    """1 to MAX_GROUP, the same on every rank of a TP group and of no other: see `group_of`."""
    is_decider: bool = True
    """Rank 0: finds pages, holds grants, commits. The others only lease and write what they are told."""
    num_grants: int = 256
    """Held in advance, or what the server allows if that is less. A step's pages are saved all at once, and
    more are asked for when half are gone."""


@dataclass(frozen=True)
class Deadlines:
    """Of each kind of call."""

    grant_s: float = 0.5
    commit_s: float = 5.0
    """Long enough for a killed server to be back: the entries are told again."""
    report_s: float = 2.0
    """Abort, Touch, ReportCorrupt, Detach."""
    resync_s: float = 5.0
    """A snapshot of 100,000 pages is 5 MB and 0.2 s of work."""


def group_of(incarnation: int) -> int:
    """Return the group number of a TP group from its random incarnation."""
    return 1 + incarnation % MAX_GROUP


class CacheClient:
    """One for each process: two would write the same lease bytes. Its methods are for one thread.

    The caller stops all copies, then closes it.
    """

    def __init__(
        self,
        endpoint: str,
        cluster_secret: bytes,
        spec: ClientSpec,
        *,
        deadlines: Deadlines | None = None,
        patience: Patience | None = None,
        clock: Callable[[], float] = time.monotonic,
        injection: ClientInjection = NO_INJECTION,
    ) -> None:
        self.stats = ClientStats()
        self._injection = injection
        self._cluster_secret = cluster_secret
        self._cluster_id = cluster_id_of(cluster_secret)
        self._spec = spec
        self._deadlines = deadlines or Deadlines()
        self._clock = clock
        self._grants = HeldGrants(spec.num_grants)
        self._pages = PageReplica()
        self._arena: Arena | None = None
        self._leases: LeaseRow | None = None
        self._row = -1
        self._is_replaced = False
        self._is_closed = False
        self._told = ""
        self._subscriber: Subscriber | None = None
        self._first_answer: Future[None] = Future()
        process = ProcessId.current()
        attach = messages.Attach(
            messages.PROTOCOL_VERSION,
            process.pid,
            process.start_ticks,
            spec.group,
            self._cluster_id,
            spec.fingerprint,
            spec.bundle_bytes,
            spec.num_ranks,
        )
        self.connection = ServerConnection(
            endpoint, cluster_secret, attach, self, patience or Patience(), clock, injection.calls
        )
        """For metrics; calls go through the client's own methods."""
        self._fetches = FetchCalls(self.connection, clock)

    def start(self, timeout_s: float) -> None:
        """Attach to the server and map the arena.

        Raises CacheAttachError; then only `close` is left.
        """
        self.connection.start()
        try:
            self._first_answer.result(timeout_s)
        except TimeoutError:
            self._first_answer.cancel()  # the log is told from now on
            raise CacheSilentError(
                f"the cache server at {self.connection.endpoint} did not answer within {timeout_s:g} s"
            ) from None

    @property
    def is_mapped(self) -> bool:
        """Tell whether the server has taken this process in: from then on `arena` and `leases` are there."""
        return self._leases is not None

    @property
    def arena(self) -> Arena:
        """The mapped arena."""
        assert self._arena is not None, "the client has not attached"
        return self._arena

    @property
    def leases(self) -> LeaseRow:
        """This process's row of lease bytes, for its PageMover too."""
        assert self._leases is not None, "the client has not attached"
        return self._leases

    @property
    def subscriber(self) -> Subscriber | None:
        """The decider's: its follower tells version, lag and resyncs."""
        return self._subscriber

    @property
    def num_grants(self) -> int:
        """Slots held for coming pages."""
        return len(self._grants)

    @property
    def num_known_pages(self) -> int:
        """Pages of the node, as far as has been heard."""
        return len(self._pages)

    # What workers.kvcache.host_cache.HostCache and RemotePages ask for.

    def locate(self, key: PageKey) -> Location | None:
        """Return where the page is, as far as is known; a lease proves or disproves it."""
        return None if self._is_replaced else self._pages.get(key)

    def acquire(self, keys: Sequence[PageKey], locations: Sequence[Location]) -> int:
        """Lease the longest readable prefix; return its length. The server need not be there."""
        if self._is_replaced:
            self.stats.misses["replaced"] += len(keys)
            return 0
        num = self.leases.acquire(keys, locations)
        self.stats.num_hits += num
        if num < len(keys):
            self.stats.misses["stale"] += len(keys) - num
        return num

    def release(self, slots: Iterable[int]) -> None:
        """Give back one lease of each slot."""
        self.leases.release(slots)

    def take_grant(self) -> Grant | None:
        """Return a slot to write, held in advance; None: there is none now, or no server to tell of it."""
        if self._is_replaced or not self.connection.is_healthy:
            self.stats.misses["replaced" if self._is_replaced else "no_server"] += 1
            return None
        grant = self._grants.take()
        if grant is None:
            self.stats.misses["no_grant"] += 1
        if self._grants.is_low:
            self.connection.wake()
        return grant

    def commit(self, entries: Sequence[Entry]) -> None:
        """Make written slots readable, parents before children. What is not taken in, `take_lost` tells."""
        told = list(entries)
        self.connection.ask(
            messages.Commit(told), self._deadlines.commit_s, lambda outcome: self._committed(told, outcome)
        )

    def abort(self, grants: Sequence[Grant]) -> None:
        """Give grants back that hold nothing."""
        self._grants.give_back(grants)
        self.connection.wake()

    def touch(self, keys: Sequence[PageKey]) -> None:
        """Count a use of pages, given with all that they continue."""
        self.connection.ask(messages.Touch(list(keys)), self._deadlines.report_s, _ignore)

    def report_corrupt(self, location: Location) -> None:
        """Have a page dropped whose bytes do not match its checksum."""
        self.connection.ask(messages.ReportCorrupt(location, "load"), self._deadlines.report_s, _ignore)

    def take_lost(self) -> list[PageKey]:
        """Return the pages that left the arena, or were not taken in, since the last call."""
        return self._pages.take_lost()

    def is_remote(self, key: PageKey) -> bool:
        """Tell whether the remote store has the page, as far as has been heard."""
        return not self._is_replaced and self._pages.is_remote(key)

    def fetch(self, pages: Sequence[messages.WantedPage], peer: str | None, timeout_s: float) -> int:
        """Have pages brought into the arena from elsewhere; return a number for `take_fetched`."""
        if self._is_replaced:
            return self._fetches.refuse("the arena was replaced: this process could not read the pages")
        return self._fetches.begin(pages, peer, timeout_s)

    def take_fetched(self) -> list[FetchAnswer]:
        """Return what has come of FETCHes since the last call."""
        return self._fetches.take()

    def close(self) -> None:
        """Leave the arena. What is still leased stays so until this process is gone. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        if self.connection.is_attached and self._leases is not None and not self._leases.num_leased:
            self.connection.ask_and_wait(messages.Detach(), self._deadlines.report_s)
        self.connection.close()  # first: its thread speaks to the subscriber
        if self._subscriber is not None:
            self._subscriber.close()
        if self._arena is not None:
            self._arena.close()

    # In the IO thread: see ConnectionListener.

    def attached(self, answer: messages.Attached, version: Version) -> str | None:
        """Map the arena, or see that it is still the one that is mapped."""
        if self._arena is None:
            try:
                self._map(answer, version)
            except (ArenaMismatchError, OSError) as error:
                self._fail(f"cannot map the host cache's arena: {error}")
                return str(error)
        else:
            self._compare(self._arena, answer, version)
        self.stats.num_attaches += 1
        if self._spec.is_decider and not self._is_replaced:
            self._grants.hold(answer.grants)
            self._grants.want(answer.max_grants)
            if self._subscriber is None:
                self._subscriber = Subscriber(
                    answer.broadcasts,
                    self._cluster_secret,
                    self._pages,
                    self._resync,
                    clock=self._clock,
                    injection=self._injection.broadcasts,
                )
                self._subscriber.start()
            else:
                self._subscriber.redirect(answer.broadcasts)
                self._subscriber.saw(version)
        if not self._first_answer.done():
            self._first_answer.set_result(None)
        return None

    def refused(self, refusal: messages.Refused) -> None:
        """Tell `start` of it; later the server may think better of it."""
        self._fail(f"the cache server refused this worker: {refusal.reason}")

    def replied(self, version: Version) -> None:
        """Tell the subscriber how far the server is."""
        if self._subscriber is not None:
            self._subscriber.saw(version)

    def unclaimed(self, answer: Answer) -> None:
        """Keep slots that were granted too late."""
        if isinstance(answer, messages.Granted):
            self._grants.hold(answer.grants)
            self._grants.want(answer.max_grants)

    def tick(self, now_s: float) -> None:
        """Ask for more grants when they run low, give the unused back."""
        if self._is_closed or self._is_replaced or self.connection.breaker.state != "closed":
            return
        num_asked = self._grants.num_to_ask(now_s)
        if num_asked:
            self.connection.ask(
                messages.GrantSlots(num_asked),
                self._deadlines.grant_s,
                lambda outcome: self._granted(num_asked, outcome),
            )
        unused = self._grants.take_unused()
        if unused:
            self.connection.ask(
                messages.Abort(unused),
                self._deadlines.report_s,
                lambda outcome: self._aborted(unused, outcome),
            )

    def _map(self, answer: messages.Attached, version: Version) -> None:
        spec = ArenaSpec(
            self._cluster_id,
            self._spec.fingerprint,
            self._spec.bundle_bytes,
            self._spec.num_ranks,
            answer.num_slots,
            answer.num_readers,
        )
        arena = Arena.map(Path(answer.arena_path), spec)
        incarnation = arena.incarnation
        if incarnation != version.incarnation:
            arena.close()
            raise ArenaMismatchError(
                f"{answer.arena_path} is of incarnation {incarnation}, the server's arena of"
                f" {version.incarnation}: worker and server have to share /dev/shm"
            )
        self._arena, self._row = arena, answer.reader_row
        self._leases = LeaseRow(arena, answer.reader_row)

    def _compare(self, arena: Arena, answer: messages.Attached, version: Version) -> None:
        """The server writes its incarnation into its arena: a mapped one that lacks it is another's."""
        is_same = arena.incarnation == version.incarnation and answer.reader_row == self._row
        if not is_same and not self._is_replaced:
            logger.error(
                "the cache server has another arena than this process has mapped: restart the worker",
                extra={"path": answer.arena_path, "incarnation": version.incarnation},
            )
        self._is_replaced = not is_same

    def _granted(self, num_asked: int, outcome: Answer | CallFailure) -> None:
        granted = outcome if isinstance(outcome, messages.Granted) else None
        self._grants.answered(granted.grants if granted else None, num_asked, self._clock())
        if granted:
            self._grants.want(granted.max_grants)

    def _aborted(self, grants: list[Grant], outcome: Answer | CallFailure) -> None:
        if isinstance(outcome, messages.Done):
            self._grants.ended(grants)
        else:
            self._grants.give_back(grants)  # the server still counts them as ours

    def _committed(self, entries: list[Entry], outcome: Answer | CallFailure) -> None:
        if not isinstance(outcome, messages.Committed):
            reason = outcome.reason if isinstance(outcome, CallFailure) else "undecodable"
            self.stats.commits[reason] += len(entries)
            self._pages.lose(entry.key for entry in entries)
            # If the server has them all the same, it takes no notice.
            self._grants.give_back(Grant(entry.slot, entry.epoch) for entry in entries)
            return
        self._grants.ended(Grant(entry.slot, entry.epoch) for entry in entries)
        for result in outcome.results:
            self.stats.commits[result.status.name.lower()] += 1
        pairs = zip(entries, outcome.results, strict=True)
        self._pages.lose(entry.key for entry, result in pairs if result.location is None)

    def _resync(self, version: Version | None) -> Changes | Snapshot | None:
        """Called in the subscriber's thread."""
        answer = self.connection.ask_and_wait(messages.ChangesSince(version), self._deadlines.resync_s)
        return answer if isinstance(answer, Changes | Snapshot) else None

    def _fail(self, text: str) -> None:
        if not self._first_answer.done():
            self._first_answer.set_exception(CacheAttachError(text))
        elif text != self._told:
            self._told = text
            logger.error("no host cache for this process", extra={"why": text})


def _ignore(outcome: Answer | CallFailure) -> None:
    """Take what came of a report; the connection has counted it."""
