"""ApiServer: the actor of one API process: binds the port, builds the service, runs uvicorn on its loop.

Made by cluster.launcher as an asyncio Ray actor; placement and control only. Secrets come from files.
"""

import asyncio
import logging
import os
import secrets
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ray
import uvicorn

from cache_service.curve import read_cluster_secret
from cache_service.log_format import set_up_logging
from cluster.api.admin import CacheAdmin
from cluster.api.app import create_app
from cluster.api.auth import AdminKeys, Authenticator
from cluster.api.bounded_http import BoundedHttpProtocol
from cluster.api.ports import ScrapeTarget
from cluster.api.prompts import ServedModel
from cluster.api.request_ids import RequestIdFilter, RequestIds
from cluster.api.service import Service
from cluster.api_keys import read_api_keys
from cluster.config import ClusterConfig
from cluster.metrics import ApiMetrics
from cluster.replica import ReplicaUnavailableError
from cluster.router.host_index import CacheAddress, FetchScope
from cluster.router.router import Router
from workers.card import ModelCard, load_card
from workers.protocol import ReplicaId

logger = logging.getLogger(__name__)

BACKLOG = 2048
KEEP_ALIVE_S = 75
GRACE_S = 5
"""After the drain: open connections are cut when they do not close by themselves."""
_ANY_ADDRESS = ("0.0.0.0", "::", "")
SWITCH_INTERVAL_S = 0.0005
"""Two threads hand small pieces of work to the event loop: by default each may wait 5 ms for its turn."""


class ApiStartError(Exception):
    """The API process cannot serve; the message is fit for the user."""


@dataclass(frozen=True)
class ApiStarted:
    """A server that serves."""

    url: str
    node: str
    pid: int


@dataclass
class _Running:
    """What `start` made and `stop` takes down."""

    service: Service
    router: Router
    recorder: ApiMetrics
    server: uvicorn.Server
    serving: asyncio.Task[None]


class ApiServer:
    """One API process. `bind` may come early, so that a port in use is known before a model loads.

    `node_address` names its node in metrics, as the workers name theirs; None: the address as Ray knows it.
    """

    def __init__(
        self, config: ClusterConfig, secret_file: Path, keys_file: Path, node_address: str | None = None
    ) -> None:
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        set_up_logging(config.log_level)
        for handler in logging.getLogger().handlers:
            handler.addFilter(RequestIdFilter())
        self._config = config
        self._secret_file = secret_file
        self._keys_file = keys_file
        self._node: str = node_address or ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        self._socket: socket.socket | None = None
        self._targets: list[ScrapeTarget] = []
        """Of the other processes."""
        self._running: _Running | None = None

    async def bind(self) -> str:
        """Take the port; return the service's URL. Raise ApiStartError when it is in use or not allowed."""
        if self._socket is None:
            self._socket = _listen(self._config.host, self._config.port)
        return self._url()

    async def start(
        self,
        endpoints: Mapping[ReplicaId, str],
        targets: Sequence[ScrapeTarget],
        caches: Mapping[ReplicaId, CacheAddress],
    ) -> ApiStarted:
        """Connect to the replicas' inboxes and serve; `targets` are the other processes' metrics.

        `caches` says which CacheServer the node of each replica has; empty where there is no host cache.
        Raise ModelError, ApiKeysError or ApiStartError (no port, no replica in time).
        """
        await self.bind()
        config = self._config
        api_keys = read_api_keys(self._keys_file)
        card, model = await asyncio.to_thread(_load_model, config)
        cluster_secret = read_cluster_secret(self._secret_file)
        boot_id = secrets.token_hex(8)
        recorder = ApiMetrics(model.name, self._node)
        router = Router(
            endpoints,
            cluster_secret,
            f"api-{boot_id}",
            card_digest=card.digest(),
            recorder=recorder,
            caches=caches,
            scope=FetchScope.of(config.cache),
            lease_s=config.replica_lease_s,
        )
        recorder.watch(lambda: router.num_index_gaps, lambda: router.num_ready)
        recorder.watch_caches(router.cache_feeds)
        self._targets = list(targets)
        service = Service(
            model=model,
            router=router,
            recorder=recorder,
            scrape_targets=self._scrape_targets,
            authenticator=Authenticator(api_keys, cluster_secret),
            cache_admin=CacheAdmin(
                AdminKeys(_admin_keys(config), cluster_secret),
                {cache.node: cache.calls for cache in caches.values()},
                cluster_secret,
                router.use_store,
            ),
            request_ids=RequestIds(boot_id),
            started_at_s=time.time(),
        )
        server = uvicorn.Server(
            uvicorn.Config(
                create_app(service),
                http=BoundedHttpProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=GRACE_S,
            )
        )
        assert self._socket is not None, "bound above"
        serving = asyncio.create_task(server.serve(sockets=[self._socket]))
        self._running = _Running(service, router, recorder, server, serving)
        await self._becomes_ready(self._running)
        return ApiStarted(url=self._url(), node=self._node, pid=os.getpid())

    async def ping(self) -> bool:
        """Tell that the event loop runs and the server serves."""
        return self._running is not None and not self._running.serving.done()

    async def replica_lost(self, replica_id: ReplicaId, why: str) -> None:
        """Send a replica nothing until it serves again; what runs there ends with an error."""
        if self._running is not None:
            self._running.router.leave(replica_id, why)
            self._running.recorder.replica_lost(replica_id)

    async def replica_serves(
        self, replica_id: ReplicaId, endpoint: str, targets: Sequence[ScrapeTarget]
    ) -> None:
        """Take back a replica that was started again; `targets` are now the other processes' metrics."""
        if self._running is not None:
            self._targets = list(targets)
            self._running.router.move(replica_id, endpoint)
            self._running.recorder.replica_restarted(replica_id)

    async def drain(self, drain_s: float) -> None:
        """Refuse new work, let running calls finish for `drain_s`, end the rest with `shutdown`."""
        if self._running is not None:
            await self._running.service.lifecycle.drain(drain_s)

    async def stop(self, timeout_s: float) -> bool:
        """End what still runs with `shutdown`, close port, connections, threads; tell if that was in time."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._stop()
        except TimeoutError:
            logger.error("the API server did not stop in time")
            return False
        return True

    async def _stop(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            await running.service.lifecycle.end_now()
            running.server.should_exit = True
            await running.serving
            await running.router.close()
            running.service.threads.close()
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    async def _becomes_ready(self, running: _Running) -> None:
        starting = asyncio.create_task(running.router.start(self._config.start_timeout_s))
        await asyncio.wait({starting, running.serving}, return_when=asyncio.FIRST_COMPLETED)
        if running.serving.done():
            starting.cancel()
            raise ApiStartError("the HTTP server ended while it started; its log says why")
        try:
            await starting
        except* ReplicaUnavailableError as errors:
            raise ApiStartError("; ".join(str(error) for error in errors.exceptions)) from None

    def _scrape_targets(self) -> list[ScrapeTarget]:
        return [ScrapeTarget(self._scrape_address(), {"node": self._node}), *self._targets]

    def _url(self) -> str:
        return f"http://{self._address()}"

    def _address(self) -> str:
        assert self._socket is not None, "bind comes first"
        host, port = self._socket.getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def _scrape_address(self) -> str:
        address = self._address()
        is_wide = self._config.host in _ANY_ADDRESS
        return f"{self._node}:{address.rpartition(':')[2]}" if is_wide else address


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise ApiStartError(f"cannot listen on {host}: {error.strerror}; name another `host`") from None
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ApiStartError(
            f"cannot listen on {host}:{port}: {error.strerror}; name another `host` or `port` (0: any free)"
        ) from None
    listener.setblocking(False)
    return listener


def _admin_keys(config: ClusterConfig) -> tuple[str, ...]:
    """Read them where they are: on this node, the command's."""
    file = config.admin_keys_file
    return () if file is None else read_api_keys(file, "admin_keys_file")


def _load_model(config: ClusterConfig) -> tuple[ModelCard, ServedModel]:
    card = load_card(config.worker.model)
    return card, ServedModel.from_card(card, config.served_model_name or config.worker.model)
