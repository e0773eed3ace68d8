"""An own Ray cluster on this machine: no dashboard, token authentication, gone with the process.

Used by the CLI's process only. `ray` is imported here once the environment is set: it reads it on import.
"""

import logging
import os
import secrets
import socket

from cluster.run_folder import RunFolder

OBJECT_STORE_BYTES = 80 << 20
"""Ray's least: nothing big travels as Ray objects."""
PROBE_S = 5.0
SYSTEM_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",  # Ray's ports listen on all interfaces: others shall not submit work
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def tell_plainly(*, has_colour: bool) -> None:
    """Make what Ray prints here fit for users: no traceback of calls nobody awaits, colour where wanted."""
    os.environ["RAY_IGNORE_UNHANDLED_ERRORS"] = "1"
    if not has_colour:
        os.environ["RAY_COLOR_PREFIX"] = "0"


def start_local_ray(folder: RunFolder, num_cpus: int, num_gpus: int) -> None:
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


def leave_ray() -> None:
    """Disconnect; an own cluster's processes end. Idempotent."""
    import ray

    ray.shutdown()
