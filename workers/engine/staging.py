"""Staging: turns a plan's rows into the inputs of one forward pass (I3, I4, I9). The engine's thread.

Inputs are written to a staging set in (pinned) host memory and copied to the device on the compute stream; a
set is written again only after its copy. Locations and page rows are derived from the PageTable here.
"""

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from workers.engine.copies import CopyStream, Fence
from workers.engine.forward_batch import ForwardBatch, TokenTree
from workers.engine.graph_guard import Bucket
from workers.engine.last_tokens import LastTokens
from workers.engine.mechanisms import ALL_ON, Mechanisms
from workers.engine.staged_tokens import DraftIds, SlotArray, are_chains, count_up, known_tokens
from workers.kvcache.kv_pool import DUMMY_PAGE
from workers.kvcache.page_table import PageTable
from workers.plan import BatchPlan, Mode

MAX_STEPS_IN_FLIGHT = 1
"""Depth: steps that may be planned while one runs."""
NUM_STAGING_SETS = MAX_STEPS_IN_FLIGHT + 2
_ALIGNMENT = 64


class StepInputs:
    """One set of inputs, packed into one run of bytes so that a step's copy is one copy.

    The page rows come last, as wide as the step's longest:  | token_ids | ... | num_columns | page rows |
    """

    def __init__(
        self,
        num_tokens: int,
        num_rows: int,
        max_columns: int,
        device: torch.device,
        pinned: bool = False,
    ) -> None:
        parts: list[tuple[torch.dtype, int]] = [
            (torch.int64, num_tokens),
            (torch.int64, num_tokens),
            (torch.int64, num_tokens),
            (torch.int64, max(num_tokens, num_rows)),
            (torch.int64, num_rows),
            (torch.int32, num_rows + 1),
            (torch.int32, num_rows),
            (torch.int32, 1),
            (torch.int32, num_rows * max_columns),
        ]
        offsets = [0]
        for dtype, count in parts:
            num_bytes = count * dtype.itemsize
            offsets.append(offsets[-1] + -(-num_bytes // _ALIGNMENT) * _ALIGNMENT)
        self.data = torch.zeros(offsets[-1], dtype=torch.uint8, device=device, pin_memory=pinned)
        views = [
            self.data[start : start + count * dtype.itemsize].view(dtype)
            for start, (dtype, count) in zip(offsets, parts, strict=False)
        ]
        self.token_ids, self.positions, self.out_locations, self.sample_indices = views[:4]
        self.slots, self.query_starts, self.context_lens, self.num_columns, self._pages = views[4:]
        self.max_columns = max_columns
        self.rows_offset = offsets[8]
        self._views: dict[tuple[int, int], torch.Tensor] = {}

    def page_rows(self, num_rows: int, num_columns: int) -> torch.Tensor:
        """Return the page rows of a step in which the longest has `num_columns` pages, [rows, columns]."""
        shape = (num_rows, num_columns)
        if shape not in self._views:
            self._views[shape] = self._pages[: num_rows * num_columns].view(shape)
        return self._views[shape]


class HostInputs(StepInputs):
    """A staging set: StepInputs in host memory, with numpy views, and the fence of its last copy."""

    def __init__(self, num_tokens: int, num_rows: int, max_columns: int, pinned: bool) -> None:
        super().__init__(num_tokens, num_rows, max_columns, torch.device("cpu"), pinned)
        self.fence: Fence | None = None
        self.token_id_array: npt.NDArray[np.int64] = self.token_ids.numpy()
        self.position_array: npt.NDArray[np.int64] = self.positions.numpy()
        self.location_array: npt.NDArray[np.int64] = self.out_locations.numpy()
        self.sample_array: npt.NDArray[np.int64] = self.sample_indices.numpy()
        self.slot_array: npt.NDArray[np.int64] = self.slots.numpy()
        self.start_array: npt.NDArray[np.int32] = self.query_starts.numpy()
        self.len_array: npt.NDArray[np.int32] = self.context_lens.numpy()
        self.num_columns_array: npt.NDArray[np.int32] = self.num_columns.numpy()


class StagingSet(Protocol):
    """Host memory that a copy to the device reads."""

    fence: Fence | None
    """Of the last copy; None: it is done."""


AnySet = TypeVar("AnySet", bound=StagingSet)


class StagingRing(Generic[AnySet]):
    """NUM_STAGING_SETS staging sets in turn: a step's set is not written while its copy may be pending."""

    def __init__(self, make: Callable[[], AnySet], is_ring: bool = True) -> None:
        self._sets = [make() for _ in range(NUM_STAGING_SETS if is_ring else 1)]
        self._is_ring = is_ring
        self._next = 0

    def acquire(self) -> AnySet:
        """Return the set to write next, waiting for its last copy."""
        host = self._sets[self._next]
        self._next = (self._next + 1) % len(self._sets)
        if host.fence is not None and self._is_ring:
            host.fence.synchronize()
        host.fence = None
        return host


class BucketInputs:
    """The static inputs of a bucket and the ring that feeds them. `max_slots`: a mixed bucket's rows, each of
    which wants the logits of `samples_per_row` tokens at most.

    A mixed bucket has a row more, for the pad tokens; all of these must find a column in it.
    """

    def __init__(
        self,
        bucket: Bucket,
        max_slots: int,
        page_size: int,
        pages_per_row: int,
        device: torch.device,
        mechanisms: Mechanisms = ALL_ON,
        samples_per_row: int = 1,
        has_trees: bool = False,
    ) -> None:
        size = bucket.size
        is_decode = bucket.mode == "decode"
        num_rows = size if is_decode else min(max_slots, size) + 1
        max_columns = pages_per_row if is_decode else max(pages_per_row, -(-size // page_size))

        def make() -> HostInputs:
            host = HostInputs(size, num_rows, max_columns, pinned=device.type == "cuda")
            if is_decode:  # one token a row, on every step
                host.start_array[:] = np.arange(size + 1)
                host.sample_array[:] = np.arange(size)
            return host

        self.bucket = bucket
        self.num_rows = num_rows
        self.samples_per_row = samples_per_row
        max_samples = size if bucket.mode == "verify" else min(max_slots * samples_per_row, size) + 1
        self.num_samples = size if is_decode else min(max_samples, max(size, num_rows))
        """Tokens whose logits it computes."""
        self.static = StepInputs(size, num_rows, max_columns, device)
        self.tree = TokenTree.room(size, device) if has_trees and bucket.mode == "verify" else None
        """Filled by the Speculator; until then every token sees its whole row."""
        self.ring = StagingRing(make, mechanisms.rings_staging)
        self.has_rows = False


class Stager:
    """Fills staging sets from plans and sends them to the device.

    `stage_eager` makes tensors of exactly the plan's size; `stage_bucket` pads to a bucket's static inputs.
    Both return the batch and the slot of each of its rows, the dummy slot for pads. Tokens that a plan awaits
    are taken on the device from `last_tokens`, behind the copy of the others.
    """

    def __init__(
        self,
        table: PageTable,
        max_tokens: int,
        device: torch.device,
        copies: CopyStream,
        mechanisms: Mechanisms = ALL_ON,
        last_tokens: LastTokens | None = None,
        draft_ids: DraftIds | None = None,
    ) -> None:
        self._table = table
        self._draft_ids = draft_ids
        self._last_tokens = last_tokens
        self._device = device
        self._copies = copies
        self._mechanisms = mechanisms
        pinned = device.type == "cuda"
        self._eager_ring = StagingRing(
            lambda: HostInputs(max_tokens, table.max_slots, table.pages_per_row, pinned),
            mechanisms.rings_staging,
        )

    def stage_eager(self, plan: BatchPlan, mode: Mode) -> tuple[ForwardBatch, SlotArray]:
        """Stage a plan of any mode; the batch's tensors belong to this step."""
        host = self._eager_ring.acquire()
        slots = self._fill(host, plan)
        num_rows, num_tokens, num_sampled = len(plan.slots), plan.num_tokens, plan.num_samples
        lens = host.len_array[:num_rows]
        num_columns = -(-int(lens.max()) // self._table.page_size)
        rows = host.page_rows(num_rows, num_columns)
        self._table.stage_rows(slots, rows.numpy())
        host.num_columns_array[0] = num_columns
        batch = ForwardBatch(
            mode=mode,
            bucket=None,
            num_real_rows=num_rows,
            num_samples=num_sampled,
            token_ids=self._send(host.token_ids[:num_tokens]),
            positions=self._send(host.positions[:num_tokens]),
            page_rows=self._send(rows),
            query_starts=self._send(host.query_starts[: num_rows + 1]),
            slots=self._send(host.slots[:num_rows]),
            context_lens=self._send(host.context_lens[:num_rows]),
            out_locations=self._send(host.out_locations[:num_tokens]),
            sample_indices=self._send(host.sample_indices[:num_sampled]),
            num_columns=self._send(host.num_columns),
            max_columns=num_columns,
            host_query_starts=host.start_array[: num_rows + 1],
            host_context_lens=lens,
        )
        if plan.num_awaited:
            self._take_awaited(plan, batch.token_ids, batch.slots[: plan.num_awaited])
        host.fence = self._copies.fence()
        return batch, slots

    def stage_bucket(self, plan: BatchPlan, bucket: BucketInputs) -> tuple[ForwardBatch, SlotArray]:
        """Stage a plan that fits into the bucket's static inputs."""
        #   rows    | the plan's |         pads          |
        #           0         num_real            num_rows
        #   tokens  | the plan's | id 0 at position 0 of the dummy page |
        host = bucket.ring.acquire()
        num_real, num_rows = len(plan.slots), bucket.num_rows
        is_decode = bucket.bucket.mode == "decode"
        slots = np.full(num_rows, self._table.dummy_slot, dtype=np.int64)
        if is_decode:
            slots[:num_real] = plan.slots
            self._fill_decode(host, plan, slots[:num_real])
        else:
            slots[:num_real] = self._fill_chains(host, plan) if are_chains(plan) else self._fill(host, plan)
        num_tokens, num_samples = plan.num_tokens, num_real if is_decode else plan.num_samples
        if not is_decode:
            #   query_starts  | ..., num_tokens | size, size, ... |: the first pad row has all pad tokens
            host.start_array[num_real + 1 :] = bucket.bucket.size
            host.sample_array[num_samples:] = 0
        host.slot_array[:] = slots
        if self._mechanisms.pads_rows:
            host.token_id_array[num_tokens:] = 0
            host.position_array[num_tokens:] = 0
            host.location_array[num_tokens:] = DUMMY_PAGE * self._table.page_size
            host.len_array[num_real:] = host.start_array[num_real + 1 :] - host.start_array[num_real:-1]
        longest = max(
            int(host.len_array[:num_real].max()), 0 if is_decode else bucket.bucket.size - num_tokens
        )
        num_columns = host.num_columns_array[0] = -(-longest // self._table.page_size)
        self._fill_rows(host.page_rows(num_rows, num_columns).numpy(), slots[:num_real])
        static = bucket.static
        copied = slice(static.rows_offset)
        if self._mechanisms.copies_rows or not bucket.has_rows:
            copied = slice(static.rows_offset + num_rows * num_columns * static.num_columns.itemsize)
            bucket.has_rows = True
        self._copies.copy(static.data[copied], host.data[copied])
        if plan.num_awaited:
            self._take_awaited(plan, static.token_ids, static.slots[: plan.num_awaited])
        host.fence = self._copies.fence()
        return static_batch(bucket, plan.mode, num_real, num_samples, host), slots

    def _fill_rows(self, rows: npt.NDArray[np.int32], slots: SlotArray) -> None:
        """Write the pages of the slots to `rows`, and dummy pages to those of pads and behind the table's."""
        num_real, num_columns = len(slots), min(rows.shape[1], self._table.pages_per_row)
        self._table.stage_rows(slots, rows[:num_real, :num_columns])
        rows[:num_real, num_columns:] = DUMMY_PAGE
        if self._mechanisms.pads_rows:
            rows[num_real:] = DUMMY_PAGE

    def _fill_decode(self, host: HostInputs, plan: BatchPlan, slots: SlotArray) -> None:
        """Write tokens, positions, places and lengths of rows of one token each."""
        num_rows = len(slots)
        positions = host.position_array[:num_rows]
        positions[:] = plan.starts
        host.token_id_array[:num_rows] = known_tokens(plan)
        host.len_array[:num_rows] = positions
        host.len_array[:num_rows] += 1
        self._table.stage_locations(slots, positions, host.location_array[:num_rows])

    def _fill_chains(self, host: HostInputs, plan: BatchPlan) -> SlotArray:
        """As `_fill`, where `are_chains`."""
        num_rows, num_tokens, length = len(plan.slots), plan.num_tokens, plan.lens[0]
        slots = np.array(plan.slots, dtype=np.int64)
        starts = np.array(plan.starts, dtype=np.int64)
        numbers = np.arange(length)
        positions = host.position_array[:num_tokens]
        np.add(starts[:, None], numbers, out=positions.reshape(num_rows, length))
        tokens = host.token_id_array[:num_tokens].reshape(num_rows, length)
        tokens[:, 0] = plan.token_ids
        tokens[:, 1:] = 0 if self._draft_ids is None else self._draft_ids.firsts(slots) + numbers[:-1]
        host.slot_array[:num_rows] = slots
        host.start_array[: num_rows + 1] = np.arange(0, num_tokens + 1, length)
        host.len_array[:num_rows] = starts + length
        host.sample_array[:num_tokens] = np.arange(num_tokens)
        self._table.stage_locations(np.repeat(slots, length), positions, host.location_array[:num_tokens])
        return slots

    def _fill(self, host: HostInputs, plan: BatchPlan) -> SlotArray:
        """Write all but page rows of rows of any length; return their slots, those of one token first."""
        num_rows, num_tokens = len(plan.slots), plan.num_tokens
        slots = np.array(plan.slots, dtype=np.int64)
        starts = np.array(plan.starts, dtype=np.int64)
        lens = np.array(plan.lens, dtype=np.int64)
        tokens = known_tokens(plan, self._draft_ids)
        sampled = np.array(plan.sampled, dtype=np.int64)
        order = np.argsort(lens > 1, kind="stable")
        ends = np.cumsum(lens)
        if (order[1:] < order[:-1]).any():
            firsts = (ends - lens)[order]  # of the plan's tokens
            slots, starts, lens = slots[order], starts[order], lens[order]
            ends = np.cumsum(lens)
            tokens = tokens[np.arange(num_tokens) + np.repeat(firsts - (ends - lens), lens)]
            sampled = np.argsort(order)[sampled]
        num_samples = 1 + np.array(plan.num_drafts, dtype=np.int64)[plan.sampled] if plan.num_drafts else None
        positions = host.position_array[:num_tokens]
        positions[:] = np.arange(num_tokens) + np.repeat(starts - (ends - lens), lens)
        host.token_id_array[:num_tokens] = tokens
        host.slot_array[:num_rows] = slots
        host.start_array[0] = 0
        host.start_array[1 : num_rows + 1] = ends
        host.len_array[:num_rows] = starts + lens
        lasts = ends[sampled] - 1
        if num_samples is not None:  # the row's own token and each of its drafts
            firsts = np.repeat(lasts + 1 - num_samples, num_samples)
            lasts = firsts + count_up(num_samples)
        host.sample_array[: len(lasts)] = lasts
        self._table.stage_locations(np.repeat(slots, lens), positions, host.location_array[:num_tokens])
        return slots

    def _take_awaited(self, plan: BatchPlan, token_ids: torch.Tensor, slots: torch.Tensor) -> None:
        assert self._last_tokens is not None, "a plan awaits tokens on a rank that keeps none"
        self._last_tokens.take(token_ids[: plan.num_awaited], slots)

    def _send(self, staged: torch.Tensor) -> torch.Tensor:
        target = torch.empty(staged.shape, dtype=staged.dtype, device=self._device)
        self._copies.copy(target, staged)
        return target


def static_batch(
    bucket: BucketInputs, mode: Mode, num_real_rows: int, num_samples: int, host: HostInputs
) -> ForwardBatch:
    """Return the batch that `host` put into a bucket's static inputs."""
    static = bucket.static
    return ForwardBatch(
        mode=mode,
        bucket=bucket.bucket,
        num_real_rows=num_real_rows,
        num_samples=num_samples,
        token_ids=static.token_ids,
        positions=static.positions,
        page_rows=static.page_rows(bucket.num_rows, int(host.num_columns_array[0])),
        query_starts=static.query_starts,
        slots=static.slots,
        context_lens=static.context_lens,
        out_locations=static.out_locations,
        sample_indices=static.sample_indices[: bucket.num_samples],
        num_columns=static.num_columns,
        max_columns=static.max_columns,
        host_query_starts=host.start_array,
        host_context_lens=host.len_array,
        tree=bucket.tree,
    )
