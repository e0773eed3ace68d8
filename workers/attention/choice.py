"""choose_kernels: which kernels a rank computes with, from its options and what the machine has.

Called once by Engine; what has to be compiled is compiled here.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from workers.attention.backend import AttentionBackend
from workers.attention.flashinfer import FlashInferAttention
from workers.attention.flashinfer_kernels import (
    DTYPES,
    HEAD_DIMS,
    FlashInferError,
    FlashInferKernels,
    HeadShape,
    KernelLibrary,
)
from workers.attention.native import NativeAttention
from workers.attention.reference import ReferenceAttention
from workers.config import WorkerConfig
from workers.engine.copies import CopyStream
from workers.engine.forward_batch import ForwardBatch
from workers.engine.graph_guard import MAX_CAPTURED_ROWS
from workers.engine.mechanisms import ALL_ON, Mechanisms
from workers.engine.recording import RecordingKernels
from workers.engine.sampler import GreedyKeys, GreedyTokens, Sampler, greedy_tokens
from workers.engine.vocabulary_shard import greedy_keys
from workers.kvcache.kv_pool import KVPool
from workers.layers.kernels import LayerKernels
from workers.models.decoder import Decoder
from workers.models.draft import DraftModel
from workers.native.build import NativeBuildError
from workers.parallel import TPGroup
from workers.triton_kernels.choice import TritonMissingError, cuda_kernels

if TYPE_CHECKING:
    from workers.triton_kernels.layer_kernels import TritonKernels

logger = logging.getLogger(__name__)

LoadLibrary = Callable[[HeadShape, list[int | None], torch.device], KernelLibrary]
LoadOwn = Callable[[torch.device, torch.dtype], "TritonKernels | None"]


class BackendError(ValueError):
    """The chosen attention backend cannot run here."""


@dataclass(frozen=True)
class ChosenKernels:
    """`kernels` are the CPU's, which the decoder has adopted and which record; None: there are none."""

    attention: ReferenceAttention | NativeAttention | FlashInferAttention
    kernels: RecordingKernels | None = None
    greedy_tokens: GreedyTokens = greedy_tokens
    greedy_keys: GreedyKeys = greedy_keys
    layer_kernels: LayerKernels | None = None
    """What the decoder has adopted, on any device"""

    def sampler(
        self, vocab_size: int, max_slots: int, device: torch.device, copies: CopyStream, group: TPGroup
    ) -> Sampler:
        """Return a Sampler of the group's vocabulary that chooses by these kernels."""
        return Sampler(
            vocab_size,
            max_slots,
            device,
            copies,
            greedy=self.greedy_tokens,
            group=group,
            keys=self.greedy_keys,
        )


@dataclass(frozen=True)
class DraftAttention:
    """`extend`: the target's own, or (`is_apart`) one of the draft's. `for_passes`: a PassAttention.

    `is_prepared`: passes may be captured or recorded.
    """

    extend: AttentionBackend
    for_passes: Callable[[ForwardBatch], AttentionBackend]
    is_apart: bool
    is_prepared: bool


def choose_kernels(
    config: WorkerConfig,
    pool: KVPool,
    decoder: Decoder,
    copies: CopyStream,
    *,
    max_tokens: int,
    mechanisms: Mechanisms = ALL_ON,
    load_library: LoadLibrary = FlashInferKernels,
    load_own: LoadOwn = cuda_kernels,
) -> ChosenKernels:
    """Return the attention backend of `config` over `pool`; `max_tokens`: of any step.

    Raises BackendError where the one asked for cannot be; `auto` then takes the reference, with a warning.
    """
    choice = config.attention_backend
    if choice == "reference":
        return ChosenKernels(ReferenceAttention(pool))
    try:
        if choice == "native" or (choice == "auto" and config.device == "cpu"):
            kernels = _native_kernels(pool)
            decoder.adopt(kernels)
            return ChosenKernels(NativeAttention(pool, kernels), kernels, layer_kernels=kernels)
        library = _flashinfer_library(pool, decoder, load_library)
        own = load_own(pool.data.device, pool.layer(0)[0].dtype)
    except (BackendError, NativeBuildError, FlashInferError, TritonMissingError) as error:
        if choice != "auto":
            hint = f"attention_backend={choice}: {error}; or choose attention_backend=auto"
            raise BackendError(hint) from error
        logger.warning("compiled kernels are not to be had; computing in torch", extra={"reason": str(error)})
        return ChosenKernels(ReferenceAttention(pool))
    if own is not None:
        decoder.adopt(own)
        for dtype in (pool.layer(0)[0].dtype, torch.float32):  # of greedy steps, and of mixed ones
            logits = decoder.norm.weight.new_zeros(1, decoder.head.num_tokens, dtype=dtype)
            if decoder.group.size == 1:
                own.greedy_tokens(logits)
            else:
                own.greedy_keys(logits, 0)
    most_rows = max(config.max_running_requests, *(config.graph_batch_sizes or (1,)))
    captured_rows = max(config.graph_batch_sizes or (min(most_rows, MAX_CAPTURED_ROWS),))
    attention = FlashInferAttention(
        pool,
        decoder.attention_layers,
        library,
        copies,
        max_rows=most_rows,
        max_tokens=max_tokens,
        max_verified=captured_rows * (1 + config.max_drafts) if config.max_drafts else 0,
        mechanisms=mechanisms,
        pool_kernels=own,
        max_tree_tokens=1 + config.max_drafts if config.draft_topk > 1 else 0,
    )
    if own is None:
        return ChosenKernels(attention)
    return ChosenKernels(
        attention, greedy_tokens=own.greedy_tokens, greedy_keys=own.greedy_keys, layer_kernels=own
    )


def choose_draft_attention(
    config: WorkerConfig, pool: KVPool, draft: DraftModel, decoder: Decoder, chosen: ChosenKernels
) -> DraftAttention:
    """Return the draft's attention over the same pool: `draft_attention_backend`, or the target's.

    Raises BackendError where the one asked for cannot be; `auto` then takes the reference, with a warning.
    """
    choice, attention = config.draft_attention_backend, chosen.attention
    _check_trees(config, decoder, is_flashinfer=isinstance(attention, FlashInferAttention))
    own = "native" if isinstance(attention, NativeAttention) else "flashinfer"
    if isinstance(attention, ReferenceAttention):
        own = "reference"
    if choice not in ("auto", "reference", own):
        raise BackendError(
            f"draft_attention_backend={choice}: found attention_backend={config.attention_backend} on"
            f" {config.device}, which computes by {own}; allowed are auto, reference, {own}"
        )
    if own == "flashinfer" and choice != "reference" and not _are_alike(draft, decoder):
        if choice != "auto":
            raise BackendError(
                f"draft_attention_backend={choice}: found a draft whose heads are not the target's; allowed"
                " are auto, reference"
            )
        logger.warning("the draft's heads are not the target's; its attention is computed in torch")
        choice = "reference"
    if choice == "reference" and own != "reference":
        reference = ReferenceAttention(pool)
        return DraftAttention(reference, reference.for_passes, is_apart=True, is_prepared=False)
    if chosen.layer_kernels is not None:
        draft.adopt(chosen.layer_kernels)
    is_prepared = own != "reference"
    return DraftAttention(attention, attention.for_passes, is_apart=False, is_prepared=is_prepared)


def _check_trees(config: WorkerConfig, decoder: Decoder, *, is_flashinfer: bool) -> None:
    """Raise BackendError where a window counts positions and a tree's places are none.

    FlashInfer's kernels count places; the others go wrong only where a window is shorter than a tree is deep.
    """
    windows = [layer.sliding_window for layer in decoder.attention_layers if layer.sliding_window is not None]
    if config.draft_topk == 1 or not windows:
        return
    if is_flashinfer or min(windows) <= max(config.draft_lens, default=0) + 1:
        backend = "flashinfer" if is_flashinfer else "any attention backend"
        raise BackendError(
            f"draft_topk={config.draft_topk}: found a model with windows of {min(windows)} tokens, on"
            f" {backend}; allowed is 1, a chain"
        )


def _are_alike(draft: DraftModel, decoder: Decoder) -> bool:
    """Tell whether attention that was made for the target's layers can compute the draft's."""
    own = decoder.attention_layers
    shape = (own[0].num_heads, own[0].num_kv_heads, own[0].head_dim)
    windows = {layer.sliding_window for layer in own}
    return all(
        (layer.num_heads, layer.num_kv_heads, layer.head_dim) == shape and layer.sliding_window in windows
        for layer in draft.attention_layers
    )


def _native_kernels(pool: KVPool) -> RecordingKernels:
    if not NativeAttention.supports(pool):
        raise BackendError(f"found {_kind(pool)}; the compiled kernels run on cpu in float32 or bfloat16")
    return RecordingKernels.load()


def _flashinfer_library(pool: KVPool, decoder: Decoder, load_library: LoadLibrary) -> KernelLibrary:
    device, dtype = pool.data.device, pool.layer(0)[0].dtype
    layers = decoder.attention_layers
    first = layers[0]
    if device.type != "cuda" or dtype not in DTYPES:
        raise BackendError(f"found {_kind(pool)}; FlashInfer runs on cuda in float16 or bfloat16")
    if first.head_dim not in HEAD_DIMS:
        raise BackendError(f"found heads of {first.head_dim}; FlashInfer's have 64, 128 or 256")
    shape = HeadShape(first.num_heads, first.num_kv_heads, first.head_dim, pool.page_size, dtype)
    windows = sorted({layer.sliding_window for layer in layers}, key=lambda window: window or 0)
    return load_library(shape, windows, device)


def _kind(pool: KVPool) -> str:
    return f"{pool.data.device.type} and {str(pool.layer(0)[0].dtype).removeprefix('torch.')}"
