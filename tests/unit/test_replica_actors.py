"""One replica's actors: made at once, started once the first rank tells where to meet; no call waits."""

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from cluster.api.ports import ScrapeTarget
from cluster.config import ClusterConfig
from cluster.replica_actors import Placement, ReplicaActors, ReplicaSpec, ReplicaStarted, ReplicaStartError
from workers.config import WorkerConfig
from workers.worker import Worker, WorkerStarted

CONFIG = ClusterConfig(worker=WorkerConfig(tp_size=2))
PLACEMENT = Placement("127.0.0.1", stays_here=True, num_threads=3, spins=True)


class FakeCall:
    def __init__(self, name):
        self.name = name
        self.answer = None


class FakeRank:
    def __init__(self, options, arguments):
        self.options = options
        self.arguments = arguments
        self.calls = []
        self.is_killed = False
        self.started_with = None
        for name in ("rendezvous", "start"):
            setattr(self, name, FakeMethod(self, name))


class FakeMethod:
    def __init__(self, rank, name):
        self.rank, self.name = rank, name

    def remote(self, *arguments):
        self.rank.calls.append(FakeCall(self.name))
        if self.name == "start":
            self.rank.started_with = arguments
        return self.rank.calls[-1]


class FakeRay:
    def __init__(self):
        self.ranks = []

    def make(self, actor_class, options, *arguments):
        assert actor_class is Worker
        self.ranks.append(FakeRank(options, arguments))
        return self.ranks[-1]

    @staticmethod
    def wait(refs, *, timeout, num_returns=1):
        assert timeout == 0, "no call waits"
        assert num_returns == len(refs)
        return [ref for ref in refs if ref.answer is not None], []

    @staticmethod
    def get(ref):
        if isinstance(ref.answer, Exception):
            raise ref.answer
        return ref.answer

    @staticmethod
    def kill(rank):
        rank.is_killed = True


@pytest.fixture
def ray():
    return FakeRay()


@pytest.fixture
def replica(ray):
    spec = ReplicaSpec("replica-0", "group", CONFIG, "secret.file", PLACEMENT, lambda: "tcp://127.0.0.1:9")
    return ReplicaActors(
        spec, incarnation=77, timeout_s=120.0, make=ray.make, wait=ray.wait, get=ray.get, kill=ray.kill
    )


def record(rank):
    endpoint = "tcp://127.0.0.1:8000" if rank == 0 else None
    return WorkerStarted(endpoint, "card", f"127.0.0.1:900{rank}", "127.0.0.1", 100 + rank)


def meet(ray, replica):
    assert replica.poll() is None
    ray.ranks[0].calls[0].answer = ("127.0.0.1", 5000)
    assert replica.poll() is None


def test_its_ranks_share_an_incarnation_and_a_group(ray, replica):
    assert [rank.arguments[1:4] for rank in ray.ranks] == [("replica-0", 0, 77), ("replica-0", 1, 77)]
    strategies = [rank.options["scheduling_strategy"] for rank in ray.ranks]
    assert [strategy.placement_group_bundle_index for strategy in strategies] == [0, 1]
    assert {strategy.placement_group for strategy in strategies} == {"group"}
    assert ray.ranks[1].options["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] == "3"
    assert [member.name for member in replica.members] == ["replica-0 rank 0", "replica-0 rank 1"]


def test_all_ranks_start_once_the_first_says_where_they_meet(ray, replica):
    assert not replica.may_be_stopped
    meet(ray, replica)
    assert replica.may_be_stopped
    assert [rank.started_with for rank in ray.ranks] == [("127.0.0.1", 5000, 120.0, "tcp://127.0.0.1:9")] * 2
    assert len(replica.calls) == 2
    ray.ranks[1].calls[-1].answer = record(1)
    assert replica.poll() is None
    assert replica.calls == [ray.ranks[0].calls[-1]]
    ray.ranks[0].calls[-1].answer = record(0)
    labels = {"process": "worker", "replica": "replica-0", "node": "127.0.0.1"}
    assert replica.poll() == ReplicaStarted(
        "tcp://127.0.0.1:8000",
        [ScrapeTarget(f"127.0.0.1:900{rank}", {**labels, "rank": str(rank)}) for rank in (0, 1)],
    )


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            RayTaskError("start", "traceback", ValueError("no memory for kv_gb = 9")),
            "^no memory for kv_gb = 9$",
        ),
        (ActorDiedError(), "an actor died while it started"),
    ],
)
@pytest.mark.parametrize("rank", [None, 0, 1])
def test_a_rank_that_fails_is_told_in_its_own_words(ray, replica, rank, error, words):
    if rank is not None:
        meet(ray, replica)
    ray.ranks[rank or 0].calls[-1].answer = error
    with pytest.raises(ReplicaStartError, match=words):
        replica.poll()


def test_a_kill_takes_all_ranks(ray, replica):
    replica.kill()
    assert all(rank.is_killed for rank in ray.ranks)
