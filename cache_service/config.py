"""CacheConfig: every option of the cache tier, validated once, frozen ever after."""

from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from cache_service.arena_format import ArenaSizeError
from cache_service.eviction import EvictionPolicy
from cache_service.host_memory import HostMemory
from cache_service.page_store import PageStoreOptions
from cache_service.store_address import parse_store_address

_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
_GIB = 1 << 30

TransferKind = Literal["off", "tcp", "rdma"]
FreeRatio = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True, config=_STRICT)
class CacheConfig:
    """Options of a node's CacheServer. Without a size there is none, and no page leaves the devices."""

    host_cache_gb: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Shared memory on each node for KV pages that leave the devices, GiB. Not given: as `host_cache_ratio`
    says."""
    host_cache_ratio: Annotated[float, Field(gt=0, le=0.9)] | None = None
    """The same, as a part of each node's free memory: of machine, container or /dev/shm, whichever has least.
    Not given: no host cache, unless `host_cache_gb` is given."""
    eviction: EvictionPolicy = "s3fifo"
    """Which pages make room in the host cache: first those that were never used again (`s3fifo`), or those
    unused for longest (`lru`)."""
    tenant_ratio: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Most of the host cache that one tenant's pages take."""
    min_free_ratio: FreeRatio = 0.02
    """Part of the host cache that is kept free for new pages."""
    target_free_ratio: FreeRatio = 0.05
    """Part of the host cache that is made free once less than `min_free_ratio` is."""
    keep_arena: bool = False
    """Leave the pages in shared memory when the service stops, for its next run; wants a `secret_file`."""
    store: str | None = None
    """Remote store that each node's pages are put into and fetched from: `disk:/PATH?gb=SIZE` (`{node}` in it
    stands for the node's address) or `mooncake:HOST:PORT?segment_gb=SIZE`. Not given: none, until one is
    attached."""
    transfer: TransferKind = "off"
    """How nodes read pages out of each other's host cache: not at all (`off`), or by Mooncake over `tcp` or
    `rdma`. Mooncake's ports listen on every interface without authentication: for trusted networks only."""
    rdma_devices: str | None = None
    """RDMA devices of each node that pages are read through, with commas, if `transfer` is `rdma`. Not given:
    all."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.host_cache_gb is not None and self.host_cache_ratio is not None:
            raise ValueError("both host_cache_gb and host_cache_ratio are given; give one of them")
        if self.store is not None:
            parse_store_address(self.store)
            if not self.is_on:
                raise ValueError(
                    "a store is given without a host cache, through which pages go there and come back; give"
                    " host_cache_gb or host_cache_ratio"
                )
        if self.transfer != "off" and not self.is_on:
            raise ValueError(
                f"transfer is {self.transfer} without a host cache, whose pages nodes would exchange; give"
                " host_cache_gb, or leave transfer off"
            )
        if self.rdma_devices is not None and self.transfer != "rdma":
            raise ValueError(
                f"rdma_devices are given while transfer is {self.transfer}; give transfer rdma, or no devices"
            )
        if self.min_free_ratio > self.target_free_ratio:
            raise ValueError(
                f"min_free_ratio {self.min_free_ratio:g} is above target_free_ratio"
                f" {self.target_free_ratio:g}; lower the one or raise the other"
            )
        return self

    @property
    def is_on(self) -> bool:
        """There is a host cache."""
        return self.host_cache_gb is not None or self.host_cache_ratio is not None

    @property
    def store_options(self) -> PageStoreOptions:
        """What the PageStore takes of these."""
        return PageStoreOptions(self.eviction, self.min_free_ratio, self.target_free_ratio, self.tenant_ratio)

    def arena_bytes(self, memory: HostMemory) -> int:
        """Return how large an arena's file may be; raise ArenaSizeError without a size."""
        if self.host_cache_gb is not None:
            return int(self.host_cache_gb * _GIB)
        if self.host_cache_ratio is None:
            raise ArenaSizeError("the host cache has no size; give --host-cache-gb or --host-cache-ratio")
        free = min(
            limit
            for limit in (
                memory.available_bytes,
                memory.cgroup_free_bytes,
                memory.shared_memory_free_bytes,
            )
            if limit is not None
        )
        return int(free * self.host_cache_ratio)
