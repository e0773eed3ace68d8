"""An own Ray cluster on this machine: no dashboard, token authentication, gone with the process.

Used by the CLI's process only. `ray` is imported here once the environment is set: it reads it on import.
"""

import contextlib
import logging
import os
import secrets
import signal
import socket
from collections.abc import Callable, Iterable

import psutil

from cache_service.processes import ProcessId
from cluster.run_folder import RunFolder

OBJECT_STORE_BYTES = 80 << 20
"""Ray's least: nothing big travels as Ray objects."""
DAEMONS = ("gcs_server", "raylet")
PROBE_S = 5.0
SYSTEM_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",  # Ray's ports listen on all interfaces: others shall not submit work
    "RAY_USAGE_STATS_ENABLED": "0",
    # Nobody reads them here, and Ray waits 5 s at its end for a GCS that is gone to take them.
    "RAY_task_events_report_interval_ms": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",  # by default 15: whoever else computes would be served first
}


class OwnRay:
    """The processes of an own cluster: tells when Ray is gone, and ends what outlives it.

    A signal to all processes at once, as a service manager sends it, ends Ray's before ours; its GCS may then
    hang, deaf, and actors live on, orphans in process groups of their own. `daemons` are Ray's own processes,
    `gcs_address` is where the first of them listens.
    """

    def __init__(
        self,
        daemons: Iterable[ProcessId],
        gcs_address: str,
        children_of: Callable[[int], list[ProcessId]] | None = None,
    ) -> None:
        self._daemons = list(daemons)
        self._gcs_address = gcs_address
        self._children_of = children_of or _children_of
        self._actors: set[ProcessId] = set()
        self._is_gone = False

    def is_gone(self) -> bool:
        """Tell whether one of Ray's own processes has ended or the GCS refuses to be spoken to.

        Call it now and then: it also notes which actors there are.
        """
        if not self._is_gone:
            self._note_actors()
            self._is_gone = not all(daemon.is_alive() for daemon in self._daemons) or self._is_refused()
        return self._is_gone

    def end(self) -> None:
        """Kill all that is left."""
        for process in [*self._daemons, *self._actors]:
            if process.is_alive():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)

    def _note_actors(self) -> None:
        """Note the daemons' children while that can be seen: orphans have other parents."""
        for daemon in self._daemons:
            children = self._children_of(daemon.pid)
            if daemon.is_alive():  # else another process may have had its pid by then
                self._actors.update(children)

    def _is_refused(self) -> bool:
        host, _, port = self._gcs_address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), PROBE_S).close()
        except ConnectionRefusedError:
            return True
        except OSError:  # busy
            return False
        return False


def tell_plainly(*, has_colour: bool) -> None:
    """Make what Ray prints here fit for users: no traceback of calls nobody awaits, no line of an actor's log
    held back for being like another's, colour where wanted. Before `ray` is imported.
    """
    os.environ["RAY_IGNORE_UNHANDLED_ERRORS"] = "1"
    os.environ["RAY_DEDUP_LOGS"] = "0"
    if not has_colour:
        os.environ["RAY_COLOR_PREFIX"] = "0"


def start_local_ray(folder: RunFolder, num_cpus: int, num_gpus: int) -> OwnRay:
    """Start Ray in the run's folder and connect to it. Its processes end with this one, however it ends.

    `num_cpus` is what actors may claim; it is bookkeeping, not cores.
    """
    token = folder.path / "ray.token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32), encoding="ascii")
    os.environ.update(SYSTEM_ENVIRONMENT)
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
    import ray  # after the environment is set

    try:
        ray.init(
            address="local",
            _temp_dir=str(folder.ray_path),
            include_dashboard=False,
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            object_store_memory=OBJECT_STORE_BYTES,
            logging_level=logging.WARNING,
            log_to_driver=True,
        )
    except (ConnectionError, RuntimeError, ValueError):
        raise
    except Exception as error:
        if type(error) is not Exception:
            raise ConnectionError(f"{type(error).__name__}: {error}") from None
        # Ray's node took over 30 s to start; what of it has begun ends with this process.
        reason = str(error).strip().partition("\n")[0]
        raise ConnectionError(f"{reason} Try again when the machine is less busy.") from None
    daemons = [child for child in psutil.Process().children() if child.name() in DAEMONS]
    found = [process for process in (ProcessId.of(daemon.pid) for daemon in daemons) if process is not None]
    return OwnRay(found, ray.get_runtime_context().gcs_address)


def join_ray(address: str) -> None:
    """Connect to a running cluster, HOST:PORT or `auto`; raise ConnectionError when it does not answer."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal():
        try:  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), PROBE_S).close()
        except OSError as error:
            raise ConnectionError(f"nobody answers at {address}: {error.strerror or error}") from None
    import ray

    ray.init(address=address, logging_level=logging.WARNING, log_to_driver=True)


def leave_ray(own: OwnRay | None = None) -> None:
    """Disconnect; an own cluster's processes end, whatever they do. Idempotent."""
    import ray

    if own is not None and own.is_gone():
        own.end()
    ray.shutdown()
    if own is not None:
        own.end()


def _children_of(pid: int) -> list[ProcessId]:
    found = []
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(pid).children():
            process = ProcessId.of(child.pid)
            if process is not None and child.is_running():  # the pid was its own still
                found.append(process)
    return found
