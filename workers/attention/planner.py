"""Planner: FlashInfer's plans for parts of a batch, from staging sets of its own. Engine's thread."""

from dataclasses import dataclass

import torch

from workers.attention.flashinfer_kernels import HostRows, PagedKernels, PlanInfo, PlanLimits, PlanMemory
from workers.engine.copies import CopyStream, Fence
from workers.engine.staging import StagingRing


class PlanChangedError(RuntimeError):
    """A plan does not fit the graph that was captured with another: a bug, here or in the library."""


@dataclass
class PinnedPlan:
    """A staging set: where the library writes a plan before it copies it."""

    data: torch.Tensor
    fence: Fence | None = None


class Planner:
    """Plans a part of a batch, again and again, for kernels that read the plan at one address (I3)."""

    def __init__(
        self,
        kernels: PagedKernels,
        limits: PlanLimits,
        floats: torch.Tensor,
        copies: CopyStream,
        *,
        always_has_rows: bool,
        is_ring: bool,
    ) -> None:
        device = floats.device
        num_bytes = kernels.plan_bytes(limits)
        self.kernels = kernels
        self._limits = limits
        self._floats = floats
        self._copies = copies
        self._device = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self._ring: StagingRing[PinnedPlan] = StagingRing(
            lambda: PinnedPlan(torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")),
            is_ring,
        )
        self._always_has_rows = always_has_rows
        self._captured: list[int] | None = None
        self._planned: tuple[bytes, bytes] | None = None
        """Which rows `_device` has the plan of, where that is a captured part's."""
        self._part: PlannedPart | None = None

    def plan_whole(self, rows: HostRows) -> "PlannedPart":
        """Plan rows of one token for good; see PagedKernels."""
        pinned = self._ring.acquire()
        memory = PlanMemory(self._floats, self._device, pinned.data)
        info = self.kernels.plan_whole(rows, memory)
        pinned.fence = self._copies.fence()
        return PlannedPart(self.kernels, info, memory, self._always_has_rows)

    def plan(self, rows: HostRows) -> "PlannedPart":
        """Plan rows within the limits; those of a captured part are as many as these.

        Where the kernels ask for no more than rows' pages, a captured part's plan holds until these change.
        """
        asked = (rows.query_starts.tobytes(), rows.page_starts.tobytes())
        if self._part is not None and asked == self._planned:
            return self._part
        pinned = self._ring.acquire()
        memory = PlanMemory(self._floats, self._device, pinned.data)
        info = self.kernels.plan(rows, memory)
        pinned.fence = self._copies.fence()
        if self._limits.is_captured:
            self._captured = self._captured or list(info)
            if list(info) != self._captured:
                raise PlanChangedError(f"found {list(info)}, allowed is {self._captured}, the graph's")
        part = PlannedPart(self.kernels, info, memory, self._always_has_rows)
        if self._limits.is_captured and self.kernels.plans_by_pages:
            self._planned, self._part = asked, part
        return part


@dataclass(frozen=True)
class PlannedPart:
    """What a layer's attention calls for a part of the batch."""

    kernels: PagedKernels
    info: PlanInfo
    memory: PlanMemory
    overlaps: bool
    """It may begin before what is in front of it has ended, for which each row waits; false where there may
    be no row: a kernel that waits for nothing would seem to say that all before it has ended."""
