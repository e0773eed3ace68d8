"""How many pages a rank gets and how long a request may become: options against memory. No torch."""

from dataclasses import dataclass
from pathlib import Path

from workers.config import WorkerConfig

GIB = 1 << 30
DEFAULT_KV_GB = 0.5
"""On a CPU, whose memory is not this rank's alone."""
MAX_MEASURED_PAGES = 1 << 22
"""Pages that nobody asked for in numbers: rank 0 keeps some hundred bytes for each."""


class PoolSizeError(ValueError):
    """The options ask for more memory than there is, or for less than serves a request."""


@dataclass(frozen=True)
class PoolSize:
    """Pages beside the dummy page, and the longest request they are to hold."""

    num_pages: int
    max_context_len: int
    draft_window: int = 0
    """Places that a request needs behind its tokens, for drafts."""

    def pages_per_row(self, page_size: int) -> int:
        """Count the pages of the longest request, drafts included."""
        return -(-(self.max_context_len + self.draft_window) // page_size)


def num_positions(config: WorkerConfig, model_context_len: int, size: PoolSize | None) -> int:
    """Count the positions that a step may have: those of whole pages, rehearsals fill them.

    `size` None: the pool is not measured yet, and no request is longer than without it.
    """
    if size is None:
        size = PoolSize(1, config.max_context_len or model_context_len, config.draft_window)
    return size.pages_per_row(config.page_size) * config.page_size


def is_measured(config: WorkerConfig) -> bool:
    """Tell whether the pool takes what the device has left once the weights are there."""
    return config.device == "cuda" and config.num_pages is None and config.kv_gb is None


def left_bytes(total_bytes: int, free_bytes: int, ratio: float, work_bytes: int) -> int:
    """Return what pages may take of a device of which `ratio` is ours: less what is in use, less work space.

    Others' memory counts as in use. Raises PoolSizeError where nothing is left.
    """
    used_bytes = total_bytes - free_bytes
    left = int(total_bytes * ratio) - used_bytes - work_bytes
    if left <= 0:
        raise PoolSizeError(
            f"device_memory_ratio={ratio} of {total_bytes / GIB:.2f} GiB leaves nothing for KV pages:"
            f" {used_bytes / GIB:.2f} GiB are in use, most of it by weights, and steps need"
            f" {work_bytes / GIB:.2f} GiB; raise device_memory_ratio, lower max_tokens_per_step or"
            " max_running_requests, or set kv_gb"
        )
    return left


def pool_size(
    config: WorkerConfig,
    bundle_bytes: int,
    model_context_len: int,
    available_bytes: int,
    measured_bytes: int | None = None,
) -> PoolSize:
    """Size the pool from `num_pages`, else from `kv_gb`, else from `measured_bytes` where there are some.

    `available_bytes`: what the rank may take of its device. Raises PoolSizeError, which names the option to
    change, where that is too little, or where the pool cannot hold one request of `max_context_len`.
    """
    if config.num_pages is not None:
        name, option, num_pages = "num_pages", f"num_pages={config.num_pages}", config.num_pages
    elif config.kv_gb is None and measured_bytes is not None:
        name, option = "device_memory_ratio", f"device_memory_ratio={config.device_memory_ratio}"
        num_pages = min(measured_bytes // bundle_bytes - 1, MAX_MEASURED_PAGES)
    else:
        kv_gb = DEFAULT_KV_GB if config.kv_gb is None else config.kv_gb
        name, option, num_pages = "kv_gb", f"kv_gb={kv_gb}", int(kv_gb * GIB) // bundle_bytes - 1
    if num_pages < 1:
        raise PoolSizeError(
            f"{option} holds no page: a page takes {bundle_bytes} bytes and the pool keeps one dummy page;"
            f" allowed is kv_gb >= {2 * bundle_bytes / GIB:.6f}, or set num_pages"
        )
    wanted = (num_pages + 1) * bundle_bytes
    if wanted > available_bytes:
        raise PoolSizeError(
            f"{option} takes {wanted / GIB:.2f} GiB of KV pages on each rank; {available_bytes / GIB:.2f} GiB"
            f" are available: at most {max(available_bytes // bundle_bytes - 1, 0)} pages; lower {name}"
        )
    window = config.draft_window
    capacity = num_pages * config.page_size - window
    if capacity < 1:
        raise PoolSizeError(
            f"{option} holds {num_pages} pages of {config.page_size} tokens, fewer than {window + 1}: one and"
            f" the places of draft_tokens={config.draft_tokens} twice; raise {name} or lower draft_tokens"
        )
    if config.max_context_len is None:
        return PoolSize(num_pages, min(model_context_len, capacity), window)
    if config.max_context_len > model_context_len:
        raise PoolSizeError(
            f"max_context_len={config.max_context_len}; the model allows at most {model_context_len}"
        )
    if config.max_context_len > capacity:
        raise PoolSizeError(
            f"max_context_len={config.max_context_len}, but {option} holds {num_pages} pages,"
            f" {capacity} tokens; lower max_context_len or raise num_pages, kv_gb or, where neither is given,"
            " device_memory_ratio"
        )
    return PoolSize(num_pages, config.max_context_len, window)


def available_host_bytes() -> int:
    """Return what Linux says can be allocated without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise PoolSizeError("/proc/meminfo has no MemAvailable; set num_pages on a Linux machine")
