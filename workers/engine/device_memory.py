"""What a CUDA device has left for KV pages once the weights are on it. Used once, by the Engine."""

import logging

import torch

from workers.card import ModelCard
from workers.config import WorkerConfig
from workers.draft_card import DraftCard
from workers.engine import nucleus
from workers.kvcache.layout import ELEMENT_BYTES
from workers.kvcache.pool_size import PoolSize, available_host_bytes, left_bytes, pool_size
from workers.models.sharding import ceil_div
from workers.parallel import TPGroup
from workers.speculative.loop_sizes import loop_bytes

logger = logging.getLogger(__name__)

_LOGITS_COPIES = 3
"""Of a step's float32 logits, at once: the sampler's own, adjusted, relative to the largest."""


def measured_pool_size(
    config: WorkerConfig,
    card: ModelCard,
    draft: DraftCard | None,
    bundle_bytes: int,
    group: TPGroup,
    device: torch.device,
) -> PoolSize:
    """Size the pool by what is free now, the weights being there: the same on every rank, the least of all.

    Raises PoolSizeError.
    """
    torch.cuda.empty_cache()  # what loading has left
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    needed = work_bytes(config, card) + (0 if draft is None else draft_bytes(config, card, draft))
    left = left_bytes(total_bytes, free_bytes, config.device_memory_ratio, needed)
    of_ranks = torch.zeros(group.size, dtype=torch.int64, device=device)
    of_ranks[group.rank] = left
    group.all_reduce(of_ranks)
    least = int(of_ranks.min().item())  # at start-up: may wait
    return pool_size(config, bundle_bytes, card.context_len, free_bytes, least)


def work_bytes(config: WorkerConfig, card: ModelCard) -> int:
    """Estimate what the largest step needs beside weights, pages and graphs: activations and logits."""
    model = card.config
    width = 4 * model.hidden_size + 3 * model.intermediate_size + 4 * model.num_heads * model.head_dim
    num_tokens = max(config.max_tokens_per_step, config.max_running_requests)
    # A row that verifies drafts is sampled behind each of them.
    num_rows = min(config.max_running_requests * (1 + config.max_drafts), num_tokens)
    of_token = num_rows * 4 * _LOGITS_COPIES + min(num_rows, nucleus.MAX_ROWS) * nucleus.TOKEN_BYTES
    return num_tokens * width * 4 + of_token * ceil_div(model.vocab_size, config.tp_size)


def draft_bytes(config: WorkerConfig, card: ModelCard, draft: DraftCard) -> int:
    """Estimate what the draft needs beside its weights and pages: its loops' inputs, what it keeps of each
    slot, a step's taps, features and entries, and what it says of all tokens behind each that it follows, all
    of which are there at once."""
    dtype = card.config.dtype if config.dtype == "auto" else config.dtype
    element_bytes = ELEMENT_BYTES[dtype]
    feature_bytes = draft.feature_size * element_bytes
    slots = (config.max_running_requests + 1) * (feature_bytes + 8 * config.max_drafts)
    num_tokens = max(config.max_tokens_per_step, config.max_running_requests)
    own = draft.config
    width = len(draft.feature_layers) * draft.target_hidden_size + 4 * draft.feature_size
    width += 4 * own.hidden_size + 3 * own.intermediate_size + 4 * own.num_heads * own.head_dim
    context_len = min(config.max_context_len or card.context_len, card.context_len)
    # A tree adds likelihoods up over the rank's vocabulary: logits, likelihoods in float32, these in int64.
    of_guess = element_bytes if config.draft_topk == 1 else element_bytes + 4 + 8
    num_own_tokens = ceil_div(draft.draft_vocab_size, config.tp_size)
    guesses = config.max_running_requests * config.draft_topk * num_own_tokens * of_guess
    return loop_bytes(config, context_len, feature_bytes) + slots + 4 * num_tokens * width + guesses


def log_memory(device: torch.device, page_bytes: int) -> None:
    """Say where a CUDA device's memory went, everything of the rank being on it."""
    if device.type != "cuda":
        return
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    logger.info(
        "device memory",
        extra={
            "total_bytes": total_bytes,
            "page_bytes": page_bytes,
            "other_bytes": torch.cuda.memory_reserved(device) - page_bytes,
            "free_bytes": free_bytes,
        },
    )


def available_bytes(device: torch.device, tp_size: int) -> int:
    """Return what a rank may take of its device's memory as it is now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return available_host_bytes() // tp_size  # all ranks of a CPU group share the node's memory
