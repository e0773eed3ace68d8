"""How many pages a rank gets and how long a request may become: options against memory. No torch."""

from dataclasses import dataclass
from pathlib import Path

from workers.config import WorkerConfig

GIB = 1 << 30


class PoolSizeError(ValueError):
    """The options ask for more memory than there is, or for less than serves a request."""


@dataclass(frozen=True)
class PoolSize:
    """Pages beside the dummy page, and the longest request they are to hold."""

    num_pages: int
    max_context_len: int

    def pages_per_row(self, page_size: int) -> int:
        """Count the pages of the longest request."""
        return -(-self.max_context_len // page_size)


def pool_size(
    config: WorkerConfig, bundle_bytes: int, model_context_len: int, available_bytes: int
) -> PoolSize:
    """Size the pool from `num_pages`, else from `kv_gb`.

    `available_bytes`: what the rank may take of its device. Raises PoolSizeError, which names the option to
    change, where that is too little, or where the pool cannot hold one request of `max_context_len`.
    """
    if config.num_pages is not None:
        option, num_pages = f"num_pages={config.num_pages}", config.num_pages
    else:
        option, num_pages = f"kv_gb={config.kv_gb}", int(config.kv_gb * GIB) // bundle_bytes - 1
    if num_pages < 1:
        raise PoolSizeError(
            f"{option} holds no page: a page takes {bundle_bytes} bytes and the pool keeps one dummy page;"
            f" allowed is kv_gb >= {2 * bundle_bytes / GIB:.6f}, or set num_pages"
        )
    wanted = (num_pages + 1) * bundle_bytes
    if wanted > available_bytes:
        raise PoolSizeError(
            f"{option} takes {wanted / GIB:.2f} GiB of KV pages on each rank; {available_bytes / GIB:.2f} GiB"
            f" are available: at most {max(available_bytes // bundle_bytes - 1, 0)} pages; lower"
            f" {'num_pages' if config.num_pages is not None else 'kv_gb'}"
        )
    capacity = num_pages * config.page_size
    if config.max_context_len is None:
        return PoolSize(num_pages, min(model_context_len, capacity))
    if config.max_context_len > model_context_len:
        raise PoolSizeError(
            f"max_context_len={config.max_context_len}; the model allows at most {model_context_len}"
        )
    if config.max_context_len > capacity:
        raise PoolSizeError(
            f"max_context_len={config.max_context_len}, but {option} holds {num_pages} pages,"
            f" {capacity} tokens; lower max_context_len or raise num_pages or kv_gb"
        )
    return PoolSize(num_pages, config.max_context_len)


def available_host_bytes() -> int:
    """Return what Linux says can be allocated without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise PoolSizeError("/proc/meminfo has no MemAvailable; set num_pages on a Linux machine")
