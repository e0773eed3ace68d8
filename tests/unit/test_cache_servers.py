"""The launcher's cache servers: one a node, started again on their ports when lost; no round ever waits."""

import pytest
from ray.exceptions import ActorDiedError

from cache_service.config import CacheConfig
from cache_service.server_actor import CacheServer, CacheServerStarted, Ports
from cluster.api.ports import ScrapeTarget
from cluster.cache_servers import MAX_START_ROUNDS, PAUSE_ROUNDS, CacheServers
from cluster.config import ClusterConfig

CONFIG = ClusterConfig(cache=CacheConfig(host_cache_gb=1))


class FakeCall:
    def __init__(self, result):
        self.result = result


class FakeMethod:
    def __init__(self, result):
        self.result = result

    def remote(self):
        return FakeCall(self.result())


class FakeServer:
    """An actor: `answer` is of its start, None while it takes its time; `ping_answer` of its pings."""

    def __init__(self, ray, arguments):
        self.arguments = arguments
        self.ping_answer = True
        self.is_killed = False
        ports = arguments[2] or Ports(7000 + ray.num_made, 8000 + ray.num_made, 9000 + ray.num_made)
        self.record = CacheServerStarted(
            f"tcp://10.0.0.1:{ports.calls}", f"tcp://10.0.0.1:{ports.broadcasts}",
            f"10.0.0.1:{ports.metrics}", ports, "10.0.0.1", 1,
        )  # fmt: skip
        self.answer = self.record
        self.start = FakeMethod(lambda: lambda: self.answer)
        self.ping = FakeMethod(lambda: lambda: self.ping_answer)


class FakeRay:
    def __init__(self):
        self.made = []
        self.next_answers = []

    @property
    def num_made(self):
        return len(self.made)

    def make(self, actor_class, options, *arguments):
        assert actor_class is CacheServer and options["num_cpus"] == 0
        assert options["scheduling_strategy"].soft is False
        server = FakeServer(self, arguments)
        server.node_id = options["scheduling_strategy"].node_id
        if self.next_answers:
            server.answer = self.next_answers.pop(0)
        self.made.append(server)
        return server

    @staticmethod
    def wait(refs, *, timeout, num_returns=1):
        assert timeout == 0, "a round never waits"
        return [ref for ref in refs if ref.result() is not None], []

    @staticmethod
    def get(ref):
        if isinstance(ref.result(), Exception):
            raise ref.result()
        return ref.result()

    @staticmethod
    def kill(actor):
        actor.is_killed = True


@pytest.fixture
def ray():
    return FakeRay()


@pytest.fixture
def servers(ray):
    servers = CacheServers(CONFIG, "secret.file", None, ray.make, ray.wait, ray.get, ray.kill)
    calls = servers.place(["a" * 56, "b" * 56, "a" * 56])
    servers.started([ray.get(call) for call in calls])
    return servers


def test_each_node_has_one_server(ray, servers):
    assert [server.node_id for server in ray.made] == ["a" * 56, "b" * 56]
    found = [servers.endpoint(letter * 56) for letter in "abc"]
    assert found == ["tcp://10.0.0.1:7000", "tcp://10.0.0.1:7001", None]
    assert servers.scrape_targets()[1] == ScrapeTarget(
        "10.0.0.1:9001", {"process": "cache", "node": "10.0.0.1"}
    )
    for _ in range(5):
        servers.keep()
    assert servers.actors == ray.made and ray.num_made == 2
    assert ray.made[0].arguments == (CONFIG.cache, None, None, "secret.file", "info")


@pytest.mark.parametrize("why", [ActorDiedError(), False])
def test_a_lost_server_is_started_again_on_its_ports(ray, servers, why):
    ray.next_answers = [None]
    ray.made[0].ping_answer = why
    servers.keep()
    assert ray.num_made == 3 and ray.made[0].is_killed and not ray.made[1].is_killed
    heir = ray.made[2]
    assert heir.node_id == "a" * 56 and heir.arguments[2] == Ports(7000, 8000, 9000)
    for _ in range(20):  # it takes its time, and nobody asks for a third
        servers.keep()
    assert ray.num_made == 3
    heir.answer = heir.record
    servers.keep()
    assert servers.endpoint("a" * 56) == "tcp://10.0.0.1:7000"
    assert servers.actors == [heir, ray.made[1]]
    heir.ping_answer = False
    servers.keep()
    assert ray.num_made == 4


def test_a_start_that_fails_is_tried_again_after_a_pause(ray, servers):
    former = servers.endpoint("b" * 56)
    ray.next_answers = [ActorDiedError(), ActorDiedError()]
    ray.made[1].ping_answer = False
    servers.keep()
    servers.keep()
    assert ray.num_made <= 4
    assert servers.endpoint("b" * 56) == former, "a replica that starts meanwhile finds it once it is there"
    for _ in range(2 * PAUSE_ROUNDS + 2):
        servers.keep()
    assert ray.num_made == 5
    assert ray.made[4].arguments[2] == Ports(7001, 8001, 9001), "the ports are remembered"
    servers.keep()
    servers.keep()
    assert ray.num_made == 5 and servers.actors[1] is ray.made[4]


def test_a_start_that_hangs_is_given_up(ray, servers):
    ray.next_answers = [None]
    ray.made[1].ping_answer = False
    servers.keep()
    servers.keep()
    hanging = servers.actors[1]
    num_made = ray.num_made
    for _ in range(MAX_START_ROUNDS - 2):
        servers.keep()
    assert (servers.actors[1], ray.num_made) == (hanging, num_made)
    for _ in range(4):
        servers.keep()
    assert hanging.is_killed
    assert ray.num_made == num_made + 1
    assert servers.actors[1] is not hanging
