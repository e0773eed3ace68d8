"""HostPages: one rank's part in its node's host cache: the client, the mapped arena, the mover of pages.

Made and closed by Rank, in the step loop's thread.
"""

import logging
from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from cache_service.client import (
    CacheAttachError,
    CacheClient,
    CacheSilentError,
    ClientSpec,
    group_of,
)
from cache_service.metrics import CacheClientCollector, MetricLabels
from workers.config import WorkerConfig
from workers.engine.engine import Engine
from workers.engine.mechanisms import ALL_ON, Mechanisms
from workers.kvcache.arena_part import MappedArena, MoverError
from workers.kvcache.fetch_costs import FetchCosts
from workers.kvcache.manager import KVCacheManager
from workers.kvcache.mover import mover_for
from workers.kvcache.moves import MoveInjection
from workers.kvcache.prefetcher import PrefetchOptions
from workers.metrics import LABELS, RankLabels, TierSources, count_tier
from workers.parallel import TPGroup

logger = logging.getLogger(__name__)

ATTACH_TIMEOUT_S = 10.0
"""A server that begins at once to adopt a full arena takes seconds. One that takes longer is heard later."""


@dataclass(frozen=True)
class CachePlace:
    """Where a rank's node has its CacheServer."""

    endpoint: str
    cluster_secret: bytes


class HostPages:
    """Attaches a rank to its node's arena; raises CacheAttachError when the server refuses that.

    A server that does not answer now, or is lost later, is a miss, counted, until it is back.
    """

    def __init__(
        self,
        place: CachePlace,
        config: WorkerConfig,
        engine: Engine,
        group: TPGroup,
        incarnation: int,
        mechanisms: Mechanisms = ALL_ON,
        injection: MoveInjection | None = None,
    ) -> None:
        """`mechanisms` and `injection` are the mover's."""
        self.client = CacheClient(
            place.endpoint,
            place.cluster_secret,
            ClientSpec(
                fingerprint=bytes.fromhex(engine.layout.fingerprint()),
                bundle_bytes=engine.layout.bundle_bytes,
                num_ranks=group.size,
                group=group_of(incarnation),
                is_decider=group.rank == 0,
                num_grants=max(ClientSpec.num_grants, 2 * config.max_tokens_per_step // config.page_size),
            ),
        )
        self._config = config
        self._page_bytes = engine.layout.bundle_bytes * group.size
        try:
            self._attach()
            self.mover = mover_for(
                engine.pool,
                self._mapped,
                group.rank,
                group.moves,
                verify=config.verify_pages,
                mechanisms=mechanisms,
                injection=injection,
            )
        except (CacheAttachError, MoverError):
            self.client.close()
            raise
        self.figures = TierSources(self.mover.stats)
        engine.attach(self.mover)
        self._group = group

    def lead(self, cache: KVCacheManager) -> None:
        """Rank 0: have the cache manager save, load and fetch pages."""
        config = self._config
        self.figures.tier = cache.attach_tier(self.client, self._group.moves, config.write_policy)
        self.figures.prefetcher = cache.attach_prefetcher(
            self.client,
            FetchCosts(self._page_bytes, config.page_size, moves=self.mover.stats),
            PrefetchOptions(config.prefetch_policy, config.prefetch_timeout_s),
        )

    def count(self, registry: CollectorRegistry, labels: RankLabels) -> None:
        """Declare the metrics of the client, the mover and, on rank 0, of what it decides."""
        count_tier(registry, labels, self.figures)
        registry.register(CacheClientCollector(MetricLabels(LABELS, labels.values), self.client))

    def close(self) -> None:
        """End all copies, then leave the arena."""
        self.mover.close()
        self.client.close()

    def _attach(self) -> None:
        try:
            self.client.start(ATTACH_TIMEOUT_S)
        except CacheSilentError as error:
            logger.warning("pages are saved once the cache server answers", extra={"why": str(error)})

    def _mapped(self) -> MappedArena | None:
        client = self.client
        return MappedArena(client.arena, client.leases) if client.is_mapped else None
