"""Router: places each request on the replica where it costs least: filter, score, pick.

Lives in an API process, on its event loop; owns the process's Replicas, its PrefixIndex and its LoadBooks.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import msgspec

from cache_service.keys import NamespaceDigest, PageKey, page_keys, salted
from cluster.api.ports import NoReplicaError, OverloadedError
from cluster.replica import REPLICA_LOST, Replica, ReplicaStream, ReplicaUnavailableError
from cluster.router.absences import Absences
from cluster.router.books import LoadBook
from cluster.router.cache_feed import CacheFeed, CacheFeedStats
from cluster.router.costs import Cost, PrefillRate, placement_cost
from cluster.router.host_index import CacheAddress, FetchScope, HostIndex
from cluster.router.prefix_index import OVERLAY_S, PrefixIndex
from cluster.router.routed_stream import RoutedStream
from cluster.router.ways import hints, ways
from workers.protocol import (
    REPLICA_FAILED,
    FetchHint,
    KVEventBatch,
    LoadReport,
    ReplicaId,
    RequestId,
    RequestOutput,
    SubmitRequest,
    Welcome,
)

logger = logging.getLogger(__name__)

INLINE_KEY_TOKENS = 2_048
"""Keys of longer prompts (about 1 us a page) are computed in a thread."""
RETRY_AFTER_S = 1.0
QUEUE_FULL = "queue_full"
PASSED_OVER = (QUEUE_FULL, REPLICA_LOST, REPLICA_FAILED)
"""Error codes of a replica's answer after which another replica may still serve the request."""


class PlacementRecorder(Protocol):
    """Metrics of the router; cluster.metrics.ApiMetrics."""

    def placed(self, replica_id: ReplicaId, num_pages: int, num_held_pages: int) -> None:
        """Count one placement: the prompt's whole pages, and those thought to be there."""

    def hinted(self, kind: Literal["peer", "remote"]) -> None:
        """Count one hint that went with a placed request."""


@dataclass
class _Place:
    """One replica and what is known of it."""

    replica_id: ReplicaId
    replica: Replica
    book: LoadBook


@dataclass(frozen=True)
class _Candidate:
    place: _Place
    keys: list[PageKey]
    num_held: int
    num_held_tokens: int | None
    """On the device; None: it is thought to have pages copied."""
    num_uncached: int
    """Tokens that are to be computed."""
    hints: list[FetchHint]
    num_tokens: int
    """To prefill before it, and its whole prompt."""
    num_requests: int
    cost: Cost


class _Feed:
    """A replica's news on its way into index and book; called in the replica's receiver thread."""

    def __init__(self, replica_id: ReplicaId, index: PrefixIndex, book: LoadBook) -> None:
        self._replica_id = replica_id
        self._index = index
        self._book = book

    def welcomed(self, welcome: Welcome) -> None:
        """Take a snapshot."""
        self._index.restart(self._replica_id, welcome.incarnation, welcome.version, welcome.snapshot)

    def stepped(
        self, load: LoadReport, kv_events: KVEventBatch | None, answered: list[RequestId], now_s: float
    ) -> bool:
        """Take one step's news."""
        self._book.report(load, now_s, answered)
        return kv_events is None or self._index.apply(self._replica_id, kv_events)

    def lost(self) -> None:
        """Forget the replica."""
        self._book.clear()
        self._index.forget(self._replica_id)


class Router:
    """Implements cluster.api.ports.RequestRouter over the workers at `endpoints`.

    `caches` says which CacheServer the node of each replica has, if any, `scope` what these can fetch.
    `overlay_s` and the two `takes_` are switches for tests; no configuration reaches them.
    """

    def __init__(
        self,
        endpoints: Mapping[ReplicaId, str],
        cluster_secret: bytes,
        client_id: str,
        *,
        card_digest: str,
        recorder: PlacementRecorder,
        caches: Mapping[ReplicaId, CacheAddress] | None = None,
        scope: FetchScope | None = None,
        lease_s: float = 20.0,
        clock: Callable[[], float] = time.monotonic,
        overlay_s: float = OVERLAY_S,
        takes_kv_events: bool = True,
        takes_relocations: bool = True,
    ) -> None:
        self._clock = clock
        self._recorder = recorder
        self._index = PrefixIndex(list(endpoints), overlay_s=overlay_s, takes_kv_events=takes_kv_events)
        addresses = (caches or {}) if takes_relocations else {}
        feeds = {address: CacheFeed(address, cluster_secret, clock=clock) for address in addresses.values()}
        self._feeds = list(feeds.values())
        self._hosts = HostIndex(
            {replica_id: feeds[address] for replica_id, address in addresses.items()}, scope or FetchScope()
        )
        self._places: list[_Place] = []
        for replica_id, endpoint in endpoints.items():
            book = LoadBook()
            replica = Replica(
                replica_id,
                endpoint,
                cluster_secret,
                client_id,
                _Feed(replica_id, self._index, book),
                card_digest=card_digest,
                lease_s=lease_s,
                clock=clock,
            )
            self._places.append(_Place(replica_id, replica, book))
        self._absences = Absences()
        self._rate = PrefillRate()
        self._num_placed = 0

    async def start(self, timeout_s: float) -> None:
        """Connect to every replica; raise ReplicaUnavailableError when one does not answer in time.

        CacheServers are not waited for: a silent one costs hits.
        """
        for feed in self._feeds:
            feed.start()
        for place in self._places:
            await place.replica.start()
        async with asyncio.TaskGroup() as group:
            for place in self._places:
                group.create_task(place.replica.wait_ready(timeout_s))

    async def close(self) -> None:
        """Disconnect; open streams end with `error`."""
        loop = asyncio.get_running_loop()
        await asyncio.gather(
            *(place.replica.close() for place in self._places),
            *(loop.run_in_executor(None, feed.close) for feed in self._feeds),
        )

    def leave(self, replica_id: ReplicaId, why: str) -> None:
        """Send nothing to a replica that has lost its worker, until `move`; its requests end."""
        self._absences.left(replica_id, self._clock())
        self._replica(replica_id).leave(why)

    def move(self, replica_id: ReplicaId, endpoint: str) -> None:
        """Take a replica back, whose worker is another now."""
        self._absences.returned(replica_id, self._clock())
        self._replica(replica_id).move(endpoint)

    def ready(self) -> str | None:
        """Return None when some replica takes work, else the reason why none does."""
        reasons = [place.replica.unavailable_reason() for place in self._places]
        if None in reasons:
            return None
        told = "; ".join(
            f"{place.replica_id}: {reason}" for place, reason in zip(self._places, reasons, strict=True)
        )
        return f"no replica is ready ({told})"

    @property
    def num_ready(self) -> int:
        """Replicas that take requests."""
        return sum(place.replica.unavailable_reason() is None for place in self._places)

    @property
    def num_index_gaps(self) -> int:
        """Snapshots the prefix index had to ask for."""
        return self._index.num_gaps

    def use_store(self, store: str) -> None:
        """Note that a store was attached to the nodes: it may be each node's own, or one for all."""
        self._hosts.use_store(store)

    def cache_feeds(self) -> list[CacheFeedStats]:
        """Return what is known of each CacheServer."""
        return [feed.stats() for feed in self._feeds]

    @property
    def max_context_len(self) -> int | None:
        """Tokens that every connected replica holds for one request; None before the first Welcome."""
        welcomes = [place.replica.welcome for place in self._places]
        return min((welcome.max_context_len for welcome in welcomes if welcome is not None), default=None)

    async def submit(self, request: SubmitRequest) -> RoutedStream:
        """Send the request where it costs least; raise NoReplicaError (503) or OverloadedError (429).

        A replica that refuses it for want of room, or is lost before it answers, is passed over for the next.
        A cancelled caller leaves nothing behind.
        """
        keys = await self._keys(request)
        refused: str | None = None
        for candidate in self._rank(self._score(request, keys)):
            place, now_s = candidate.place, self._clock()
            # Before it is sent: the answer, which ends the lease, comes in another thread.
            place.book.lease(request.request_id, candidate.num_uncached, now_s)
            try:
                stream = place.replica.submit(msgspec.structs.replace(request, hints=candidate.hints))
            except ReplicaUnavailableError:
                place.book.release(request.request_id)
                continue
            self._index.expect(place.replica_id, candidate.keys, now_s)
            answer = await _answer(stream)
            if answer.error_code in PASSED_OVER:
                place.book.release(request.request_id)
                refused = answer.error if answer.error_code == QUEUE_FULL else refused
                continue
            self._recorder.placed(place.replica_id, len(candidate.keys), candidate.num_held)
            for hint in candidate.hints:
                self._recorder.hinted("remote" if hint.peer is None else "peer")
            self._num_placed += 1
            return RoutedStream(
                stream, answer, self._rate, candidate.num_tokens, candidate.num_held_tokens, self._clock
            )
        if refused is not None:
            raise OverloadedError(RETRY_AFTER_S, refused)
        raise self._no_replica("the replicas went away while the request was placed")

    def _replica(self, replica_id: ReplicaId) -> Replica:
        return next(place.replica for place in self._places if place.replica_id == replica_id)

    def _no_replica(self, otherwise: str) -> NoReplicaError:
        """Say why none takes a request, or `otherwise` where one does by now."""
        reason = self.ready()
        if reason is None:
            return NoReplicaError(RETRY_AFTER_S, otherwise)
        return NoReplicaError(self._absences.retry_after_s(self._clock()), reason)

    # Filter.

    def _takers(self) -> list[tuple[_Place, Welcome]]:
        """Return the replicas with a live worker and room in their queues."""
        alive = [(place, place.replica.welcome) for place in self._places]
        live = [(place, welcome) for place, welcome in alive if welcome is not None]
        if not live:
            raise self._no_replica("no replica is ready")
        now_s = self._clock()
        loads = [place.book.load(now_s) for place, _ in live]
        takers = [
            taker
            for taker, load in zip(live, loads, strict=True)
            if load.num_running + load.num_waiting < taker[1].max_requests
        ]
        if not takers:
            raise OverloadedError(RETRY_AFTER_S)
        return takers

    # Score.

    async def _keys(self, request: SubmitRequest) -> dict[tuple[bytes, int], list[PageKey]]:
        """Return the prompt's page keys under each (namespace, page size) among the replicas; mostly one."""
        kinds = {
            (place.replica.welcome.namespace, place.replica.welcome.page_size)
            for place in self._places
            if place.replica.welcome is not None
        }
        if len(request.token_ids) <= INLINE_KEY_TOKENS:
            return {kind: _prompt_keys(request, *kind) for kind in kinds}
        loop = asyncio.get_running_loop()
        return {kind: await loop.run_in_executor(None, _prompt_keys, request, *kind) for kind in kinds}

    def _score(
        self, request: SubmitRequest, keys_by_kind: Mapping[tuple[bytes, int], list[PageKey]]
    ) -> list[_Candidate]:
        now_s = self._clock()
        prompt_len = len(request.token_ids)
        candidates = []
        for place, welcome in self._takers():
            page_size = welcome.page_size
            keys = keys_by_kind.get((welcome.namespace, page_size), [])
            num_held = self._index.num_held(place.replica_id, keys, now_s)
            residence = self._hosts.residence(place.replica_id, keys, num_held, now_s)
            token_s = self._rate.token_s
            open_ways = ways(residence, prompt_len, page_size, token_s, place.book.page_times)
            load = place.book.load(now_s)
            num_new_pages = -(-prompt_len // page_size) - num_held
            candidates.append(
                _Candidate(
                    place,
                    keys,
                    num_held,
                    num_held * page_size if len(open_ways) == 1 else None,
                    open_ways[0].num_computed_tokens,
                    hints(open_ways),
                    load.num_prefill_tokens + prompt_len,
                    load.num_running + load.num_waiting + load.num_sent,
                    placement_cost(load, open_ways[0], num_new_pages, page_size, token_s),
                )
            )
        return candidates

    # Pick.

    def _rank(self, candidates: Sequence[_Candidate]) -> list[_Candidate]:
        """Return the candidates, best first.

        Those that would keep this request waiting for more than 2 * the shortest wait + 1 s come last,
        whatever they save the others. Equal costs go to the fewest requests, then round.
        """
        shortest_s = min(candidate.cost.own_s for candidate in candidates)
        num = len(candidates)

        def order(numbered: tuple[int, _Candidate]) -> tuple[bool, float, int, int]:
            place, candidate = numbered
            waits_too_long = candidate.cost.own_s > 2 * shortest_s + 1
            turn = (place - self._num_placed) % num
            return waits_too_long, candidate.cost.total_s, candidate.num_requests, turn

        return [candidate for _, candidate in sorted(enumerate(candidates), key=order)]


async def _answer(stream: ReplicaStream) -> RequestOutput:
    """Return the replica's first word: queued, or how it ended. Cancelled, the request is aborted."""
    try:
        return await anext(stream)
    except BaseException:
        await stream.aclose()
        raise


def _prompt_keys(request: SubmitRequest, namespace: bytes, page_size: int) -> list[PageKey]:
    parent = salted(NamespaceDigest(namespace), request.tenant_salt)
    return page_keys(parent, request.token_ids, page_size)
