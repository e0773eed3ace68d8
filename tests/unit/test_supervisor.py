"""A lost replica is torn down whole and started again, a few times in a row; no round ever waits."""

import pytest
from ray.exceptions import ActorDiedError

from cluster.pings import Member, Pings
from cluster.replica_actors import ReplicaStarted, ReplicaStartError
from cluster.supervisor import MAX_PAUSE_ROUNDS, STEADY_ROUNDS, Supervisor

MAX_RESTARTS = 5
MAX_START_ROUNDS = 20
STARTED = ReplicaStarted("tcp://127.0.0.1:1", [])


class FakeRank:
    def __init__(self):
        self.answer = True
        self.ping = self

    def remote(self):
        return self


class FakeReplica:
    """`answer` is of its start: None while it takes its time."""

    may_be_stopped = True

    def __init__(self, replica_id, answer=STARTED, num_ranks=2):
        self.ranks = [FakeRank() for _ in range(num_ranks)]
        self.members = [Member(f"{replica_id} rank {n}", rank) for n, rank in enumerate(self.ranks)]
        self.answer = answer
        self.num_kills = 0

    def poll(self):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def kill(self):
        self.num_kills += 1

    def die(self):
        self.ranks[-1].answer = ActorDiedError()


class Service:
    """Replicas r0 and r1 under a Supervisor; `made` holds all incarnations, `news` what the API heard."""

    def __init__(self, max_restarts=MAX_RESTARTS):
        self.made = {"r0": [], "r1": []}
        self.news = []
        self.next_answer = STARTED
        self.num_rounds = 0
        self.started_in = []
        self.supervisor = Supervisor(
            self.start,
            self,
            Pings(self.wait, self.get),
            max_restarts=max_restarts,
            max_start_rounds=MAX_START_ROUNDS,
        )
        for replica_id in self.made:
            self.made[replica_id].append(FakeReplica(replica_id))
            self.supervisor.add(replica_id, self.made[replica_id][0])
        self.supervisor.serving()

    def start(self, replica_id):
        self.made[replica_id].append(FakeReplica(replica_id, self.next_answer))
        self.started_in.append(self.num_rounds)
        return self.made[replica_id][-1]

    def lost(self, replica_id, why):
        self.news.append((replica_id, "lost", why))

    def serves(self, replica_id, started):
        self.news.append((replica_id, "serves", started))

    @staticmethod
    def wait(refs, *, num_returns, timeout):
        assert timeout == 0, "a round never waits"
        return [rank for rank in refs if rank.answer is not None], []

    @staticmethod
    def get(rank):
        if isinstance(rank.answer, Exception):
            raise rank.answer
        return rank.answer

    def keep(self, num_rounds=1):
        for _ in range(num_rounds):
            self.num_rounds += 1
            self.supervisor.keep()


@pytest.fixture
def service():
    return Service()


def test_while_all_ranks_answer_nothing_takes_place(service):
    service.keep(100)
    assert service.news == [] and service.supervisor.failure() is None
    assert [len(made) for made in service.made.values()] == [1, 1]
    assert service.supervisor.actors == [service.made["r0"][0], service.made["r1"][0]]


def test_one_lost_rank_takes_its_whole_group_with_it_and_another_is_started_at_once(service):
    first = service.made["r0"][0]
    first.die()
    service.keep()
    assert first.num_kills == 1 and service.made["r1"][0].num_kills == 0
    assert len(service.made["r0"]) == 2 and len(service.made["r1"]) == 1
    [(replica_id, news, why)] = service.news
    assert (replica_id, news) == ("r0", "lost")
    assert why == "it is being restarted (rank 1: ActorDiedError: its process is gone or failed)"
    service.keep()
    assert service.news[1:] == [("r0", "serves", STARTED)]
    service.keep(STEADY_ROUNDS)
    assert len(service.news) == 2 and first.num_kills == 1
    assert service.supervisor.actors == [service.made["r0"][1], service.made["r1"][0]]


def test_a_silent_replica_is_lost_once_and_its_successor_gets_its_own_time(service):
    service.made["r0"][0].ranks[0].answer = None
    service.keep(61)
    assert len(service.made["r0"]) == 2
    service.keep(20)
    assert len(service.made["r0"]) == 2 and service.news[-1] == ("r0", "serves", STARTED)


def test_a_start_under_way_is_waited_for_without_asking_its_ranks(service):
    service.next_answer = None
    service.made["r0"][0].die()
    service.keep()
    heir = service.made["r0"][1]
    heir.die()  # its start call would say so
    service.keep(MAX_START_ROUNDS)
    assert len(service.made["r0"]) == 2 and heir.num_kills == 0
    service.keep()
    assert heir.num_kills == 1
    assert "its start took over 20 s" in service.news[-1][2]


def test_failed_starts_in_a_row_come_after_longer_and_longer_pauses_and_then_no_more(service):
    service.next_answer = ReplicaStartError("no memory")
    service.made["r0"][0].die()
    service.keep(200)
    gaps = [after - before for before, after in zip(service.started_in, service.started_in[1:], strict=False)]
    assert len(service.started_in) == MAX_RESTARTS
    assert gaps == [3, 5, 9, 17], "2, 4, 8 and 16, and the round in which it failed"
    assert all(replica.num_kills == 1 for replica in service.made["r0"])
    assert service.news[-1] == (
        "r0", "lost", "it stays down after 5 restarts in a row (its start failed: no memory)"
    )  # fmt: skip
    assert service.supervisor.failure() is None, "the other one serves"
    assert service.supervisor.actors == service.made["r1"]
    service.made["r1"][0].die()
    service.keep(200)
    assert service.supervisor.failure() == "r0: its start failed: no memory; r1: its start failed: no memory"
    assert service.supervisor.actors == []


def test_a_replica_that_dies_soon_after_each_start_is_given_up_as_well(service):
    service.made["r0"][0].die()
    for _ in range(200):
        service.keep(2)
        service.made["r0"][-1].die()
    assert len(service.made["r0"]) == 1 + MAX_RESTARTS
    assert "stays down" in service.news[-1][2]


def test_one_that_has_served_for_long_has_its_restarts_back(service):
    for _ in range(3 * MAX_RESTARTS):
        service.made["r0"][-1].die()
        service.keep(STEADY_ROUNDS + 2)
    assert len(service.made["r0"]) == 1 + 3 * MAX_RESTARTS
    assert service.news[-1] == ("r0", "serves", STARTED)


def test_pauses_are_bounded():
    service = Service(max_restarts=12)
    service.next_answer = ReplicaStartError("no memory")
    service.made["r0"][0].die()
    service.keep(1000)
    assert len(service.started_in) == 12
    assert service.started_in[-1] - service.started_in[-2] == MAX_PAUSE_ROUNDS + 1


def test_without_restarts_a_lost_replica_stays_down():
    service = Service(max_restarts=0)
    for replica_id in service.made:
        assert service.supervisor.failure() is None
        service.made[replica_id][0].die()
        service.keep(10)
    assert [len(made) for made in service.made.values()] == [1, 1]
    assert "rank 1: ActorDiedError" in service.supervisor.failure()
