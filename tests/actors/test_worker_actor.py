"""Worker actors on a Ray cluster: a TP group starts, serves through its inbox, stops; a bad start is told."""

import secrets
from pathlib import Path

import psutil
import pytest
import ray
from ray.exceptions import RayTaskError

from cache_service.curve import write_cluster_secret
from cluster.local_ray import OBJECT_STORE_BYTES
from cluster.replica import Replica
from cluster.run_folder import RunFolder
from tests.e2e.eyrie_process import is_listening, tiny_model
from workers.card import load_card
from workers.config import WorkerConfig
from workers.protocol import ReplicaId, RequestId, SamplingParams, SubmitRequest
from workers.worker import Worker, WorkerStartError

SECRET = secrets.token_bytes(32)


@pytest.fixture(scope="module")
def cluster():
    """An own Ray, without a token: pytest's process has imported ray. Yields the secret's file."""
    folder = RunFolder()
    environment = pytest.MonkeyPatch()
    environment.setenv("RAY_AUTH_MODE", "disabled")
    try:
        ray.init(
            address="local",
            _temp_dir=str(folder.ray_path),
            include_dashboard=False,
            num_cpus=4,
            object_store_memory=OBJECT_STORE_BYTES,
            log_to_driver=False,
        )
        secret_file = folder.path / "cluster.secret"
        write_cluster_secret(secret_file, SECRET)
        yield secret_file
    finally:
        ray.shutdown()
        environment.undo()
        folder.remove()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_model(tmp_path_factory.mktemp("model") / "tiny"))


def make_workers(config, secret_file, num_ranks):
    return [
        ray.remote(Worker)
        .options(num_cpus=0, max_concurrency=4)
        .remote(config, ReplicaId("replica-0"), rank, 7, 1, "127.0.0.1", secret_file, "info")
        for rank in range(num_ranks)
    ]


class Deaf:
    def welcomed(self, welcome):
        pass

    def stepped(self, load, kv_events, answered, now_s):
        return True

    def lost(self):
        pass


@pytest.mark.timeout(240)
@pytest.mark.parametrize("depth", [0, 1])
async def test_a_group_of_two_serves_through_its_inbox_and_stops(cluster, model, depth):
    config = WorkerConfig(
        model=model, load_format="dummy", tp_size=2, kv_gb=0.02, kv_sanitizer=True, overlap_depth=depth
    )
    workers = make_workers(config, cluster, 2)
    host, port = ray.get(workers[0].rendezvous.remote(), timeout=60)
    leader, follower = ray.get([w.start.remote(host, port, 120.0) for w in workers], timeout=150)
    assert follower.endpoint is None
    assert leader.card_digest == follower.card_digest == load_card(model).digest()
    assert ray.get([w.ping.remote() for w in workers], timeout=30) == [True, True]

    replica = Replica(
        ReplicaId("replica-0"), leader.endpoint, SECRET, "test", Deaf(), card_digest=leader.card_digest
    )
    await replica.start()
    welcome = await replica.wait_ready(20.0)
    assert (welcome.replica_id, welcome.incarnation) == ("replica-0", 7)
    sampling = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    stream = replica.submit(SubmitRequest(RequestId("a"), [1, 2, 3], sampling))
    outputs = [output async for output in stream]
    assert sum(len(output.token_ids) for output in outputs) == 5
    assert outputs[-1].finish_reason == "length"
    endless = SamplingParams(temperature=0.0, ignore_eos=True)
    running = replica.submit(SubmitRequest(RequestId("b"), [1, 2, 3], endless))
    await anext(running)

    # The follower is told first: it must wait for rank 0, whose steps need it.
    stopped = [workers[1].stop.remote(20.0), workers[0].stop.remote(20.0)]
    assert ray.get(stopped, timeout=60) == [True, True]
    assert [output async for output in running][-1].finish_reason == "shutdown"
    await replica.close()
    assert not is_listening(int(leader.endpoint.rpartition(":")[2]))
    for worker in workers:
        ray.kill(worker)
    _, alive = psutil.wait_procs([psutil.Process(leader.pid), psutil.Process(follower.pid)], timeout=20)
    assert not alive


@pytest.mark.timeout(240)
def test_a_failed_start_is_told_in_words(cluster, model):
    config = WorkerConfig(model=model, load_format="dummy", kv_gb=0.02)
    (worker,) = make_workers(config, Path("/no/such/secret"), 1)
    host, port = ray.get(worker.rendezvous.remote(), timeout=60)
    with pytest.raises(RayTaskError) as raised:
        ray.get(worker.start.remote(host, port, 100.0), timeout=120)
    assert isinstance(raised.value.cause, WorkerStartError)
    assert "/no/such/secret" in str(raised.value.cause)
    assert "Traceback" not in str(raised.value.cause)
    ray.kill(worker)
