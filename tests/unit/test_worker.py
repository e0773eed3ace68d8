"""The worker without Ray: what a stop at an awkward time leaves behind."""

import gc
import secrets
import time

import pytest

from cache_service.curve import write_cluster_secret
from tests.e2e.eyrie_process import is_listening, tiny_model
from workers.config import WorkerConfig
from workers.protocol import ReplicaId
from workers.rank import warn_of_short_context
from workers.worker import Worker, WorkerStartError


def test_a_stop_while_it_loads_ends_the_rank_when_it_is_built(tmp_path):
    model = tiny_model(tmp_path / "tiny")
    secret_file = tmp_path / "cluster.secret"
    write_cluster_secret(secret_file, secrets.token_bytes(32))
    config = WorkerConfig(model=str(model), load_format="dummy", kv_gb=0.02)
    worker = Worker(config, ReplicaId("replica-0"), 0, 7, 1, "127.0.0.1", secret_file, "warning")
    host, port = worker.rendezvous()
    worker.stop(0.0)  # there is no rank yet
    gc.unfreeze()
    with pytest.raises(WorkerStartError, match="stopped while it started"):
        worker.start(host, port, 60.0)
    deadline_s = time.monotonic() + 20
    while worker.ping() and time.monotonic() < deadline_s:
        time.sleep(0.02)
    assert not worker.ping()
    assert not is_listening(port)
    assert gc.get_freeze_count() > 10_000, "a collection while it serves looks at every module's objects"
    gc.unfreeze()


def test_what_a_worker_has_loaded_is_not_looked_at_by_collections_while_it_serves(tmp_path):
    model = tiny_model(tmp_path / "tiny")
    secret_file = tmp_path / "cluster.secret"
    write_cluster_secret(secret_file, secrets.token_bytes(32))
    config = WorkerConfig(model=str(model), load_format="dummy", kv_gb=0.02)
    worker = Worker(config, ReplicaId("replica-0"), 0, 7, 1, "127.0.0.1", secret_file, "warning")
    gc.unfreeze()
    try:
        worker.start(*worker.rendezvous(), 60.0)
        deadline_s = time.monotonic() + 20
        while not gc.get_freeze_count() and time.monotonic() < deadline_s:
            time.sleep(0.02)
        assert gc.get_freeze_count() > 50_000
    finally:
        assert worker.stop(20.0)
        gc.unfreeze()


def test_a_context_cut_by_the_pool_is_told_with_what_to_raise(caplog):
    warn_of_short_context(2048, 2048)
    assert not caplog.records
    warn_of_short_context(16, 2048)
    assert "hold 16 tokens of the model's context of 2048" in caplog.text and "kv_gb" in caplog.text


def test_options_that_hold_no_page_are_told_in_a_line_and_logged_without_a_traceback(tmp_path, capfd):
    model = tiny_model(tmp_path / "tiny")
    secret_file = tmp_path / "cluster.secret"
    write_cluster_secret(secret_file, secrets.token_bytes(32))
    config = WorkerConfig(model=str(model), load_format="dummy", kv_gb=1e-9)
    worker = Worker(config, ReplicaId("replica-0"), 0, 7, 1, "127.0.0.1", secret_file, "info")
    host, port = worker.rendezvous()
    with pytest.raises(WorkerStartError, match="kv_gb=1e-09 holds no page") as raised:
        worker.start(host, port, 60.0)
    assert len(str(raised.value).splitlines()) == 1
    said = capfd.readouterr().err
    assert "Traceback" not in said and "failure=" not in said and "File " not in said
