"""Serves one configuration on Ray until a signal comes or it fails: the body of `eyrie serve` and the job.

Runs in the main thread: it owns signals, the run's folder, the Ray connection and the Launcher.
"""

import json
import logging
import os
import secrets
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from cache_service.arena_files import SHARED_MEMORY, arena_path, settle_orphan
from cache_service.arena_format import FINGERPRINT_BYTES, MAX_RANKS, ArenaSizeError, ArenaSpec
from cache_service.curve import SecretFileError, read_cluster_secret
from cache_service.host_memory import HostMemory
from cache_service.identity import cluster_id_of
from cache_service.log_format import set_up_logging
from cluster.api_keys import ApiKeysError, check_api_keys, read_api_keys
from cluster.config import API_KEYS_VARIABLE, ClusterConfig, describe, take_environment_keys
from cluster.local_ray import OwnRay, join_ray, leave_ray, start_local_ray, tell_plainly
from cluster.run_folder import RunFolder
from workers.card import ModelError, load_card, page_layout
from workers.draft_card import check_sizes, read_draft_card

if TYPE_CHECKING:
    from cluster.launcher import Launcher
    from cluster.replica_actors import Placement

logger = logging.getLogger(__name__)

WATCH_S = 1.0
SIGNAL_POLL_S = 0.1
SIGNAL_LAG_S = 1.0
"""A signal to all processes at once ends Ray's, and may reach this one last."""
LOOPBACK = "127.0.0.1"
INCARNATION_BITS = 62


class ServeError(Exception):
    """The service cannot start, or has failed; the message is fit for the user."""


class StopSignals:
    """SIGTERM and SIGINT: the first asks for a drain, the second cuts it short.

    `announce` is called inside the signal handler at the first, whatever the main thread does meanwhile. A
    count and no threading.Event: its lock may be the main thread's own when the handler comes.
    """

    def __init__(self, announce: Callable[[], None]) -> None:
        self._announce = announce
        self._num_received = 0

    def has_first(self) -> bool:
        """Tell whether the service is asked to end."""
        return self._num_received > 0

    def has_second(self) -> bool:
        """Tell whether it is asked to end at once."""
        return self._num_received > 1

    def install(self) -> None:
        """Take the signals over; again after a library did."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._num_received += 1
        if self._num_received == 1:
            self._announce()


def serve(
    config: ClusterConfig,
    *,
    progress: Callable[[str | None], None],
    ready: Callable[[str], None],
    announce_stop: Callable[[], None],
    has_colour: bool,
) -> None:
    """Serve until SIGTERM or SIGINT, drain, and leave nothing behind; raise ServeError otherwise.

    `progress` hears what is being done while things start and stop, then None; `ready` the URL.
    `announce_stop` is called in the signal handler. `has_colour`: stderr may carry colour codes.
    """
    set_up_logging(config.log_level)
    tell_plainly(has_colour=has_colour)
    api_keys = _check(config)
    logger.info("configuration: %s", json.dumps(describe(config, len(api_keys))))
    if not api_keys and not _is_loopback(config.host):
        logger.warning(
            "serving %s without API keys: whoever reaches the port may use it; set api_keys_file or %s",
            config.host,
            API_KEYS_VARIABLE,
        )
    signals = StopSignals(announce_stop)
    signals.install()
    folder = RunFolder()
    try:
        secret_file, keys_file = folder.place_secrets(config, api_keys)
        with _ray(config, folder, secret_file, progress) as own_ray:
            signals.install()  # Ray has taken SIGTERM
            if signals.has_first():
                logger.info("start given up")
                return
            from cluster.launcher import LaunchCancelledError, Launcher, LaunchError

            launcher = Launcher(
                config,
                secret_file,
                keys_file,
                _placement(config),
                incarnations=lambda: secrets.randbits(INCARNATION_BITS),
                progress=progress,
                is_cancelled=signals.has_first,
                is_ray_gone=lambda: own_ray is not None and own_ray.is_gone(),
            )
            try:
                url = launcher.start()
                folder.forget_keys()
                progress(None)
                ready(url)
                _watch(launcher, signals)
                progress("draining: running requests finish; a second signal cuts this short")
                launcher.drain(signals.has_second)
                if signals.has_second():
                    progress("second signal: ending the requests that still run")
            except LaunchError as error:
                raise ServeError(str(error)) from None
            except LaunchCancelledError:
                logger.info("start given up")
            finally:
                try:
                    progress("stopping")
                finally:
                    launcher.stop()
    finally:
        folder.remove()
        progress(None)


def _check(config: ClusterConfig) -> tuple[str, ...]:
    """Find what is wrong before anything starts; return the API keys of file and environment."""
    keys = take_environment_keys()
    try:
        check_api_keys(keys, API_KEYS_VARIABLE)
        if config.api_keys_file is not None:
            keys += read_api_keys(config.api_keys_file)
        if config.admin_keys_file is not None:
            read_api_keys(config.admin_keys_file, "admin_keys_file")
        if config.secret_file is not None:
            read_cluster_secret(config.secret_file)
        if config.ray_address is None:
            _check_port(config.host, config.port)
        card = load_card(config.worker.model)
        draft = None
        if config.worker.draft is not None:
            draft = read_draft_card(config.worker.draft, card)
        check_sizes(config.worker, card, draft)
        if config.ray_address is None and config.cache.is_on:
            shape = None if draft is None else draft.page_shape(config.worker.tp_size)
            check_host_cache(config, page_layout(card, config.worker, shape).bundle_bytes)
    except (ApiKeysError, ArenaSizeError, ModelError, SecretFileError) as error:
        raise ServeError(str(error)) from None
    return keys


def check_host_cache(
    config: ClusterConfig, bundle_bytes: int, read_memory: Callable[[Path], HostMemory] = HostMemory.read
) -> None:
    """Spare the user a start that must fail: the CacheServer is asked after the model is loaded.

    Raises ArenaSizeError. An arena that was kept has its memory already: its server looks at that.
    """
    memory = read_memory(SHARED_MEMORY)
    size = config.cache.arena_bytes(memory)
    num_ranks = min(config.worker.tp_size, MAX_RANKS)
    ArenaSpec.of_size("any", bytes(FINGERPRINT_BYTES), bundle_bytes, num_ranks, size)
    if config.secret_file is not None:
        cluster_id = cluster_id_of(read_cluster_secret(config.secret_file))
        if arena_path(cluster_id, LOOPBACK).exists():
            return
    memory.require(size, SHARED_MEMORY)


def _check_port(host: str, port: int) -> None:
    """Spare the user a start that must fail: the API server binds later, and checks again."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ServeError(
            f"cannot listen on {host}:{port}: {error.strerror}; name another --host or --port (0: any free)"
        ) from None


@contextmanager
def _ray(
    config: ClusterConfig, folder: RunFolder, secret_file: Path, progress: Callable[[str | None], None]
) -> Iterator[OwnRay | None]:
    """Have a Ray connection for the while; yield the own cluster, None where another was joined.

    Of an own one nothing is left afterwards.
    """
    try:
        own_ray = _connect(config, folder, progress)
    except (ConnectionError, RuntimeError, ValueError) as error:
        leave_ray()
        raise ServeError(f"cannot use Ray: {error}") from None
    try:
        yield own_ray
    finally:
        leave_ray(own_ray)
        if own_ray is not None and config.cache.is_on:
            path = arena_path(cluster_id_of(read_cluster_secret(secret_file)), LOOPBACK)
            if settle_orphan(path, keep=config.cache.keep_arena):
                logger.info("settled the arena of a cache server that was killed", extra={"path": path})


def _connect(
    config: ClusterConfig, folder: RunFolder, progress: Callable[[str | None], None]
) -> OwnRay | None:
    if config.ray_address is not None:
        progress(f"joining Ray at {config.ray_address}")
        join_ray(config.ray_address)
        return None
    progress("starting a local Ray cluster")
    num_ranks = config.num_replicas * config.worker.tp_size
    num_gpus = num_ranks if config.worker.device == "cuda" else 0
    return start_local_ray(folder, num_ranks, num_gpus)


def _placement(config: ClusterConfig) -> "Placement":
    """Share the cores among the ranks of a node."""
    from cluster.replica_actors import Placement

    num_ranks = config.num_replicas * config.worker.tp_size
    num_cores = len(os.sched_getaffinity(0))
    num_threads = config.worker.num_threads or max(1, num_cores // num_ranks)
    return Placement(
        node_address=LOOPBACK if config.ray_address is None else None,
        stays_here=config.secret_file is None,
        num_threads=num_threads,
        spins=num_ranks * num_threads <= num_cores,
    )


def _watch(launcher: "Launcher", signals: StopSignals) -> None:
    """Return at the first signal; raise ServeError when the service fails before it."""
    looked_s = time.monotonic()
    while not signals.has_first():
        time.sleep(SIGNAL_POLL_S)
        if time.monotonic() - looked_s < WATCH_S:
            continue
        looked_s = time.monotonic()
        failure = launcher.failure()
        if failure is not None and not _comes(signals.has_first, SIGNAL_LAG_S):
            raise ServeError(failure)


def _comes(condition: Callable[[], bool], timeout_s: float) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline_s:
        time.sleep(SIGNAL_POLL_S)
    return condition()


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
