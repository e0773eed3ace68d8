"""The API server's actor without Ray: what it calls its node."""

import logging
import secrets

import httpx
import pytest

from cache_service.curve import write_cluster_secret
from cluster.api.server import ApiServer
from cluster.config import ClusterConfig
from tests.e2e.eyrie_process import tiny_model
from workers.config import WorkerConfig


@pytest.fixture
def logging_restored():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
async def test_it_names_its_node_as_the_workers_of_an_own_cluster_do(tmp_path, host, logging_restored):
    secret_file, keys_file = tmp_path / "cluster.secret", tmp_path / "api.keys"
    write_cluster_secret(secret_file, secrets.token_bytes(32))
    keys_file.touch(mode=0o600)
    model = str(tiny_model(tmp_path / "tiny"))
    config = ClusterConfig(host=host, port=0, log_level="warning", worker=WorkerConfig(model=model))
    server = ApiServer(config, secret_file, keys_file, "127.0.0.1")
    started = await server.start({}, [], {})
    try:
        port = started.url.rpartition(":")[2]
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            targets = (await client.get("/metrics/targets")).json()
            metrics = (await client.get("/metrics")).text
    finally:
        assert await server.stop(10.0)
    assert started.node == "127.0.0.1"
    assert targets == [{"targets": [f"127.0.0.1:{port}"], "labels": {"node": "127.0.0.1"}}]
    assert 'node="127.0.0.1"' in metrics
