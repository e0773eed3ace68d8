"""Worker: the Ray actor of one rank. Placement and control only; requests go through the inbox.

The rank lives in a thread of its own. The actor's other threads sleep in C++ or move bytes, so that they do
not fight the step loop for the interpreter. Imports of torch code are inside functions: `cluster.launcher`
imports this module.
"""

import gc
import logging
import os
import socket
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import prometheus_client
import ray

from cache_service.curve import read_cluster_secret
from cache_service.log_format import set_up_logging
from workers.config import WorkerConfig
from workers.protocol import ReplicaId

if TYPE_CHECKING:
    from workers.rank import Rank, RankSpec

logger = logging.getLogger(__name__)

FAILED_EXIT_CODE = 1
MAX_TURN_S = 900.0
"""A step loop that makes no turn for so long hangs; a big model's prefill on CPU may take minutes."""


class WorkerStartError(Exception):
    """A rank could not start; the message is fit for the user."""


@dataclass(frozen=True)
class WorkerStarted:
    """A rank that steps."""

    endpoint: str | None
    """Rank 0's inbox."""
    card_digest: str
    metrics_address: str
    """host:port"""
    node: str
    pid: int


class Worker:
    """One rank. `rendezvous` (rank 0 only), then `start` on all ranks at once.

    `node_address` is where its sockets bind; None: the node's address as Ray knows it.
    """

    def __init__(
        self,
        config: WorkerConfig,
        replica_id: ReplicaId,
        rank: int,
        incarnation: int,
        num_threads: int,
        node_address: str | None,
        secret_file: Path,
        log_level: str,
    ) -> None:
        set_up_logging(log_level)
        self._config = config
        self._replica_id = replica_id
        self._rank = rank
        self._incarnation = incarnation
        self._num_threads = num_threads
        self._secret_file = secret_file
        self._node: str = node_address or ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        self._listener: socket.socket | None = None
        self._running: Rank | None = None
        self._started: Future[WorkerStarted] = Future()
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()

    def rendezvous(self) -> tuple[str, int]:
        """Return where rank 0 awaits the other ranks."""
        from workers.parallel import listen

        self._listener = listen(self._node)
        return self._node, self._listener.getsockname()[1]

    def start(
        self, group_host: str, group_port: int, timeout_s: float, cache_endpoint: str | None = None
    ) -> WorkerStarted:
        """Load, join the group and begin to step; blocks until the rank steps. Raise WorkerStartError.

        `cache_endpoint` is where the node's CacheServer listens, if there is one.
        """
        from workers.crash_dump import dump_folder
        from workers.rank import RankSpec

        spec = RankSpec(
            config=self._config,
            replica_id=self._replica_id,
            rank=self._rank,
            incarnation=self._incarnation,
            node=self._node,
            group_host=group_host,
            group_port=group_port,
            num_threads=self._num_threads,
            cache_endpoint=cache_endpoint,
            dump_folder=dump_folder(),
        )
        self._thread = threading.Thread(target=self._live, args=(spec,), name="step-loop", daemon=True)
        self._thread.start()
        try:
            return self._started.result(timeout_s)
        except TimeoutError:
            raise WorkerStartError(
                f"rank {self._rank} of {self._replica_id} was not ready within {timeout_s:g} s"
            ) from None

    def ping(self) -> bool:
        """Tell that the process and its step loop live, and that the loop turns."""
        if self._thread is None or not self._thread.is_alive():
            return False
        return self._running is None or self._running.turn_s() < MAX_TURN_S

    def stop(self, timeout_s: float) -> bool:
        """End every request with `shutdown`, give port and memory back; tell whether that was in time."""
        self._stopping.set()
        if self._running is not None:
            self._running.stop()
        if self._thread is not None:
            self._thread.join(timeout_s)
        return self._thread is None or not self._thread.is_alive()

    def _live(self, spec: "RankSpec") -> None:
        """The step loop's thread, from loading to the end."""
        try:
            rank, started = self._build(spec)
        except Exception as error:  # the thread's top: `start` tells the launcher
            # The launcher tells the user; of an error that is not ours the log also keeps where it came from.
            level = logging.DEBUG if _is_ours(error) else logging.ERROR
            logger.log(level, "rank failed to start", extra={"rank": self._rank}, exc_info=error)
            self._started.set_exception(WorkerStartError(_told(error)))
            return
        # A full collection would look at all of torch while steps wait: 115 ms on a card's host.
        gc.collect()
        gc.freeze()
        self._running = rank
        if self._stopping.is_set():  # while it loaded: `stop` found no rank to stop
            rank.stop()
            self._started.set_exception(
                WorkerStartError(f"rank {self._rank} of {self._replica_id} was stopped while it started")
            )
        else:
            self._started.set_result(started)
        try:
            rank.run()
        except Exception:  # the thread's top: clients have been told; the process must not outlive its loop
            logger.exception("rank failed", extra={"rank": self._rank, "replica": self._replica_id})
            logging.shutdown()
            os._exit(FAILED_EXIT_CODE)
        if not self._stopping.is_set():
            logger.info("rank 0 ended the log", extra={"rank": self._rank, "replica": self._replica_id})

    def _build(self, spec: "RankSpec") -> "tuple[Rank, WorkerStarted]":
        from workers.rank import Rank

        rank = Rank(spec, read_cluster_secret(self._secret_file), listener=self._listener)
        server, _ = prometheus_client.start_http_server(0, addr=self._node, registry=rank.registry)
        return rank, WorkerStarted(
            endpoint=rank.inbox.endpoint if rank.inbox is not None else None,
            card_digest=rank.card_digest,
            metrics_address=f"{self._node}:{server.server_port}",
            node=self._node,
            pid=os.getpid(),
        )


def _is_ours(error: Exception) -> bool:
    return type(error).__module__.partition(".")[0] in ("workers", "cache_service")


def _told(error: Exception) -> str:
    """Return what the user reads: our own errors speak for themselves, others get their class named."""
    return str(error) if _is_ours(error) else f"{type(error).__name__}: {error}"
