"""ReplicaActors: the Worker actors of one replica, a TP group on one node, from making to their end.

Made by the Launcher, and again in a lost replica's place; in its thread. No call ever waits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import ObjectRef
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.api.ports import ScrapeTarget
from cluster.config import ClusterConfig
from cluster.pings import Handle, Member, failure_of
from workers.protocol import ReplicaId
from workers.worker import Worker, WorkerStarted

SPIN_COUNT = 300
"""Of a compute thread that waits for its peers: some 15 us. More pays only while no other process wants the
cores: beside one that does, SmolLM2's decode step took 29 ms at 300 and 219 ms at 20,000."""


class ReplicaStartError(Exception):
    """A replica cannot start; the message is fit for the user."""


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


@dataclass(frozen=True)
class ReplicaSpec:
    """What every start of a replica has in common."""

    replica_id: ReplicaId
    group: PlacementGroup
    """A bundle for each rank, all on one node."""
    config: ClusterConfig
    secret_file: Path
    placement: Placement
    cache_endpoint: Callable[[], str | None]
    """Returns where the node's CacheServer listens; None: no page leaves the device. Asked once the first
    rank has its place."""


@dataclass(frozen=True)
class ReplicaStarted:
    """A replica that serves."""

    endpoint: str
    """Its inbox."""
    targets: list[ScrapeTarget]


class ReplicaActors:
    """Makes the actors of one incarnation at once; `poll` goes on with their start.

    `make`, `wait`, `get` and `kill` are ray's; `timeout_s` is for the ranks to meet and load.
    """

    def __init__(
        self,
        spec: ReplicaSpec,
        *,
        incarnation: int,
        timeout_s: float,
        make: Callable[..., Handle],
        wait: Callable[..., tuple[list[Any], list[Any]]],
        get: Callable[[Any], Any],
        kill: Callable[[Handle], None],
    ) -> None:
        self._spec = spec
        self._timeout_s = timeout_s
        self._wait = wait
        self._get = get
        self._kill = kill
        actors = [
            make(
                Worker,
                self._options(rank),
                spec.config.worker,
                spec.replica_id,
                rank,
                incarnation,
                spec.placement.num_threads,
                spec.placement.node_address,
                spec.secret_file,
                spec.config.log_level,
            )
            for rank in range(spec.config.worker.tp_size)
        ]
        self.members = [Member(f"{spec.replica_id} rank {rank}", actor) for rank, actor in enumerate(actors)]
        self._meeting: ObjectRef[tuple[str, int]] | None = actors[0].rendezvous.remote()
        self._starts: list[ObjectRef[WorkerStarted]] = []
        self._records: dict[ObjectRef[WorkerStarted], WorkerStarted] = {}

    @property
    def calls(self) -> list[ObjectRef[Any]]:
        """The calls whose answers `poll` waits for."""
        meeting = [] if self._meeting is None else [self._meeting]
        return [*meeting, *(start for start in self._starts if start not in self._records)]

    @property
    def may_be_stopped(self) -> bool:
        """Whether the ranks have begun: they may have something to give back, and answer."""
        return self._meeting is None

    def poll(self) -> ReplicaStarted | None:
        """Go on with the start as far as answers have come; return what serves once every rank steps.

        Raise ReplicaStartError, in the actor's own words, when one fails.
        """
        if self._meeting is not None:
            if not self._wait([self._meeting], timeout=0)[0]:
                return None
            host, port = self._answer(self._meeting)
            self._meeting = None
            cache = self._spec.cache_endpoint()
            for member in self.members:
                self._starts.append(member.actor.start.remote(host, port, self._timeout_s, cache))
        calls = self.calls
        for call in self._wait(calls, num_returns=len(calls), timeout=0)[0]:
            self._records[call] = self._answer(call)
        if len(self._records) < len(self._starts):
            return None
        return _started(self._spec.replica_id, [self._records[start] for start in self._starts])

    def kill(self) -> None:
        """End every rank, whatever it does."""
        for member in self.members:
            self._kill(member.actor)

    def _answer(self, call: ObjectRef[Any]) -> Any:
        try:
            return self._get(call)
        except RayError as error:
            raise ReplicaStartError(failure_of(error)) from None

    def _options(self, rank: int) -> dict[str, Any]:
        """Return Ray's options of one rank."""
        placement = self._spec.placement
        strategy = PlacementGroupSchedulingStrategy(self._spec.group, placement_group_bundle_index=rank)
        environment = {
            # Thread wake-ups decide the speed of a small model on CPU: spin briefly on cores of one's own.
            "OMP_NUM_THREADS": str(placement.num_threads),
            "OMP_WAIT_POLICY": "PASSIVE",
            "GOMP_SPINCOUNT": str(SPIN_COUNT) if placement.spins else "0",
        }
        bundle = rank_bundle(self._spec.config)
        return {
            "num_cpus": bundle["CPU"],
            "num_gpus": bundle.get("GPU", 0.0),
            "max_concurrency": 4,
            "scheduling_strategy": strategy,
            "runtime_env": {"env_vars": environment},
        }


def rank_bundle(config: ClusterConfig) -> dict[str, float]:
    """Return the resources that one rank claims."""
    return {"CPU": 1.0, "GPU": 1.0} if config.worker.device == "cuda" else {"CPU": 1.0}


def _started(replica_id: ReplicaId, records: Sequence[WorkerStarted]) -> ReplicaStarted:
    endpoint = records[0].endpoint
    assert endpoint is not None, "rank 0 has an inbox"
    targets = [
        ScrapeTarget(
            record.metrics_address,
            {"process": "worker", "replica": replica_id, "rank": str(rank), "node": record.node},
        )
        for rank, record in enumerate(records)
    ]
    return ReplicaStarted(endpoint, targets)
