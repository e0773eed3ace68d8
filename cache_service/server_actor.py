"""CacheServer: the Ray actor of one node's cache. Placement and control only; clients call its core by ZMQ.

The core lives in a thread of its own. `cluster.launcher` imports this module.
"""

import logging
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import prometheus_client
import ray
from prometheus_client import CollectorRegistry

from cache_service.arena_files import ArenaOwnedError
from cache_service.arena_format import ArenaSizeError
from cache_service.config import CacheConfig
from cache_service.curve import SecretFileError, read_cluster_secret
from cache_service.gate import BindError
from cache_service.log_format import set_up_logging
from cache_service.messages import StatsReply
from cache_service.metrics import CacheServerCollector
from cache_service.native.build import NativeBuildError
from cache_service.server import CacheServerCore, Place
from cache_service.transfer import TransferError
from cache_service.transfer_choice import transfer_opener

logger = logging.getLogger(__name__)

FAILED_EXIT_CODE = 1
MAX_TURN_S = 60.0
"""A server that makes no turn for so long hangs."""


class CacheStartError(Exception):
    """A CacheServer could not start; the message is fit for the user."""


@dataclass(frozen=True)
class Ports:
    """Where a server is reached. One that is started in a dead one's place takes over its ports."""

    calls: int
    broadcasts: int
    metrics: int


@dataclass(frozen=True)
class CacheServerStarted:
    """A server that serves."""

    endpoint: str
    """What workers and `eyrie cache` connect to."""
    broadcasts: str
    """Where its relocations are published."""
    metrics_address: str
    """host:port"""
    ports: Ports
    node: str
    pid: int


class CacheServer:
    """One node's server. `start` once.

    `node_address` is where its sockets bind; None: the node's address as Ray knows it. `ports` None: any.
    """

    def __init__(
        self,
        config: CacheConfig,
        node_address: str | None,
        ports: Ports | None,
        secret_file: Path,
        log_level: str,
    ) -> None:
        set_up_logging(log_level)
        self._config = config
        self._secret_file = secret_file
        node: str = node_address or ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        self._metrics_port = ports.metrics if ports else 0
        self._place = Place(node, ports.calls if ports else None, ports.broadcasts if ports else None)
        self._core: CacheServerCore | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> CacheServerStarted:
        """Take the arena, bind and serve. Raise CacheStartError."""
        try:
            core = CacheServerCore(
                self._config,
                read_cluster_secret(self._secret_file),
                self._place,
                time.time_ns(),
                open_transfer=transfer_opener(
                    self._config.transfer, self._config.rdma_devices, self._place.host
                ),
            )
        except (
            ArenaOwnedError, ArenaSizeError, BindError, NativeBuildError, SecretFileError, TransferError,
        ) as error:  # fmt: skip
            raise CacheStartError(f"the host cache of {self._place.host} cannot start: {error}") from None
        metrics_port = self._serve_metrics(core)
        self._core = core
        self._thread = threading.Thread(target=self._live, args=(core,), name="cache-server", daemon=True)
        self._thread.start()
        return CacheServerStarted(
            endpoint=core.endpoint,
            broadcasts=core.broadcasts,
            metrics_address=f"{self._place.host}:{metrics_port}",
            ports=Ports(_port(core.endpoint), _port(core.broadcasts), metrics_port),
            node=self._place.host,
            pid=os.getpid(),
        )

    def ping(self) -> bool:
        """Tell that the process and its core live, and that the core turns."""
        if self._core is None or self._thread is None:
            return True  # not started yet
        return self._thread.is_alive() and self._core.turn_s() < MAX_TURN_S

    def stats(self) -> StatsReply | None:
        """Return the figures of a moment ago; None before `start`."""
        return self._core.stats() if self._core is not None else None

    def stop(self, timeout_s: float) -> bool:
        """End, give ports and memory back; tell whether that was in time. Workers are stopped before."""
        if self._core is None or self._thread is None:
            return True
        self._core.stop()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _serve_metrics(self, core: CacheServerCore) -> int:
        """Serve them on the port asked for, on another where that is taken; return which."""
        registry = CollectorRegistry()
        registry.register(CacheServerCollector(self._place.host, core.stats))
        host, port = self._place.host, self._metrics_port
        try:
            server, _ = prometheus_client.start_http_server(port, host, registry)
        except OSError as error:
            logger.warning("the metrics' port is taken", extra={"port": port, "reason": str(error)})
            server, _ = prometheus_client.start_http_server(0, host, registry)
        return server.server_port

    def _live(self, core: CacheServerCore) -> None:
        """The core's thread, from its start to its end."""
        try:
            core.run()
        except Exception:  # the thread's top: the process must not outlive its core; the arena stays
            logger.exception("the cache server failed", extra={"node": self._place.host})
            logging.shutdown()
            os._exit(FAILED_EXIT_CODE)


def _port(endpoint: str) -> int:
    return int(endpoint.rpartition(":")[2])
