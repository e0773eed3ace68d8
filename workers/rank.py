"""One rank of a TP group without Ray: its group, engine and, on rank 0, scheduler and inbox, then its loop.

Built, run and torn down in one thread (torch's thread pools belong to the thread that first uses them).
Called by workers.worker in an actor, and by benches and tests without one.
"""

import logging
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from prometheus_client import CollectorRegistry

from cache_service.keys import NamespaceDigest
from workers.card import ModelCard, load_card
from workers.config import WorkerConfig
from workers.crash_dump import write_dump
from workers.engine.engine import Engine
from workers.host_pages import CachePlace, HostPages
from workers.inbox import Inbox
from workers.kvcache.manager import KVCacheManager
from workers.kvcache.moves import MoveInjection
from workers.metrics import LeaderMetrics, LeaderSources, RankLabels, count_steps
from workers.parallel import TPGroup
from workers.protocol import PROTOCOL_VERSION, ReplicaId, Welcome
from workers.scheduler.scheduler import Scheduler
from workers.step_loop import FollowerLoop, StepLoop

logger = logging.getLogger(__name__)

FAREWELL_S = 10.0
"""How long rank 0 waits at its end for the other ranks' ends."""


@dataclass(frozen=True)
class RankSpec:
    """Who a rank is and where it meets the others."""

    config: WorkerConfig
    replica_id: ReplicaId
    rank: int
    incarnation: int
    node: str
    """Address of this rank's node: what its sockets bind."""
    group_host: str
    group_port: int
    num_threads: int
    """Compute threads on CPU."""
    cache_endpoint: str | None = None
    """Of the node's CacheServer; None: no page leaves the device."""
    dump_folder: Path | None = None
    """Where to leave a crash dump; None: nowhere."""


class Rank:
    """Loads the model and joins the group on construction; `run` blocks until stopped or failed.

    `listener` is rank 0's socket at (group_host, group_port), if it holds one already. `injection`: see
    HostPages.
    """

    def __init__(
        self,
        spec: RankSpec,
        cluster_secret: bytes,
        *,
        listener: socket.socket | None = None,
        clock: Callable[[], float] = time.monotonic,
        injection: MoveInjection | None = None,
    ) -> None:
        config = spec.config
        self._spec = spec
        self._cache: KVCacheManager | None = None  # rank 0's
        if config.device == "cpu":
            torch.set_num_threads(spec.num_threads)
        self.registry = CollectorRegistry()
        self.inbox: Inbox | None = None
        card = load_card(config.model)
        self.card_digest = card.digest()
        self._group = TPGroup.connect(
            spec.rank,
            config.tp_size,
            spec.group_host,
            spec.group_port,
            timeout_s=config.collective_timeout_s,
            device=config.device,
            one_shot=config.one_shot_sums,
            listener=listener,
        )
        self._engine = Engine(config, card, self._group)
        labels = RankLabels(card.name, spec.replica_id, spec.rank, spec.node)
        engine = self._engine
        count_steps(
            self.registry,
            labels,
            engine.graph_steps,
            engine.eager_steps,
            engine.capture_stats,
            engine.part_times.seconds,
        )
        if spec.rank == 0 and config.max_context_len is None:
            warn_of_short_context(self._engine.max_context_len, card.context_len)
        self._clock = clock
        self._host_pages: HostPages | None = None
        if spec.cache_endpoint is not None:
            place = CachePlace(spec.cache_endpoint, cluster_secret)
            self._host_pages = HostPages(
                place, config, self._engine, self._group, spec.incarnation, injection=injection
            )
            self._host_pages.count(self.registry, labels)
        self._loop: StepLoop | FollowerLoop
        if spec.rank == 0:
            self._loop = self._lead(spec, card, cluster_secret, labels, clock)
        else:
            self._loop = FollowerLoop(
                self._engine,
                self._group,
                silence_s=config.collective_timeout_s,
                depth=config.depth,
                clock=clock,
            )

    def run(self) -> None:
        """Step until `stop`, then give everything back. Raise what ended it otherwise."""
        try:
            self._loop.run()
            if not self._group.see_off(FAREWELL_S):
                logger.warning(
                    "a rank is slow to leave; its last step may fail", extra={"rank": self._spec.rank}
                )
            self._engine.close()
        except Exception as error:  # the rank's top, but for its thread's
            # Pages wait for copies behind the steps: what a device still waits for must not come.
            self._group.abort()
            self._dump(error)
            raise
        finally:
            with ExitStack() as stack:  # whichever of them fails
                stack.callback(self._group.close)
                if self._host_pages is not None:
                    stack.callback(self._host_pages.close)
                if self.inbox is not None:
                    stack.callback(self.inbox.close)

    def stop(self) -> None:
        """Make `run` return; a follower's returns when rank 0's does. Any thread may call it."""
        if isinstance(self._loop, StepLoop):
            self._loop.stop()

    def turn_s(self) -> float:
        """Return how long ago the loop's last turn began. Any thread may call it."""
        return self._clock() - self._loop.turned_s

    def _dump(self, error: Exception) -> None:
        if self._spec.dump_folder is not None:
            write_dump(
                self._spec.dump_folder,
                error,
                config=self._spec.config,
                replica=self._spec.replica_id,
                incarnation=self._spec.incarnation,
                engine=self._engine,
                group=self._group,
                cache=self._cache,
            )

    def _lead(
        self,
        spec: RankSpec,
        card: ModelCard,
        cluster_secret: bytes,
        labels: RankLabels,
        clock: Callable[[], float],
    ) -> StepLoop:
        config, engine = spec.config, self._engine
        namespace: NamespaceDigest = engine.namespace.digest()
        cache = self._cache = KVCacheManager(
            engine.num_pages,
            config.page_size,
            namespace,
            spec.incarnation,
            prefix_caching=config.prefix_caching,
        )
        if self._host_pages is not None:
            self._host_pages.lead(cache)
        scheduler = Scheduler(
            config,
            cache,
            end_token_ids=list(card.end_token_ids),
            max_context_len=engine.max_context_len,
            vocab_size=card.vocab_size,
            seeds=Random(f"{config.seed}/{spec.replica_id}/{spec.incarnation}"),
            step_sizes=engine.step_sizes,
        )

        def welcome() -> Welcome:
            version, snapshot = cache.snapshot()
            return Welcome(
                protocol_version=PROTOCOL_VERSION,
                replica_id=spec.replica_id,
                incarnation=spec.incarnation,
                card_digest=self.card_digest,
                namespace=namespace,
                page_size=config.page_size,
                max_context_len=scheduler.max_context_len,
                max_requests=scheduler.max_requests,
                version=version,
                snapshot=snapshot,
            )

        self.inbox = Inbox(spec.node, cluster_secret, welcome)
        sources = LeaderSources(scheduler.stats, cache, self.inbox, engine.layout.bundle_bytes)
        metrics = LeaderMetrics(self.registry, labels, sources)
        return StepLoop(
            scheduler,
            engine,
            self._group,
            self.inbox,
            metrics,
            cache.take_events,
            incarnation=spec.incarnation,
            clock=clock,
            depth=config.depth,
        )


def warn_of_short_context(max_context_len: int, model_context_len: int) -> None:
    """Say so where the pool cuts the context that nobody asked to be cut."""
    if max_context_len < model_context_len:
        logger.warning(
            "the KV pages hold %d tokens of the model's context of %d: longer requests are refused; raise"
            " kv_gb or num_pages (on cuda without either, device_memory_ratio), or set max_context_len",
            max_context_len,
            model_context_len,
        )
