"""Two Ray nodes, each in a network namespace of its own, joined by one link that can be cut and slowed down.

    this namespace  10.204.N.1 ---- 10.204.N.2  node a  10.203.N.1 ==== link ==== 10.203.N.2  node b

Everything is made with `ip`, as root, and removed again; processes are ended by pid.
"""

import contextlib
import itertools
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

BIN = Path(sys.executable).parent
GCS_PORT = 6379
WIRE = "wire"
"""The link's device on both nodes."""
_numbers = itertools.count()


def missing() -> str | None:
    """Return what this machine lacks for it."""
    if os.geteuid() != 0:
        return "network namespaces are made by root only"
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"no `{tool}` command; install iproute2"
    name = f"eyrie-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"no network namespaces here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return None


class TwoNodes:
    """Namespaces, links and, if wanted, `ray start` on both sides; use as a context manager."""

    def __init__(self, *, has_ray=True):
        self._has_ray = has_ray
        self._number = next(_numbers)
        number = (os.getpid() + self._number) % 250 + 1
        self.names = {side: f"eyrie-{side}-{os.getpid()}-{self._number}" for side in "ab"}
        self.addresses = {"a": f"10.203.{number}.1", "b": f"10.203.{number}.2"}
        self.front = f"10.204.{number}.2"
        """Where this namespace reaches node a."""
        self.head = f"{self.addresses['a']}:{GCS_PORT}"
        self._back = f"10.204.{number}.1"
        self.folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # short: UNIX sockets lie below it
        token = self.folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        self.environment = {
            **os.environ,
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self._processes = []

    def __enter__(self):
        try:
            self._make_links()
            if self._has_ray:
                head = ["--head", f"--port={GCS_PORT}", "--include-dashboard=false"]
                self._start_ray("a", *head, f"--temp-dir={self.folder}")
                self._until_healthy()
                self._start_ray("b", f"--address={self.head}")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for process in reversed(self._processes):
            end_family(process)
        for name in self.names.values():
            end_all_inside(name)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)  # with its ends of the links
        shutil.rmtree(self.folder, ignore_errors=True)

    def inside(self, side, *command):
        """Return a command that runs on a node."""
        return ["ip", "netns", "exec", self.names[side], *map(str, command)]

    def run(self, side, *command):
        return subprocess.run(self.inside(side, *command), check=True, capture_output=True, text=True).stdout

    def arena(self, side):
        """Return the file of a node's host cache: this machine's nodes share one /dev/shm."""
        (found,) = Path("/dev/shm").glob(f"eyrie-*-{self.addresses[side]}.arena")
        return found

    def received_bytes(self, side):
        """Return how many bytes have come over the link."""
        return int(self.run(side, "cat", f"/sys/class/net/{WIRE}/statistics/rx_bytes"))

    def cut(self):
        """No packet passes the link any more; nobody is told."""
        self.run("b", "ip", "link", "set", WIRE, "down")

    def mend(self):
        self.run("b", "ip", "link", "set", WIRE, "up")

    def slow_down(self, megabits):
        """What node b sends passes the link at this rate; None: as fast as it can."""
        if megabits is None:
            self.run("b", "tc", "qdisc", "del", "dev", WIRE, "root")
        else:
            shape = ["tbf", "rate", f"{megabits}mbit", "burst", "64kbit", "latency", "100ms"]
            self.run("b", "tc", "qdisc", "replace", "dev", WIRE, "root", *shape)

    def _make_links(self):
        for name in self.names.values():
            _ip("netns", "add", name)
        a, b = self.names["a"], self.names["b"]
        _ip("link", "add", WIRE, "netns", a, "type", "veth", "peer", "name", WIRE, "netns", b)
        near = f"eyf{os.getpid()}n{self._number}"[:15]
        _ip("link", "add", near, "type", "veth", "peer", "name", "front", "netns", a)
        _ip("addr", "add", f"{self._back}/24", "dev", near)
        _ip("link", "set", near, "up")
        self.run("a", "ip", "addr", "add", f"{self.front}/24", "dev", "front")
        self.run("a", "ip", "link", "set", "front", "up")
        for side, address in self.addresses.items():
            self.run(side, "ip", "addr", "add", f"{address}/24", "dev", WIRE)
            for device in ("lo", WIRE):
                self.run(side, "ip", "link", "set", device, "up")

    def _start_ray(self, side, *arguments):
        command = [
            BIN / "ray", "start", "--block", *arguments,
            f"--node-ip-address={self.addresses[side]}", "--num-cpus=1", "--object-store-memory=80000000",
        ]  # fmt: skip
        process = subprocess.Popen(
            self.inside(side, *command),
            env=self.environment,
            stdout=(self.folder / f"ray-{side}.log").open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._processes.append(process)

    def _until_healthy(self):
        deadline = time.monotonic() + 90
        check = self.inside("a", BIN / "ray", "health-check", "--address", self.head)
        while subprocess.run(check, env=self.environment, capture_output=True).returncode:
            assert time.monotonic() < deadline, (self.folder / "ray-a.log").read_text()[-2000:]
            time.sleep(0.3)


def end_family(process):
    """End a process with all that it started; what one that has ended left, its namespace tells."""
    family = (
        [process, *psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []
    )
    if family:
        process.send_signal(signal.SIGTERM)
        psutil.wait_procs(family[1:], timeout=15)
    for member in family[1:]:
        if member.is_running():
            member.kill()
    if process.poll() is None:
        process.kill()
    process.wait(10)


def end_all_inside(name):
    """End whoever is left in a namespace: orphans of what ended by itself are nobody's children."""
    found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout
    left = []
    for pid in map(int, found.split()):
        with contextlib.suppress(psutil.NoSuchProcess):
            left.append(psutil.Process(pid))
            left[-1].kill()
    psutil.wait_procs(left, timeout=15)


def _ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
