"""The CacheServer actor on a Ray cluster: it starts, serves, is killed, is started again, stops."""

import os
import signal
import urllib.request

import pytest
import ray
from ray.exceptions import RayTaskError

from cache_service.arena_files import arena_path
from cache_service.client import CacheClient, ClientSpec
from cache_service.config import CacheConfig
from cache_service.curve import new_cluster_secret, write_cluster_secret
from cache_service.identity import cluster_id_of
from cache_service.server_actor import CacheServer
from cluster.local_ray import OBJECT_STORE_BYTES
from cluster.run_folder import RunFolder
from tests.unit.arenas import FINGERPRINT
from tests.unit.cache_nodes import BUNDLE_BYTES, QUICK, eventually, store_chain

SECRET = new_cluster_secret()
ARENA = arena_path(cluster_id_of(SECRET), "127.0.0.1")
WAIT_S = 60


@pytest.fixture(scope="module")
def secret_file():
    """An own Ray, without a token: pytest's process has imported ray. Yields the secret's file."""
    folder = RunFolder()
    environment = pytest.MonkeyPatch()
    environment.setenv("RAY_AUTH_MODE", "disabled")
    try:
        ray.init(
            address="local",
            _temp_dir=str(folder.ray_path),
            include_dashboard=False,
            num_cpus=2,
            object_store_memory=OBJECT_STORE_BYTES,
            log_to_driver=False,
        )
        path = folder.path / "cluster.secret"
        write_cluster_secret(path, SECRET)
        yield path
    finally:
        ray.shutdown()
        environment.undo()
        folder.remove()


def make(config, secret_file, ports=None):
    options = {"num_cpus": 0, "max_concurrency": 4}
    return ray.remote(CacheServer).options(**options).remote(config, "127.0.0.1", ports, secret_file, "info")


def test_pages_outlive_a_killed_actor_and_go_with_a_stopped_one(secret_file):
    config = CacheConfig(host_cache_gb=1 / 1024)
    actor = make(config, secret_file)
    assert ray.get(actor.ping.remote(), timeout=WAIT_S)
    started = ray.get(actor.start.remote(), timeout=WAIT_S)
    client = CacheClient(
        started.endpoint, SECRET, ClientSpec(FINGERPRINT, BUNDLE_BYTES, 1, group=1), patience=QUICK
    )
    client.start(WAIT_S)
    keys, locations = store_chain(client, "abc")
    eventually(lambda: ray.get(actor.stats.remote(), timeout=WAIT_S).num_ready == 3, WAIT_S)
    with urllib.request.urlopen(f"http://{started.metrics_address}/metrics", timeout=WAIT_S) as answer:
        assert b'eyrie_cache_slots{node="127.0.0.1",state="ready"} 3.0' in answer.read()
    os.kill(started.pid, signal.SIGKILL)
    eventually(lambda: not client.connection.is_attached, WAIT_S)
    heir = make(config, secret_file, started.ports)
    again = ray.get(heir.start.remote(), timeout=WAIT_S)
    assert (again.endpoint, again.broadcasts, again.ports) == (
        started.endpoint,
        started.broadcasts,
        started.ports,
    )
    eventually(lambda: client.stats.num_attaches == 2, WAIT_S)
    assert client.acquire(keys, locations) == 3
    client.release([location.slot for location in locations])
    client.close()
    assert ray.get(heir.ping.remote(), timeout=WAIT_S) and ARENA.exists()
    assert ray.get(heir.stop.remote(10.0), timeout=WAIT_S)
    assert not ray.get(heir.ping.remote(), timeout=WAIT_S) and not ARENA.exists()


def test_a_start_that_cannot_be_is_told(secret_file, tmp_path):
    with pytest.raises(
        RayTaskError, match=r"cannot start: the host cache needs [\d.]+ GiB, but this machine"
    ):
        ray.get(make(CacheConfig(host_cache_gb=1e6), secret_file).start.remote(), timeout=WAIT_S)
    with pytest.raises(RayTaskError, match=r"cannot start: secret file .*none: No such file"):
        ray.get(make(CacheConfig(host_cache_gb=1), tmp_path / "none").start.remote(), timeout=WAIT_S)
