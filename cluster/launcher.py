"""Launcher: places the actors of one service, waits until all answer, watches them, stops them.

Runs in the process of the CLI or the job, in its main thread, over a Ray connection that exists. All actors
belong to that process's Ray job: when it dies, however it dies, Ray ends them and their placement groups.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray import ObjectRef
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cache_service.server_actor import CacheServerStarted
from cluster.api.ports import ScrapeTarget
from cluster.api.server import ApiServer, ApiStarted
from cluster.cache_servers import CacheServers
from cluster.config import ClusterConfig
from cluster.pings import Handle, Member, Pings
from workers.protocol import ReplicaId
from workers.worker import Worker, WorkerStarted

logger = logging.getLogger(__name__)

T = TypeVar("T")

POLL_S = 0.25
SPIN_COUNT = 300
"""Of a compute thread that waits for its peers: some 15 us. More pays only while no other process wants the
cores: beside one that does, SmolLM2's decode step took 29 ms at 300 and 219 ms at 20,000."""
SOME = 0.001
"""Of a node's own resource: says where to go and takes nothing that others need."""
LAST_WORDS_S = 10.0
"""Beyond `drain_s`: the API server ends what still runs by itself, and its clients hear of it."""
STOP_S = 10.0
"""What an actor gets to give its ports and memory back."""


class LaunchError(Exception):
    """The service cannot start, or has failed; the message is fit for the user."""


class LaunchCancelledError(Exception):
    """The start was given up on request."""


@dataclass(frozen=True)
class Placement:
    """What the machine at hand decides about the actors."""

    node_address: str | None
    """Where sockets bind; None: each node's address as Ray knows it."""
    stays_here: bool
    """All actors go to this process's node: only here is the cluster secret."""
    num_threads: int
    """Compute threads of a rank on CPU."""
    spins: bool
    """Ranks have cores of their own: their threads may spin for a moment before they sleep."""


class Launcher:
    """Starts one service: `start` once, `failure` now and then, `drain`, and `stop`, which is always safe.

    `incarnations` gives a fresh random number for each TP group.
    """

    def __init__(
        self,
        config: ClusterConfig,
        secret_file: Path,
        keys_file: Path,
        placement: Placement,
        *,
        incarnations: Callable[[], int],
        progress: Callable[[str], None],
        is_cancelled: Callable[[], bool],
    ) -> None:
        self._config = config
        self._secret_file = secret_file
        self._keys_file = keys_file
        self._placement = placement
        self._incarnations = incarnations
        self._progress = progress
        self._is_cancelled = is_cancelled
        self._deadline_s = time.monotonic() + config.start_timeout_s
        self._groups: dict[ReplicaId, PlacementGroup] = {}
        self._workers: list[Member] = []
        self._caches = CacheServers(
            config, secret_file, placement.node_address, make=_make, wait=ray.wait, get=ray.get, kill=ray.kill
        )
        self._lost: set[str] = set()
        self._pings = Pings(ray.wait, ray.get)
        self._api: Member | None = None

    def start(self) -> str:
        """Place everything and return the service's URL once every actor answers.

        Raise LaunchError, or LaunchCancelledError when `is_cancelled` meanwhile.
        """
        config = self._config
        self._progress("starting the HTTP server")
        here = {_this_node(): SOME}  # the API keys' file is on this node
        files = (self._secret_file, self._keys_file)
        options = {"num_cpus": 0, "resources": here}
        api = _make(ApiServer, options, config, *files, self._placement.node_address)
        self._api = Member("API server", api)
        binding: list[ObjectRef[str]] = [api.bind.remote()]
        replica_ids = [ReplicaId(f"replica-{number}") for number in range(config.num_replicas)]
        ranks = {replica_id: self._place(replica_id) for replica_id in replica_ids}
        calls: list[ObjectRef[tuple[str, int]]] = [actors[0].rendezvous.remote() for actors in ranks.values()]
        self._wait(binding, "the HTTP server")  # a port in use is known before a model loads
        meetings = self._wait(calls, "the first ranks")
        self._start_caches()
        self._progress(f"loading {config.worker.model}")
        started = self._start_ranks(ranks, meetings)
        self._progress("connecting the HTTP server to the workers")
        endpoints = {replica_id: _endpoint(records) for replica_id, records in started.items()}
        targets = [*_scrape_targets(started), *self._caches.scrape_targets()]
        addresses = self._caches.addresses()
        caches = {
            replica_id: addresses[_node_id(group)] for replica_id, group in self._groups.items() if addresses
        }
        serving: list[ObjectRef[ApiStarted]] = [api.start.remote(endpoints, targets, caches)]
        return self._wait(serving, "the HTTP server")[0].url

    def failure(self) -> str | None:
        """Return why the service is over (no replica, or no API server, is left), None while it is not.

        Never blocks: call it every second. A lost worker is told once; the service goes on while a replica
        is left. A lost cache server is started again.
        """
        assert self._api is not None
        self._caches.keep()
        members = [*self._workers, self._api]
        found = self._pings.lost([member for member in members if member.name not in self._lost])
        for name, why in found.items():
            self._lost.add(name)
            logger.error("lost an actor", extra={"actor": name, "why": why})
        if self._api.name in self._lost:
            return "the API server died; its log says why"
        num_left = self._config.num_replicas - len({name.partition(" ")[0] for name in self._lost})
        return None if num_left else "no replica is left; the workers' logs say why"

    def drain(self, is_cut_short: Callable[[], bool]) -> None:
        """Refuse new work, let running requests finish within `drain_s`; return early when cut short.

        An API server that is stuck is not waited for beyond the deadline: what runs is cut short.
        """
        if self._api is None or self._api.name in self._lost:
            return
        drained: list[ObjectRef[None]] = [self._api.actor.drain.remote(self._config.drain_s)]
        wait_until_done(drained, self._config.drain_s + LAST_WORDS_S, is_cut_short)

    def stop(self) -> None:
        """End every actor and give its resources back. Idempotent.

        A Ray that was ended first (a signal to the whole process group) never answers some calls: it is not
        waited for beyond the actors' own time.
        """
        ending = threading.Thread(target=self._end_actors, name="end-actors", daemon=True)
        ending.start()
        ending.join(4 * STOP_S)
        if ending.is_alive():
            logger.warning("Ray does not answer; its processes are left to its own shutdown")

    def _end_actors(self) -> None:
        if self._api is not None and self._api.name not in self._lost:
            # First the API server: its clients still hear how their requests ended.
            ray.wait([self._api.actor.stop.remote(STOP_S)], timeout=STOP_S)
        stops = [
            worker.actor.stop.remote(STOP_S) for worker in self._workers if worker.name not in self._lost
        ]
        if stops:
            ray.wait(stops, num_returns=len(stops), timeout=STOP_S)
        caches = self._caches.actors
        if caches:  # last: workers have their arenas mapped
            stopped = [cache.stop.remote(STOP_S) for cache in caches]
            ray.wait(stopped, num_returns=len(stopped), timeout=STOP_S)
        members = [*self._workers, *([self._api] if self._api else [])]
        for actor in [*(member.actor for member in members), *caches]:
            ray.kill(actor)
        for group in self._groups.values():
            remove_placement_group(group)
        self._api, self._workers, self._groups = None, [], {}

    def _place(self, replica_id: ReplicaId) -> list[Handle]:
        """Create one TP group's actors, all on one node."""
        worker = self._config.worker
        bundle = {"CPU": 1.0, "GPU": 1.0} if worker.device == "cuda" else {"CPU": 1.0}
        where = {_this_node(): SOME} if self._placement.stays_here else {}
        group = placement_group([{**bundle, **where}] * worker.tp_size, strategy="STRICT_PACK")
        self._groups[replica_id] = group
        self._progress(f"placing {replica_id}")
        try:
            self._wait([group.ready()], f"a node for {replica_id}")
        except LaunchError:
            raise LaunchError(
                f"no node can hold {replica_id}: it needs {bundle} on one node for each of its "
                f"{worker.tp_size} ranks; free in the whole cluster: {_free_resources()}"
            ) from None
        incarnation = self._incarnations()
        actors = []
        for rank in range(worker.tp_size):
            strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
            options = {
                "num_cpus": bundle["CPU"],
                "num_gpus": bundle.get("GPU", 0.0),
                "max_concurrency": 4,
                "scheduling_strategy": strategy,
                "runtime_env": {"env_vars": self._thread_environment()},
            }
            actor = _make(
                Worker,
                options,
                worker,
                replica_id,
                rank,
                incarnation,
                self._placement.num_threads,
                self._placement.node_address,
                self._secret_file,
                self._config.log_level,
            )
            actors.append(actor)
            self._workers.append(Member(f"{replica_id} rank {rank}", actor))
        return actors

    def _start_caches(self) -> None:
        """Have a cache server on each node with replicas, where there is a host cache."""
        if not self._config.cache.is_on:
            return
        self._progress("starting the host cache")
        calls: list[ObjectRef[CacheServerStarted]] = self._caches.place(
            [_node_id(group) for group in self._groups.values()]
        )
        self._caches.started(self._wait(calls, "the host cache"))

    def _start_ranks(
        self, ranks: dict[ReplicaId, list[Handle]], meetings: Sequence[tuple[str, int]]
    ) -> dict[ReplicaId, Sequence[WorkerStarted]]:
        timeout_s = self._left_s()
        caches = self._caches.endpoints()
        starts: list[ObjectRef[WorkerStarted]] = [
            actor.start.remote(host, port, timeout_s, caches.get(_node_id(group)) if caches else None)
            for (host, port), actors, group in zip(
                meetings, ranks.values(), self._groups.values(), strict=True
            )
            for actor in actors
        ]
        records = self._wait(starts, "the workers")
        size = self._config.worker.tp_size
        return {
            replica_id: records[place * size : (place + 1) * size] for place, replica_id in enumerate(ranks)
        }

    def _thread_environment(self) -> dict[str, str]:
        """Thread wake-ups decide the speed of a small model on CPU: spin briefly on cores of one's own."""
        return {
            "OMP_NUM_THREADS": str(self._placement.num_threads),
            "OMP_WAIT_POLICY": "PASSIVE",
            "GOMP_SPINCOUNT": str(SPIN_COUNT) if self._placement.spins else "0",
        }

    def _wait(self, refs: list[ObjectRef[T]], what: str) -> list[T]:
        """Return the results; raise LaunchError for the first failure or at the start's deadline."""
        waiting = list(refs)
        while waiting:
            if self._is_cancelled():
                raise LaunchCancelledError
            done, waiting = ray.wait(waiting, num_returns=1, timeout=POLL_S)
            for ref in done:
                _raise_told(ref)
            if not done and self._left_s() <= 0:
                raise LaunchError(
                    f"{what} did not answer within start_timeout_s = {self._config.start_timeout_s:g} s"
                )
        return list(ray.get(refs))

    def _left_s(self) -> float:
        return max(0.0, self._deadline_s - time.monotonic())


def wait_until_done(
    calls: Sequence[ObjectRef[None]],
    timeout_s: float,
    is_cut_short: Callable[[], bool],
    *,
    wait: Callable[..., tuple[list[ObjectRef[None]], list[ObjectRef[None]]]] = ray.wait,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Return when all calls are done or failed, when cut short, or at the deadline."""
    deadline_s = clock() + timeout_s
    left = list(calls)
    while left and not is_cut_short():
        if clock() >= deadline_s:
            logger.warning("the API server did not drain in time; stopping all the same")
            return
        _, left = wait(left, timeout=POLL_S)


def _make(actor_class: type, options: dict[str, Any], *arguments: object) -> Handle:
    return ray.remote(actor_class).options(**options).remote(*arguments)


def _this_node() -> str:
    """Return the resource that only this process's node has."""
    return f"node:{ray.util.get_node_ip_address()}"  # type: ignore[no-untyped-call]


def _free_resources() -> dict[str, float]:
    return dict(ray.available_resources())  # type: ignore[no-untyped-call]


def _node_id(group: PlacementGroup) -> str:
    """Return the node of a placed TP group: it is packed on one."""
    node_ids: dict[int, str] = placement_group_table(group)["bundles_to_node_id"]
    return node_ids[0]


def _endpoint(records: Sequence[WorkerStarted]) -> str:
    endpoint = records[0].endpoint
    assert endpoint is not None, "rank 0 has an inbox"
    return endpoint


def _scrape_targets(started: Mapping[ReplicaId, Sequence[WorkerStarted]]) -> list[ScrapeTarget]:
    return [
        ScrapeTarget(
            record.metrics_address,
            {"process": "worker", "replica": replica_id, "rank": str(rank), "node": record.node},
        )
        for replica_id, records in started.items()
        for rank, record in enumerate(records)
    ]


def _raise_told(ref: ObjectRef[Any]) -> None:
    """Raise LaunchError in the actor's own words when the call failed."""
    try:
        ray.get(ref)
    except RayTaskError as error:
        raise LaunchError(str(error.cause)) from None
    except RayError as error:
        raise LaunchError(f"an actor died while it started: {str(error).strip().splitlines()[0]}") from None
