"""A real mooncake_master for tests: on a free port of the loopback, ended by its pid."""

import contextlib
import socket
import subprocess
import time
from pathlib import Path


def has_mooncake() -> bool:
    try:
        import mooncake.store  # noqa: F401
    except ImportError:
        return False
    return True


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class MooncakeMaster:
    def __init__(self, log: Path, port: int | None = None) -> None:
        import mooncake

        self.port = port or free_port()
        program = Path(next(iter(mooncake.__path__))) / "mooncake_master"
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [
                    program,
                    f"-rpc_port={self.port}",
                    "-rpc_address=127.0.0.1",
                    f"-metrics_port={free_port()}",
                    "-metrics_host=127.0.0.1",
                ],
                stdout=output,
                stderr=output,
            )
        end_s = time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 0.5):
                return
            assert self.process.poll() is None and time.monotonic() < end_s, log.read_text()[-2_000:]
            time.sleep(0.02)

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.port}"

    def kill(self) -> None:
        """With SIGKILL; idempotent."""
        self.process.kill()
        self.process.wait(10)
