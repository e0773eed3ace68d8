"""How many rows the draft loops of a rank are for, and the device memory that they take. No torch.

Of use before there are any: the pool is sized by what they leave.
"""

from workers.config import WorkerConfig
from workers.engine.graph_guard import MAX_CAPTURED_ROWS, default_batch_sizes

_PLAN_BYTES = 8192
"""Of the plan that the attention of one pass keeps."""


def loop_sizes(max_slots: int) -> tuple[int, ...]:
    """Return the rows of each loop, ascending; the last holds any step's."""
    sizes = default_batch_sizes(min(max_slots, MAX_CAPTURED_ROWS))
    return sizes if sizes[-1] == max_slots else (*sizes, max_slots)


def loop_bytes(config: WorkerConfig, context_len: int, feature_bytes: int) -> int:
    """Estimate what all loops of a rank keep on the device, for requests of at most `context_len` tokens.

    `feature_bytes`: of one feature. Most of it are page rows where pages are small and contexts long: each
    loop's own, and in the order in which kernels read them.
    """
    num_columns = -(-(context_len + config.draft_window) // config.page_size)
    num_places = config.max_drafts + 1
    row_bytes = (
        2 * 4 * num_columns
        + 8 * (2 * num_places + 8)  # staged numbers, what was chosen
        + feature_bytes * (num_places + 1)
        + 20 * config.max_drafts  # positions, places and lengths of each pass
        + 16
    )
    sizes, max_slots = loop_sizes(config.max_running_requests), config.max_running_requests
    num_bytes = sum(sizes) * row_bytes + len(sizes) * max(config.draft_lens) * _PLAN_BYTES
    if config.draft_topk == 1:
        return num_bytes
    # What each followed node sees and the numbers that were right; the mask of all rows, which there is once.
    mask_bytes = num_places * (num_columns * config.page_size) // 8
    return num_bytes + sum(sizes) * 16 * config.max_drafts + max_slots * mask_bytes
