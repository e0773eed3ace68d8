"""`ray job submit` of deploy/job.py to a cluster of its own: serves, and a stopped job leaves nothing."""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import psutil
import pytest

from tests.e2e.eyrie_process import free_port, is_listening, tiny_model

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


class RayHead:
    """`ray start --head` in a folder and on ports of its own; ended by pid."""

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # short: UNIX sockets lie below it
        token = self.folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        self.gcs_port, self.dashboard_port = free_port(), free_port()
        self.environment = {
            **os.environ,
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ADDRESS": f"127.0.0.1:{self.gcs_port}",
        }
        self.process = subprocess.Popen(
            [
                BIN / "ray", "start", "--head", "--block",
                f"--temp-dir={self.folder}", f"--port={self.gcs_port}",
                "--dashboard-host=127.0.0.1", f"--dashboard-port={self.dashboard_port}",
                "--num-cpus=4", "--object-store-memory=80000000",
                f"--metrics-export-port={_metrics_port()}", f"--ray-client-server-port={free_port()}",
                f"--dashboard-agent-listen-port={free_port()}", f"--dashboard-agent-grpc-port={free_port()}",
            ],
            env={k: v for k, v in self.environment.items() if k != "RAY_ADDRESS"},
            stdout=(self.folder / "out").open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        self.until(lambda: is_listening(self.dashboard_port), 120)

    def ray(self, *arguments, timeout_s=120):
        """Run a `ray` command against this cluster; return what it printed."""
        done = subprocess.run(
            [BIN / "ray", *arguments],
            env={**self.environment, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{self.dashboard_port}"},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def submit(self, name, *command):
        """Submit a job; the head takes none before its agent is up."""
        deadline = time.monotonic() + 90
        while True:
            try:
                return self.ray(
                    "job", "submit", "--no-wait", "--submission-id", name, "--working-dir", str(ROOT), "--",
                    *command,
                )  # fmt: skip
            except AssertionError as error:
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise
            time.sleep(1)

    def until_logged(self, name, text, timeout_s):
        deadline = time.monotonic() + timeout_s
        while text not in (log := self.ray("job", "logs", name)):
            assert time.monotonic() < deadline, log
            assert self.ray("job", "status", name).count("FAILED") == 0, log
            time.sleep(1)

    def state(self, kind):
        """Return the rows of `ray list KIND`."""
        return json.loads(self.ray("list", kind, "--format", "json", "--limit", "1000"))

    def until(self, condition, timeout_s):
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, (self.folder / "out").read_text()[-2000:]
            assert self.process.poll() is None, (self.folder / "out").read_text()[-2000:]
            time.sleep(0.5)

    def stop(self):
        family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGTERM)
        psutil.wait_procs(family, timeout=20)
        for process in family:
            if process.is_running():
                process.kill()
        self.process.wait(20)
        shutil.rmtree(self.folder, ignore_errors=True)


def _metrics_port():
    """Outside 10002-19999, which Ray wants for its workers."""
    while True:
        port = free_port()
        if not 10002 <= port <= 19999:
            return port


@pytest.fixture
def head():
    head = RayHead()
    yield head
    head.stop()


def shared_memory():
    return {path for path in Path("/dev/shm").iterdir() if "eyrie" in path.name}


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_submitted_job_serves_and_leaves_nothing_when_stopped(head, tmp_path):
    model = str(tiny_model(tmp_path / "tiny"))
    port = free_port()
    before = shared_memory()
    head.submit(
        "eyrie-test",
        "python", "-m", "deploy.job", model, "--load-format", "dummy", "--kv-gb", "0.05", "--port", str(port),
    )  # fmt: skip
    head.until_logged("eyrie-test", f"ready http://127.0.0.1:{port}", 180)
    answer = httpx.post(
        f"http://127.0.0.1:{port}/v1/completions",
        json={"model": model, "prompt": "hello", "max_tokens": 4},
        timeout=60,
    )
    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] > 0
    targets = [
        target["targets"][0] for target in httpx.get(f"http://127.0.0.1:{port}/metrics/targets").json()
    ]
    alive = [actor for actor in head.state("actors") if actor["state"] == "ALIVE"]
    ours = {actor["pid"] for actor in alive if actor["class_name"] in ("Worker", "ApiServer")}
    assert len(ours) == 2
    assert [group for group in head.state("placement-groups") if group["state"] == "CREATED"]

    head.ray("job", "stop", "eyrie-test")

    def is_gone():
        return not any(psutil.pid_exists(pid) for pid in ours)

    head.until(is_gone, 30)
    head.until(lambda: not _alive(head), 30)
    assert not [group for group in head.state("placement-groups") if group["state"] != "REMOVED"]
    assert not is_listening(port)
    for target in targets:
        address, _, target_port = target.rpartition(":")
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"http://{address}:{target_port}/metrics", timeout=2)
    head.until(lambda: shared_memory() <= before, 15)  # other tests' files are there for moments


def _alive(head):
    return [
        actor
        for actor in head.state("actors")
        if actor["class_name"] in ("Worker", "ApiServer") and actor["state"] != "DEAD"
    ]
