"""The run's folder and what an own Ray cluster is given.

Checked with a stand-in for `ray`, which opens its folder to everyone as Ray does, in processes of their own,
since starting Ray changes the environment.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from cache_service.processes import ProcessId
from cluster.local_ray import OwnRay
from cluster.run_folder import MAX_SOCKET_PATH_LEN, RunFolder

ROOT = Path(__file__).resolve().parents[2]
RAY = """
import os, time
def init(**options):
    if os.getenv("FAKE_RAY") == "times out":
        raise Exception("The current node timed out during startup.\\nMore of it.")
    if os.getenv("FAKE_RAY") == "finds no room":
        raise OSError(28, "No space left on device")
    if options["address"] == "local":
        os.makedirs(options["_temp_dir"], exist_ok=True)
        os.chmod(options["_temp_dir"], 0o777)
    print("shows", "each line" if os.getenv("RAY_DEDUP_LOGS") == "0" else "like lines once")
    is_plain = os.getenv("RAY_COLOR_PREFIX") == "0"
    print("(Worker)" if is_plain else "\\033[36m(Worker)\\033[0m", "says so")
    if os.getenv("FAKE_RAY") == "slow":
        time.sleep(2)
        print("initialised")
    if os.getenv("FAKE_RAY") == "fails":
        raise RuntimeError("\\033[36mray::Worker\\033[39m died")
class Context:
    gcs_address = "127.0.0.1:1"
def get_runtime_context():
    return Context
def shutdown():
    pass
"""
SHOW_VARIABLES = (
    "NO_COLOR",
    "FORCE_COLOR",
    "TTY_COMPATIBLE",
    "TTY_INTERACTIVE",
    "COLORTERM",
    "RAY_COLOR_PREFIX",
)
COLOUR = re.compile(r"\x1b\[([0-9]*;)*[349][0-7]m")
START = """
import json, os, sys
from cluster.local_ray import start_local_ray
from cluster.run_folder import RunFolder
folder = RunFolder()
folder.path.joinpath("cluster.secret").write_text("secret")
try:
    start_local_ray(folder, 1, 0)
except ConnectionError as error:
    print(json.dumps(str(error)))
    sys.exit()
modes = {name: path.stat().st_mode & 0o777 for name, path in (("run", folder.path), ("ray", folder.ray_path))}
print(json.dumps(modes))
folder.remove()
"""


@pytest.fixture
def run(tmp_path):
    (tmp_path / "ray.py").write_text(RAY)

    def run(script, **environment):
        path = os.pathsep.join([str(tmp_path), str(ROOT)])
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONPATH": path, **environment},
            cwd=tmp_path,
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.fixture
def start(tmp_path):
    """Start `eyrie serve` with stderr at a pipe or a terminal; return the process and stderr's other end."""
    (tmp_path / "ray.py").write_text(RAY)
    readers = []

    def start(*flags, is_terminal, **environment):
        reader, writer = os.openpty() if is_terminal else os.pipe()
        readers.append(reader)
        path = os.pathsep.join([str(tmp_path), str(ROOT)])
        plain = {name: value for name, value in os.environ.items() if name not in SHOW_VARIABLES}
        process = subprocess.Popen(
            [sys.executable, "-m", "cluster", "serve", "--port", "0", *flags],
            env={**plain, "PYTHONPATH": path, "TERM": "xterm", **environment},
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=writer,
        )
        os.close(writer)
        return process, reader

    yield start
    for reader in readers:
        os.close(reader)


@pytest.fixture
def serve(start):
    """Run `eyrie serve` over a Ray that fails to start; return what it said on stderr."""

    def serve(*flags, is_terminal, **environment):
        process, reader = start(*flags, is_terminal=is_terminal, FAKE_RAY="fails", **environment)
        said = read_until(reader, None)
        assert process.wait(60) == 1
        return said

    return serve


def read_until(reader, word):
    said = b""
    with contextlib.suppress(OSError):  # a terminal ends in EIO
        while (word is None or word not in said) and (piece := os.read(reader, 65536)):
            said += piece
    return said.decode()


@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1"}])
def test_redirected_logs_and_progress_carry_no_colour_codes(serve, environment):
    said = serve(is_terminal=False, **environment)
    assert "starting a local Ray cluster\n" in said
    assert "(Worker) says so\n" in said
    assert "eyrie: cannot use Ray: ray::Worker died\n" in said
    assert "\x1b" not in said


def test_a_terminal_shows_colours_unless_no_color_is_set(serve):
    assert COLOUR.search(serve(is_terminal=True))
    said = serve(is_terminal=True, NO_COLOR="1")
    assert "says so" in said and "ray::Worker died" in said
    assert not COLOUR.search(said)


@pytest.mark.parametrize("flags", [[], ["--ray-address", "auto"]])
def test_ray_holds_back_no_line_of_an_actor_s_log_on_either_kind_of_cluster(serve, flags):
    assert "shows each line\n" in serve(*flags, is_terminal=False)


def test_the_folder_with_the_secrets_stays_private_though_ray_opens_its_own(run):
    assert run(START) == {"run": 0o700, "ray": 0o777}


def test_what_keeps_ray_from_starting_is_told_in_one_line(run):
    assert run(START, FAKE_RAY="times out") == (
        "The current node timed out during startup. Try again when the machine is less busy."
    )
    assert run(START, FAKE_RAY="finds no room") == "OSError: [Errno 28] No space left on device"


@pytest.mark.parametrize("root_len", [8, 35, 60])
def test_rays_sockets_fit_into_a_sockets_path(tmp_path, monkeypatch, root_len):
    root = Path("/tmp") / f"t{os.getpid()}".ljust(root_len - len("/tmp/"), "x")
    root.mkdir(exist_ok=True)
    monkeypatch.setattr("tempfile.tempdir", str(root))
    folder = RunFolder()
    session = f"session_2026-01-01_00-00-00_000000_{4_194_304}"
    try:
        assert len(str(folder.ray_path / session / "sockets" / "plasma_store")) <= MAX_SOCKET_PATH_LEN
        assert folder.path.is_relative_to(root) == (root_len == 8)
    finally:
        folder.remove()
        root.rmdir()


PARENT = """
import subprocess, sys
subprocess.run([sys.executable, "-c", "import time; time.sleep(600)"], process_group=0)
"""


@pytest.fixture
def daemon():
    """A process with a child in a group of its own, as raylet and worker; yields both."""
    process = subprocess.Popen([sys.executable, "-c", PARENT])
    deadline_s = time.monotonic() + 30
    while not psutil.Process(process.pid).children():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    children = psutil.Process(process.pid).children()
    yield ProcessId.of(process.pid), ProcessId.of(children[0].pid)
    for one in (*children, process):
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait(10)


@pytest.fixture
def gcs():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def address(listener):
    return f"127.0.0.1:{listener.getsockname()[1]}"


def until(condition):
    deadline_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_ray_is_gone_once_one_of_its_processes_is_and_what_outlives_it_is_ended(daemon, gcs):
    raylet, actor = daemon
    own = OwnRay([raylet], address(gcs))
    assert not own.is_gone()
    os.kill(raylet.pid, signal.SIGKILL)
    until(own.is_gone)
    assert actor.is_alive(), "an orphan"
    own.end()
    until(lambda: not actor.is_alive())


def test_the_children_of_who_has_a_dead_daemons_pid_are_nobody_s_actors(daemon, gcs):
    stranger, child = daemon
    own = OwnRay([replace(stranger, start_ticks=stranger.start_ticks - 1)], address(gcs))
    assert own.is_gone()
    own.end()
    time.sleep(0.1)  # a signal takes a moment
    assert stranger.is_alive() and child.is_alive()


def test_a_daemon_that_ends_while_its_children_are_listed_may_have_a_stranger_s(daemon, gcs):
    raylet, child = daemon

    def children_of(pid):
        os.kill(pid, signal.SIGKILL)
        until(lambda: not raylet.is_alive())
        return [child]

    own = OwnRay([raylet], address(gcs), children_of)
    assert own.is_gone()
    own.end()
    time.sleep(0.1)
    assert child.is_alive()


def test_ray_is_gone_once_its_gcs_is_deaf_though_it_lives(daemon, gcs):
    raylet, actor = daemon
    own = OwnRay([raylet], address(gcs))
    assert not own.is_gone()
    gcs.close()
    assert own.is_gone()
    own.end()
    until(lambda: not raylet.is_alive() and not actor.is_alive())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_signal_while_ray_starts_is_answered_at_once_and_nothing_more_is_started(
    start, number, is_terminal
):
    process, reader = start(is_terminal=is_terminal, FAKE_RAY="slow")
    said = read_until(reader, b"says so")
    process.send_signal(number)
    said += read_until(reader, None)
    assert process.wait(60) == 0
    assert said.index("says so") < said.index("stopping...") < said.index("initialised")
    assert "starting the HTTP server" not in said
