"""FakeLibrary: FlashInfer's part in plain torch, on CPU. A plan is read from the buffer it was copied to."""

from dataclasses import dataclass, field

import numpy as np
import torch

from workers.attention.flashinfer_kernels import HeadShape, HostRows, PlanInfo, PlanLimits, PlanMemory
from workers.attention.row_pages import RowPages
from workers.attention.tree_mask import TreeMask
from workers.engine.copies import CopyStream


@dataclass
class FakeKernels:
    """Attends the rows of a plan that it finds in its device buffer: [number of rows, their starts ...]."""

    name: str
    shape: HeadShape
    window: int | None
    copies: CopyStream
    plans: list[HostRows] = field(default_factory=list)
    limits: list[PlanLimits] = field(default_factory=list)
    runs: list[tuple[int, int]] = field(default_factory=list)
    overlaps: set[bool] = field(default_factory=set)
    info: list[int] = field(default_factory=lambda: [7])
    plans_by_pages: bool = False
    whole_info: list[int] = field(default_factory=lambda: [1])
    """Of plans that hold for contexts of any length"""

    def plan_bytes(self, limits: PlanLimits) -> int:
        self.limits.append(limits)
        return 4 * (3 * limits.num_rows + 3)

    def float_bytes(self, limits: PlanLimits) -> int:
        return limits.num_rows

    def plan(self, rows: HostRows, memory: PlanMemory) -> PlanInfo:
        num_rows = len(rows.context_lens)
        assert len(rows.query_starts) == len(rows.page_starts) == num_rows + 1
        limits = PlanLimits(num_rows, rows.num_tokens, rows.is_captured)
        assert len(memory.floats) >= self.float_bytes(limits), "its partial results find no room"
        self.plans.append(
            HostRows(
                rows.query_starts.copy(),
                rows.page_starts.copy(),
                rows.context_lens.copy(),
                rows.num_tokens,
                rows.is_captured,
                rows.is_causal,
            )
        )
        words = np.concatenate([[num_rows], rows.query_starts, rows.page_starts, rows.context_lens])
        pinned = memory.pinned.view(torch.int32)
        pinned[: len(words)] = torch.from_numpy(words.astype(np.int32))
        self.copies.copy(memory.device, memory.pinned)
        return [*self.info]

    def plan_whole(self, rows: HostRows, memory: PlanMemory) -> PlanInfo:
        assert not rows.is_captured, "its grid would have blocks without rows"
        self.plan(rows, memory)
        return self.whole_info

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
        self.overlaps.add(overlaps)
        assert self.plans[-1].is_causal == (mask is None) and not (mask and self.name == "long")
        words = memory.device.view(torch.int32).tolist()
        num_rows = words[0]
        starts = words[1 : num_rows + 2]
        page_starts = words[num_rows + 2 : 2 * num_rows + 3]
        context_lens = words[2 * num_rows + 3 : 3 * num_rows + 3]
        if info is self.whole_info:  # the device's own say how long they are
            page_starts = pages.starts.tolist()
            num_pages = np.diff(page_starts)
            context_lens = ((num_pages - 1) * self.shape.page_size + pages.last_page_lens.numpy()).tolist()
        for row in range(num_rows):
            if starts[row] == starts[row + 1]:
                continue
            # The device's own arrays agree with the plan.
            assert query_starts[1:].tolist().count(starts[row + 1]), (row, starts, query_starts)
            place = pages.starts.tolist().index(page_starts[row])
            last = int(pages.last_page_lens[place])
            num_pages = page_starts[row + 1] - page_starts[row]
            context_len = (num_pages - 1) * self.shape.page_size + last
            assert self.plans_by_pages or context_len == context_lens[row]
            self.runs.append((starts[row], starts[row + 1]))
            own_mask = None
            if mask is not None:  # whose rows are the batch's, of which this begins at the same token
                of_batch = int((query_starts == starts[row]).nonzero()[-1])
                own_mask = mask.bits[mask.starts[of_batch] :][: mask.row_bytes]
            self._attend(
                q, pool, pages.pages[page_starts[row] : page_starts[row + 1]], context_len,
                slice(starts[row], starts[row + 1]), scale, out, own_mask,
            )  # fmt: skip

    def _attend(
        self,
        q: torch.Tensor,
        pool: tuple[torch.Tensor, torch.Tensor],
        pages: torch.Tensor,
        context_len: int,
        tokens: slice,
        scale: float,
        out: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> None:
        group_size = self.shape.num_heads // self.shape.num_kv_heads
        k, v = (
            half[pages.long()].flatten(0, 1)[:context_len].float().repeat_interleave(group_size, dim=1)
            for half in pool
        )
        num_queries = tokens.stop - tokens.start
        positions = torch.arange(context_len - num_queries, context_len)[:, None]
        keys = torch.arange(context_len)
        visible = keys <= positions
        if mask is not None:
            bits = (mask[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).view(-1)
            assert num_queries * context_len <= len(bits), "a row beyond its mask"
            visible = bits[: num_queries * context_len].view(num_queries, context_len) > 0
        if self.window is not None:
            visible &= keys > positions - self.window
        scores = torch.einsum("qhd,khd->hqk", q[tokens].float(), k) * scale
        weights = torch.softmax(scores.masked_fill(~visible, float("-inf")), dim=-1)
        out[tokens] = torch.einsum("hqk,khd->qhd", weights, v).to(out.dtype)


class FakeLibrary:
    """KernelLibrary; `has_long`: as on a Hopper card."""

    def __init__(self, shape: HeadShape, copies: CopyStream, has_long: bool = True) -> None:
        self.shape, self.copies, self.has_long = shape, copies, has_long
        self.made: list[FakeKernels] = []

    def short(self, window: int | None) -> FakeKernels:
        return self._make("short", window)

    def long(self, window: int | None) -> FakeKernels | None:
        return self._make("long", window) if self.has_long else None

    def kernels(self, name: str, window: int | None = None) -> FakeKernels:
        return next(made for made in self.made if (made.name, made.window) == (name, window))

    def _make(self, name: str, window: int | None) -> FakeKernels:
        self.made.append(FakeKernels(name, self.shape, window, self.copies))
        return self.made[-1]
