"""FlashInferKernels: FlashInfer's compiled paged kernels as functions of tensors; the one importer of it.

Its wrapper classes are not used: their plan() copies from pageable memory and walks lengths in Python, which
takes a millisecond for 256 rows. What they call is called here, over buffers of our own. Engine's thread.
"""

import importlib
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, Protocol

import torch

from workers.attention.row_pages import RowPages
from workers.attention.tree_mask import TreeMask
from workers.engine.forward_batch import IntArray

logger = logging.getLogger(__name__)

HEAD_DIMS = (64, 128, 256)
DTYPES = (torch.float16, torch.bfloat16)
MIN_CAPABILITY = 8
_LONG_CAPABILITY = 9
"""Major compute capabilities: of cards that the kernels run on, and that those for long rows do."""

_CAUSAL, _MASKED, _NHD, _NO_POSITIONS, _NO_WINDOW = 1, 2, 0, 0, -1
"""FlashInfer's codes."""
_TILES_Q = (16, 64, 128)
_LONG_TILES_Q = {64: 192, 128: 128, 256: 128}
"""Queries that a block of threads takes: kernels for short rows choose, those for long rows have one number
for each head_dim. As in the library's scheduler, and a GPU test compares."""
_CTAS_PER_SM = 2
_SLACK_BYTES = 4096
"""For alignment within a workspace."""

PlanInfo = Sequence[int]
"""Where a plan lies in its workspace, and the size of its grid: what a captured graph holds for good."""


class FlashInferError(RuntimeError):
    """FlashInfer, or what it needs to compile its kernels, is not there."""


@dataclass(frozen=True)
class HeadShape:
    """What all layers of a model have in common on one rank."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    dtype: torch.dtype


@dataclass(frozen=True)
class HostRows:
    """Rows to be planned, on the host; rows without tokens cost nothing."""

    query_starts: IntArray
    """[R + 1]; rows of kernels for short rows begin at 0"""
    page_starts: IntArray
    """[R + 1], into RowPages.pages"""
    context_lens: IntArray
    """[R]"""
    num_tokens: int
    """Of a captured plan: the most that it will ever have"""
    is_captured: bool
    """Its grid and the places in its workspace depend on R and num_tokens alone"""
    is_causal: bool = True
    """Else a mask says what tokens see"""


@dataclass(frozen=True)
class PlanLimits:
    """The largest plan that a workspace is for; of a captured one the only size."""

    num_rows: int
    num_tokens: int
    is_captured: bool


@dataclass(frozen=True)
class PlanMemory:
    """`floats`: partial results, on the device; `device`: the plan, which a pass reads; `pinned`: where it is
    written first, the source of a copy that the library enqueues. All uint8."""

    floats: torch.Tensor
    device: torch.Tensor
    pinned: torch.Tensor


class PagedKernels(Protocol):
    """Kernels for one window (of tokens seen, None: all), for rows of any length, but good at some."""

    plans_by_pages: bool
    """Plans depend on rows' tokens and numbers of pages, and on nothing else of their contexts."""

    def plan_bytes(self, limits: PlanLimits) -> int:
        """Return how many bytes a plan takes at most."""
        ...

    def float_bytes(self, limits: PlanLimits) -> int:
        """Return how many bytes its partial results take at most."""
        ...

    def plan(self, rows: HostRows, memory: PlanMemory) -> PlanInfo:
        """Divide the rows' work among the device's processors; enqueue the plan's copy to the device."""
        ...

    def plan_whole(self, rows: HostRows, memory: PlanMemory) -> PlanInfo:
        """Plan rows of as many tokens each whose contexts are not divided: it holds for any lengths."""
        ...

    def run(
        self,
        info: PlanInfo,
        memory: PlanMemory,
        q: torch.Tensor,
        pool: tuple[torch.Tensor, torch.Tensor],
        query_starts: torch.Tensor,
        pages: RowPages,
        scale: float,
        out: torch.Tensor,
        *,
        overlaps: bool,
        mask: TreeMask | None = None,
    ) -> None:
        """Attend, into `out` [tokens, heads, head_dim] at the planned rows' tokens alone; like q.

        `overlaps`: the kernels may begin while those before them still run, and wait where they read.
        `mask`: of rows that were planned as not causal, which kernels for short rows alone can.
        """


class KernelLibrary(Protocol):
    """Where FlashInferAttention has its kernels from."""

    def short(self, window: int | None) -> PagedKernels:
        """Return kernels for rows of few tokens: they divide contexts, and pack the heads of a group."""
        ...

    def long(self, window: int | None) -> PagedKernels | None:
        """Return kernels for rows of many tokens; None: those for short rows are all there is."""
        ...


class FlashInferKernels:
    """KernelLibrary of the installed flashinfer. Compiles on construction what is not in its cache.

    Raises FlashInferError.
    """

    def __init__(self, shape: HeadShape, windows: Sequence[int | None], device: torch.device) -> None:
        assert shape.head_dim in HEAD_DIMS and shape.dtype in DTYPES, shape
        properties = torch.cuda.get_device_properties(device)
        if properties.major < MIN_CAPABILITY:
            found = f"{properties.major}.{properties.minor}"
            raise FlashInferError(f"found compute capability {found}; its kernels want {MIN_CAPABILITY}.0")
        self._shape = shape
        self._num_sms = properties.multi_processor_count
        self._has_pdl = properties.major >= _LONG_CAPABILITY
        slides = [window is not None for window in windows]
        variants: list[tuple[Literal["fa2", "fa3"], bool]] = [("fa2", is_sliding) for is_sliding in {*slides}]
        # Those for long rows load tile 0's values for the last tile of a window, whatever has become of them.
        if properties.major == _LONG_CAPABILITY and not any(slides):
            variants.append(("fa3", False))
        self._modules = _load(shape, variants)

    def short(self, window: int | None) -> PagedKernels:
        """Return FlashAttention-2 kernels."""
        return ShortRowKernels(
            self._modules["fa2", window is not None], self._shape, window, self._num_sms, self._has_pdl
        )

    def long(self, window: int | None) -> PagedKernels | None:
        """Return FlashAttention-3 kernels, which divide no context, on Hopper cards."""
        module = self._modules.get(("fa3", window is not None))
        return None if module is None else LongRowKernels(module, self._shape, window, self._num_sms)


class _Kernels:
    """One compiled module: `plan` and `paged_run`, as its wrappers call them."""

    def __init__(
        self, module: Any, shape: HeadShape, window: int | None, num_sms: int, has_pdl: bool = False
    ) -> None:
        self._module = module
        self._shape = shape
        # The library counts the tokens to the left of the one that sees them.
        self._window_left = _NO_WINDOW if window is None else window - 1
        self._num_sms = num_sms
        self._has_pdl = has_pdl

    def _plan(self, rows: HostRows, memory: PlanMemory, *options: int | bool) -> PlanInfo:
        shape = self._shape
        info: PlanInfo = self._module.plan(
            memory.floats,
            memory.device,
            memory.pinned,
            torch.from_numpy(rows.query_starts),
            torch.from_numpy(rows.page_starts),
            torch.from_numpy(rows.context_lens),
            rows.num_tokens,
            len(rows.context_lens),
            shape.num_heads,
            shape.num_kv_heads,
            shape.page_size,
            rows.is_captured,
            shape.head_dim,
            shape.head_dim,
            rows.is_causal,
            self._window_left,
            *options,
        )
        return info

    def run(
        self,
        info: PlanInfo,
        memory: PlanMemory,
        q: torch.Tensor,
        pool: tuple[torch.Tensor, torch.Tensor],
        query_starts: torch.Tensor,
        pages: RowPages,
        scale: float,
        out: torch.Tensor,
        *,
        overlaps: bool,
        mask: TreeMask | None = None,
    ) -> None:
        """See PagedKernels."""
        self._module.paged_run(
            memory.floats,
            memory.device,
            info,
            q,
            *pool,
            query_starts,
            pages.starts,
            pages.pages,
            pages.last_page_lens,
            out,
            None,  # log-sum-exp
            _CAUSAL if mask is None else _MASKED,
            _NHD,
            self._window_left,
            overlaps and self._has_pdl,
            None if mask is None else mask.bits,
            None if mask is None else mask.starts,
            None,  # ALiBi slopes
            None,  # items scored at once
            None,
            None,
            0.0,  # soft cap
            scale,
            None,  # scales of q, k and v
            None,
            None,
            1.0,  # RoPE, which has been applied
            1.0,
            0,
            0,
        )


class ShortRowKernels(_Kernels):
    """FlashAttention 2. A group's query heads share a tile, and a long context is divided."""

    plans_by_pages = True

    def plan_bytes(self, limits: PlanLimits) -> int:
        """See PagedKernels: three indices and a flag a block, two arrays of starts."""
        smallest_tile = self._tile(limits) if limits.is_captured else _TILES_Q[0]
        blocks = self._num_blocks(limits, smallest_tile)
        return 13 * blocks + 4 * (limits.num_rows + limits.num_tokens) + _SLACK_BYTES

    def float_bytes(self, limits: PlanLimits) -> int:
        """See PagedKernels: each block's output and weights, float32; of other plans only those whose blocks
        are a wave divide contexts."""
        shape, tile = self._shape, self._tile(limits)
        blocks = self._num_blocks(limits, tile) if limits.is_captured else self._num_wave_blocks
        return shape.num_heads * blocks * tile * (shape.head_dim + 1) * 4 + _SLACK_BYTES

    def plan(self, rows: HostRows, memory: PlanMemory) -> PlanInfo:
        """See PagedKernels."""
        # no fixed size of the parts of a context, contexts may be divided, no blocks for other kernels
        return self._plan(rows, memory, -1, False, 0)

    def plan_whole(self, rows: HostRows, memory: PlanMemory) -> PlanInfo:
        """See PagedKernels. Its grid is what the rows need: to be captured all the same, once."""
        return self._plan(rows, memory, -1, True, 0)

    @property
    def _num_wave_blocks(self) -> int:
        """Count the blocks of a KV head that run at once."""
        return _CTAS_PER_SM * self._num_sms // self._shape.num_kv_heads

    def _num_blocks(self, limits: PlanLimits, tile: int) -> int:
        """Return how many blocks a KV head has: a wave, or one a tile of queries if these are more."""
        group_size = self._shape.num_heads // self._shape.num_kv_heads
        tiles = -(-limits.num_tokens * group_size // tile) + limits.num_rows - 1
        return max(self._num_wave_blocks, tiles)

    def _tile(self, limits: PlanLimits) -> int:
        """Return the queries of a block, as the library chooses for the longest row that there may be."""
        longest = limits.num_tokens - limits.num_rows + 1 if limits.is_captured else math.inf
        packed_len = longest * (self._shape.num_heads // self._shape.num_kv_heads)
        small, middle, large = _TILES_Q
        if packed_len > middle and self._shape.head_dim < 256:
            return large
        return middle if packed_len > small else small


class LongRowKernels(_Kernels):
    """FlashAttention 3: as many blocks as processors, each with a list of tiles of queries."""

    plans_by_pages = False

    def plan_bytes(self, limits: PlanLimits) -> int:
        """See PagedKernels: seven numbers for each tile of each head, and where a processor's list starts."""
        tiles = -(-limits.num_tokens // _LONG_TILES_Q[self._shape.head_dim]) + limits.num_rows - 1
        return 28 * tiles * self._shape.num_heads + 4 * (self._num_sms + 1) + _SLACK_BYTES

    def float_bytes(self, limits: PlanLimits) -> int:
        """See PagedKernels: none."""
        return 0

    def plan(self, rows: HostRows, memory: PlanMemory) -> PlanInfo:
        """See PagedKernels."""
        return self._plan(rows, memory)

    def plan_whole(self, rows: HostRows, memory: PlanMemory) -> PlanInfo:
        """See PagedKernels: no context is ever divided."""
        return self._plan(rows, memory)


def _load(
    shape: HeadShape, variants: Sequence[tuple[Literal["fa2", "fa3"], bool]]
) -> dict[tuple[str, bool], Any]:
    jit, prefill = _module("flashinfer.jit"), _module("flashinfer.prefill")
    head = (shape.dtype, shape.dtype, shape.dtype, torch.int32, shape.head_dim, shape.head_dim)
    arguments = {
        (kind, is_sliding): (kind, *head, _NO_POSITIONS, is_sliding, False, False)
        for kind, is_sliding in variants
    }
    try:
        specs = [jit.gen_batch_prefill_module(*values) for values in arguments.values()]
        missing = [spec for spec in specs if not spec.is_compiled]
        if missing:
            names = [spec.name for spec in missing]
            logger.info(
                "compiling %d attention kernels, once for this machine: a minute or two",
                len(missing),
                extra={"kernels": names},
            )
            started_s = time.monotonic()
            jit.build_jit_specs(missing)
            logger.info("compiled", extra={"seconds": round(time.monotonic() - started_s, 1)})
        return {key: prefill.get_batch_prefill_module(*values) for key, values in arguments.items()}
    except (RuntimeError, OSError) as error:
        raise FlashInferError(f"its kernels do not compile: {error}") from error


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError, OSError) as error:
        raise FlashInferError(f"{error}; pip install eyrie[cuda]") from error
