"""CacheServers: one CacheServer actor on each node that has replicas; a lost one is started again.

Part of the Launcher, in its thread. Workers find a restarted server by themselves: it takes over the ports.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import ObjectRef
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cache_service.server_actor import CacheServer, CacheServerStarted
from cluster.api.ports import ScrapeTarget
from cluster.config import ClusterConfig
from cluster.pings import Handle, Member, Pings, failure_of
from cluster.router.host_index import CacheAddress

logger = logging.getLogger(__name__)

PAUSE_ROUNDS = 5
"""Of a second each, between a start that failed and the next."""
MAX_START_ROUNDS = 120
"""A start that takes longer hangs: it is given up, and the next begins."""

MakeActor = Callable[..., Handle]
"""(actor class, Ray's options, arguments ...) -> its handle."""


@dataclass
class _Node:
    """One node's server."""

    actor: Handle
    starting: ObjectRef[CacheServerStarted] | None
    """The call under way."""
    started: CacheServerStarted | None = None
    """As it was last told; its ports are the next one's."""
    num_rounds_left: int = 0
    """Until the next try."""
    num_start_rounds: int = 0
    """That the start under way has taken."""


class CacheServers:
    """`make`, `wait`, `get` and `kill` are ray's."""

    def __init__(
        self,
        config: ClusterConfig,
        secret_file: Path,
        node_address: str | None,
        make: MakeActor,
        wait: Callable[..., tuple[list[Any], list[Any]]],
        get: Callable[[Any], Any],
        kill: Callable[[Handle], None],
    ) -> None:
        self._config = config
        self._secret_file = secret_file
        self._node_address = node_address
        self._make = make
        self._wait = wait
        self._get = get
        self._kill = kill
        self._pings = Pings(wait, get)
        self._nodes: dict[str, _Node] = {}

    @property
    def actors(self) -> list[Handle]:
        """The servers' actors as they are now."""
        return [node.actor for node in self._nodes.values()]

    def place(self, node_ids: Iterable[str]) -> list[ObjectRef[CacheServerStarted]]:
        """Begin to start a server on each of these nodes (Ray's ids); return the calls, in order.

        The caller awaits them, then tells `started`.
        """
        calls = []
        for node_id in dict.fromkeys(node_ids):
            node = self._nodes[node_id] = self._start(node_id, None)
            assert node.starting is not None
            calls.append(node.starting)
        return calls

    def started(self, records: Iterable[CacheServerStarted]) -> None:
        """Take what the calls of `place` returned."""
        for node, record in zip(self._nodes.values(), records, strict=True):
            node.starting, node.started = None, record
            where = {"node": record.node, "endpoint": record.endpoint, "secret_file": self._secret_file}
            logger.info("the host cache serves", extra=where)

    def endpoint(self, node_id: str) -> str | None:
        """Return where a node's server listens or will again, on the same port; None: it has none."""
        node = self._nodes.get(node_id)
        return None if node is None or node.started is None else node.started.endpoint

    def addresses(self) -> Mapping[str, CacheAddress]:
        """Return where the servers are for the router, by node id."""
        return {
            node_id: CacheAddress(node.started.node, node.started.endpoint, node.started.broadcasts)
            for node_id, node in self._nodes.items()
            if node.started is not None
        }

    def scrape_targets(self) -> list[ScrapeTarget]:
        """Return where the servers' metrics are."""
        return [
            ScrapeTarget(node.started.metrics_address, {"process": "cache", "node": node.started.node})
            for node in self._nodes.values()
            if node.started
        ]

    def keep(self) -> None:
        """Look for lost servers and start them again. Never blocks: call it every second."""
        members = [
            Member(node_id, node.actor)
            for node_id, node in self._nodes.items()
            if node.starting is None and node.num_rounds_left == 0
        ]
        for node_id, why in self._pings.lost(members).items():
            self._restart(node_id, why)
        for node_id, node in self._nodes.items():
            if node.num_rounds_left:
                node.num_rounds_left -= 1
                if node.num_rounds_left == 0:
                    self._restart(node_id, "its start failed")
            elif node.starting is not None:
                node.num_start_rounds += 1
                if self._wait([node.starting], timeout=0)[0]:
                    self._take(node_id, node)
                elif node.num_start_rounds > MAX_START_ROUNDS:
                    self._restart(node_id, "its start took too long")

    def _restart(self, node_id: str, why: str) -> None:
        former = self._nodes[node_id]
        logger.error("lost a cache server; starting it again", extra={"node_id": node_id, "why": why})
        self._kill(former.actor)  # one that hangs holds the arena
        self._nodes[node_id] = self._start(node_id, former.started)

    def _start(self, node_id: str, former: CacheServerStarted | None) -> _Node:
        options = {
            "num_cpus": 0,
            "max_concurrency": 4,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=False),
        }
        actor = self._make(
            CacheServer,
            options,
            self._config.cache,
            self._node_address,
            former.ports if former is not None else None,
            self._secret_file,
            self._config.log_level,
        )
        return _Node(actor, actor.start.remote(), former)

    def _take(self, node_id: str, node: _Node) -> None:
        """Take the answer of a server that was started again."""
        call, node.starting = node.starting, None
        try:
            node.started = self._get(call)
        except RayError as error:
            extra = {"node_id": node_id, "why": failure_of(error)}
            logger.error("a cache server did not start", extra=extra)
            node.num_rounds_left = PAUSE_ROUNDS
        else:
            logger.info("the host cache serves again", extra={"node_id": node_id})
