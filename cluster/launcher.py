"""Launcher: places the actors of one service, waits until all answer, has them kept alive, stops them.

Runs in the process of the CLI or the job, in its main thread, over a Ray connection that exists. All actors
belong to that process's Ray job: when it dies, however it dies, Ray ends them and their placement groups.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray import ObjectRef
from ray.exceptions import RayError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from cache_service.processes import ProcessId
from cache_service.server_actor import CacheServerStarted
from cluster.api.ports import ScrapeTarget
from cluster.api.server import ApiServer, ApiStarted
from cluster.cache_servers import CacheServers
from cluster.config import ClusterConfig
from cluster.pings import Handle, Member, Pings, failure_of
from cluster.replica_actors import (
    Placement,
    ReplicaActors,
    ReplicaSpec,
    ReplicaStarted,
    ReplicaStartError,
    rank_bundle,
)
from cluster.supervisor import Supervisor
from workers.protocol import ReplicaId

logger = logging.getLogger(__name__)

T = TypeVar("T")

POLL_S = 0.25
SOME = 0.001
"""Of a node's own resource: says where to go and takes nothing that others need."""
LAST_WORDS_S = 10.0
"""Beyond `drain_s`: the API server ends what still runs by itself, and its clients hear of it."""
GONE_STOP_S = 5.0
"""What the API server gets for the same once Ray is gone: it may have the signal, too, and not answer."""
STOP_S = 10.0
"""What an actor gets to give its ports and memory back."""


class LaunchError(Exception):
    """The service cannot start, or has failed; the message is fit for the user."""


class LaunchCancelledError(Exception):
    """The start was given up on request."""


class Launcher:
    """Starts one service: `start` once, `failure` now and then, `drain`, and `stop`, which is always safe.

    `incarnations` gives a fresh random number for each TP group. `is_ray_gone` tells that Ray's own processes
    have ended: most calls then block for ever, or for the minute after which Ray ends this process.
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
        is_ray_gone: Callable[[], bool],
    ) -> None:
        self._config = config
        self._secret_file = secret_file
        self._keys_file = keys_file
        self._placement = placement
        self._incarnations = incarnations
        self._progress = progress
        self._is_cancelled = is_cancelled
        self._is_ray_gone = is_ray_gone
        self._deadline_s = time.monotonic() + config.start_timeout_s
        self._groups: dict[ReplicaId, PlacementGroup] = {}
        self._caches = CacheServers(
            config, secret_file, placement.node_address, make=_make, wait=ray.wait, get=ray.get, kill=ray.kill
        )
        self._supervisor = Supervisor(
            lambda replica_id: self._make_replica(replica_id, config.start_timeout_s),
            self,
            Pings(ray.wait, ray.get),
            max_restarts=config.max_restarts,
            max_start_rounds=round(config.start_timeout_s),
        )
        self._started: dict[ReplicaId, ReplicaStarted] = {}
        """As they serve, or served last."""
        self._pings = Pings(ray.wait, ray.get)
        self._api: Member | None = None
        self._api_process: ProcessId | None = None
        """Of an own cluster's, once it serves."""
        self._is_api_lost = False
        self._api_stop: ObjectRef[bool] | None = None

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
        replicas = {}
        for number in range(config.num_replicas):
            replica_id = ReplicaId(f"replica-{number}")
            self._place(replica_id)
            replicas[replica_id] = self._make_replica(replica_id, self._left_s())
            self._supervisor.add(replica_id, replicas[replica_id])
        self._wait(binding, "the HTTP server")  # a port in use is known before a model loads
        self._start_caches()
        self._progress(f"loading {config.worker.model}")
        self._load(replicas)
        self._progress("connecting the HTTP server to the workers")
        endpoints = {replica_id: started.endpoint for replica_id, started in self._started.items()}
        addresses = self._caches.addresses()
        caches = {
            replica_id: addresses[_node_id(group)] for replica_id, group in self._groups.items() if addresses
        }
        serving: list[ObjectRef[ApiStarted]] = [api.start.remote(endpoints, self._targets(), caches)]
        served = self._wait(serving, "the HTTP server")[0]
        if config.ray_address is None:
            self._api_process = ProcessId.of(served.pid)
        self._supervisor.serving()
        return served.url

    def failure(self) -> str | None:
        """Return why the service is over (no replica, or no API server, is left), None while it is not.

        Never blocks: call it every second. What is lost is started again meanwhile.
        """
        assert self._api is not None
        if self._is_ray_gone():
            return "Ray's own processes have ended; its log folder may say why"
        self._caches.keep()
        self._supervisor.keep()
        for name, why in self._pings.lost([self._api]).items():
            logger.error("lost an actor", extra={"actor": name, "why": why})
            self._is_api_lost = True
            return "the API server died; its log says why"
        failure = self._supervisor.failure()
        return None if failure is None else f"no replica is left ({failure}); the workers' logs say why"

    # ReplicaNews: the API server is told, and nobody waits for it.

    def lost(self, replica_id: ReplicaId, why: str) -> None:
        """Take a replica out until it serves again."""
        assert self._api is not None
        self._api.actor.replica_lost.remote(replica_id, why)

    def serves(self, replica_id: ReplicaId, started: ReplicaStarted) -> None:
        """Take a restarted replica in."""
        assert self._api is not None
        self._started[replica_id] = started
        self._api.actor.replica_serves.remote(replica_id, started.endpoint, self._targets())

    def drain(self, is_cut_short: Callable[[], bool]) -> None:
        """Refuse new work, let running requests finish within `drain_s`; return early when cut short.

        An API server that is stuck is not waited for beyond the deadline: what runs is cut short. It is cut
        short as well once Ray is gone, with which this process has not long to live.
        """
        if self._api is None or self._is_api_lost:
            return
        drained: list[ObjectRef[None]] = [self._api.actor.drain.remote(self._config.drain_s)]
        wait_until_done(
            drained, self._config.drain_s + LAST_WORDS_S, lambda: is_cut_short() or self._is_ray_gone()
        )

    def stop(self) -> None:
        """End every actor and give its resources back. Idempotent.

        Once Ray is gone only the API server is told: the dead never answer, and whoever started Ray ends
        what outlives it. A Ray that does not answer is not waited for beyond the actors' own time.
        """
        if not self._is_ray_gone():
            ending = threading.Thread(target=self._end_actors, name="end-actors", daemon=True)
            ending.start()
            deadline_s = time.monotonic() + 4 * STOP_S
            while ending.is_alive() and not self._is_ray_gone() and time.monotonic() < deadline_s:
                ending.join(POLL_S)
            if not ending.is_alive():
                return
            logger.warning("Ray does not answer; its processes are left to its own shutdown")
        process = self._api_process
        if process is not None:
            wait_until_done(self._stop_api(), GONE_STOP_S, lambda: not process.is_alive())

    def _stop_api(self) -> list[ObjectRef[bool]]:
        """Have the API server stop, once; return the call, if there is one."""
        if self._api_stop is None and self._api is not None and not self._is_api_lost:
            self._api_stop = self._api.actor.stop.remote(STOP_S)
        return [] if self._api_stop is None else [self._api_stop]

    def _end_actors(self) -> None:
        stopped = self._stop_api()
        if stopped:  # first: its clients still hear how their requests ended
            ray.wait(stopped, timeout=STOP_S)
        replicas = self._supervisor.actors
        stops = [
            member.actor.stop.remote(STOP_S)
            for replica in replicas
            if replica.may_be_stopped
            for member in replica.members
        ]
        if stops:
            ray.wait(stops, num_returns=len(stops), timeout=STOP_S)
        caches = self._caches.actors
        if caches:  # last: workers have their arenas mapped
            stopped = [cache.stop.remote(STOP_S) for cache in caches]
            ray.wait(stopped, num_returns=len(stopped), timeout=STOP_S)
        for replica in replicas:
            replica.kill()
        for actor in [*([self._api.actor] if self._api else []), *caches]:
            ray.kill(actor)
        for group in self._groups.values():
            remove_placement_group(group)
        self._api, self._groups = None, {}

    def _place(self, replica_id: ReplicaId) -> None:
        """Find one node with room for all ranks of a replica."""
        worker = self._config.worker
        bundle = rank_bundle(self._config)
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

    def _make_replica(self, replica_id: ReplicaId, timeout_s: float) -> ReplicaActors:
        group = self._groups[replica_id]
        spec = ReplicaSpec(
            replica_id,
            group,
            self._config,
            self._secret_file,
            self._placement,
            cache_endpoint=lambda: self._caches.endpoint(_node_id(group)),
        )
        return ReplicaActors(
            spec,
            incarnation=self._incarnations(),
            timeout_s=timeout_s,
            make=_make,
            wait=ray.wait,
            get=ray.get,
            kill=ray.kill,
        )

    def _start_caches(self) -> None:
        """Have a cache server on each node with replicas, where there is a host cache."""
        if not self._config.cache.is_on:
            return
        self._progress("starting the host cache")
        calls: list[ObjectRef[CacheServerStarted]] = self._caches.place(
            [_node_id(group) for group in self._groups.values()]
        )
        self._caches.started(self._wait(calls, "the host cache"))

    def _load(self, replicas: dict[ReplicaId, ReplicaActors]) -> None:
        """Wait until all replicas serve; raise LaunchError for the first failure, or at the deadline."""
        waiting = dict(replicas)
        while waiting:
            for replica_id, replica in list(waiting.items()):
                try:
                    started = replica.poll()
                except ReplicaStartError as error:
                    raise LaunchError(str(error)) from None
                if started is not None:
                    self._started[replica_id] = started
                    del waiting[replica_id]
            self._wait_some([call for replica in waiting.values() for call in replica.calls], "the workers")

    def _targets(self) -> list[ScrapeTarget]:
        """Return all that serve metrics but the API server."""
        workers = [target for started in self._started.values() for target in started.targets]
        return [*workers, *self._caches.scrape_targets()]

    def _wait(self, refs: list[ObjectRef[T]], what: str) -> list[T]:
        """Return the results; raise LaunchError for the first failure or at the start's deadline."""
        waiting = list(refs)
        while waiting:
            done, waiting = self._wait_some(waiting, what)
            for ref in done:
                try:
                    ray.get(ref)
                except RayError as error:
                    raise LaunchError(failure_of(error)) from None
        return list(ray.get(refs))

    def _wait_some(
        self, refs: list[ObjectRef[T]], what: str
    ) -> tuple[list[ObjectRef[T]], list[ObjectRef[T]]]:
        """Wait a moment for one of the calls; return those done and those not."""
        if self._is_cancelled():
            raise LaunchCancelledError
        if self._is_ray_gone():
            raise LaunchError("Ray's own processes ended during the start; its log folder may say why")
        done, waiting = ray.wait(refs, num_returns=1, timeout=POLL_S) if refs else ([], [])
        if waiting and not done and self._left_s() <= 0:
            raise LaunchError(
                f"{what} did not answer within start_timeout_s = {self._config.start_timeout_s:g} s"
            )
        return done, waiting

    def _left_s(self) -> float:
        return max(0.0, self._deadline_s - time.monotonic())


def wait_until_done(
    calls: Sequence[ObjectRef[Any]],
    timeout_s: float,
    is_cut_short: Callable[[], bool],
    *,
    wait: Callable[..., tuple[list[ObjectRef[Any]], list[ObjectRef[Any]]]] = ray.wait,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Return when all calls are done or failed, when cut short, or at the deadline."""
    deadline_s = clock() + timeout_s
    left = list(calls)
    while left and not is_cut_short():
        if clock() >= deadline_s:
            logger.warning("the API server does not answer; going on without it")
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
