"""SanitizedRank: a fake rank that stages each plan as the Engine does, under the real KV sanitizer.

Page table, staging, pool and sanitizer are the engine's own; only the model is a fake, which writes each
token into the K and V at its place and reads its whole context back through the staged page rows.
"""

from collections.abc import Sequence

import torch

from tests.property.fake_arena import Contents
from tests.property.fake_group import VOCAB_SIZE
from tests.property.fake_mover import FakeMover
from tests.property.fake_ranks import FakeRank
from workers.config import WorkerConfig
from workers.engine.copies import InlineCopies
from workers.engine.forward_batch import ForwardBatch
from workers.engine.graph_guard import Bucket
from workers.engine.last_tokens import LastTokens
from workers.engine.mechanisms import ALL_ON
from workers.engine.sampled import Sampled
from workers.engine.staging import BucketInputs, Stager
from workers.kvcache.kv_pool import KVPool
from workers.kvcache.layout import target_only
from workers.kvcache.page_table import PageTable
from workers.kvcache.sanitizer import KVSanitizer
from workers.plan import BatchPlan, CloseSlot, PlanOp, SetRow

_CPU = torch.device("cpu")


class SanitizedRank(FakeRank):
    """The sanitizer looks first, then the fake rank's own checks."""

    mechanisms = ALL_ON

    def __init__(self, config: WorkerConfig, max_context_len: int, incarnation: int) -> None:
        assert config.num_pages is not None
        super().__init__(config.num_pages, config.page_size, VOCAB_SIZE, incarnation)
        max_slots = config.max_running_requests
        pages_per_row = -(-(max_context_len + config.draft_window) // config.page_size)
        self.num_run = 0  # plans with rows
        self.pool = KVPool(target_only(1, config.page_size, 1, 1, "float32"), config.num_pages, _CPU)
        self.table = PageTable(max_slots, pages_per_row, config.page_size, config.num_pages, checked=True)
        max_tokens = max(config.max_tokens_per_step, max_slots)
        self.sampled = LastTokens(max_slots, _CPU, InlineCopies())
        self.stager = Stager(self.table, max_tokens, _CPU, InlineCopies(), self.mechanisms, self.sampled)
        self.bucket = BucketInputs(
            Bucket("decode", max_slots), max_slots, config.page_size, pages_per_row, _CPU, self.mechanisms
        )
        self.sanitizer = KVSanitizer(self.pool, max_slots, pages_per_row)

    def attach(self, mover: FakeMover) -> None:
        super().attach(mover)
        self.sanitizer.watch(mover)

    def apply_all(self, ops: Sequence[PlanOp]) -> None:
        for op in ops:
            if isinstance(op, SetRow):
                self.table.set_row(op)
            elif isinstance(op, CloseSlot):
                self.table.close_slot(op)
        self.sanitizer.apply(list(ops))
        super().apply_all(ops)

    def run_rows(self, plan: BatchPlan) -> list[list[int]]:
        contexts = self.run_staged(plan) if plan.slots else []
        rows = super().run_rows(plan)
        if rows:
            sampled = Sampled(torch.tensor([token_ids[-1] for token_ids in rows]), None)
            self.sampled.keep([plan.slots[row] for row in plan.sampled], sampled)
        for slot, context in zip(plan.slots, contexts, strict=True):
            assert context == self.read(slot, len(context)), f"pool: slot {slot} reads another's text"
        for row, token_ids in zip(plan.sampled, rows, strict=True):
            end = plan.starts[row] + plan.lens[row] - plan.drafts(row)
            self.sanitizer.rewind(plan.slots[row], end + len(token_ids) - 1)
        return rows

    def run_staged(self, plan: BatchPlan) -> list[list[int]]:
        """Stage, check, write and read; return the tokens of each row's context."""
        if plan.mode == "decode":
            batch, slots = self.stager.stage_bucket(plan, self.bucket)
        else:
            batch, slots = self.stager.stage_eager(plan, plan.mode)
        if plan.num_drafts:
            self.put_drafts(plan, batch, slots.tolist())
        self.sanitizer.check_inputs(batch, slots)
        contexts = self.forward(batch)
        logits = torch.stack([context.sum() for context in contexts])[:, None]
        self.sanitizer.check_outputs(logits, plan.slots)
        self.num_run += 1
        assert self.sanitizer.num_steps == self.num_run, "the sanitizer missed a step"
        # The staged order is another than the plan's where rows are of one token and of more.
        by_slot = dict(zip(slots.tolist(), contexts, strict=False))
        return [[int(token_id) for token_id in by_slot[slot].tolist()] for slot in plan.slots]

    def put_drafts(self, plan: BatchPlan, batch: ForwardBatch, slots: list[int]) -> None:
        """As the Speculator does: the last tokens of a row are its slot's drafts."""
        num_drafts = dict(zip(plan.slots, plan.num_drafts, strict=True))
        for row, slot in enumerate(slots):
            if num := num_drafts[slot]:
                end = int(batch.host_query_starts[row + 1])
                batch.token_ids[end - num : end] = torch.tensor(self.drafts[slot][:num])

    def forward(self, batch: ForwardBatch) -> list[torch.Tensor]:
        """Write the batch's tokens, pads included; return what each real row reads, [context_len]."""
        keys, values = (half[:, :, 0, 0] for half in self.pool.layer(0))  # [num_pages + 1, page_size]
        pages, offsets = batch.out_locations // self.page_size, batch.out_locations % self.page_size
        keys[pages, offsets] = values[pages, offsets] = batch.token_ids.float()
        self.pool.zero_dummy_page()
        rows = zip(batch.page_rows, batch.host_context_lens.tolist(), strict=True)
        return [
            keys[page_row].flatten()[:length] + 0 * values[page_row].flatten()[:length]
            for page_row, length in list(rows)[: batch.num_real_rows]
        ]

    def contents_of(self, tokens: tuple[int, ...]) -> Contents:
        elsewhere = KVPool(self.pool.layout, 1, _CPU)
        for half in elsewhere.layer(0):
            half[1, :, 0, 0] = torch.tensor(tokens, dtype=torch.float32)
        return tokens, elsewhere.data[1].numpy().tobytes()

    def copy_out(self, page: int) -> Contents:
        return super().copy_out(page)[0], self.pool.data[page].numpy().tobytes()

    def copy_in(self, page: int, contents: Contents) -> None:
        super().copy_in(page, contents)
        self.pool.data[page] = torch.frombuffer(bytearray(contents[1]), dtype=torch.uint8)

    def copy_in_torn(self, page: int, contents: Contents) -> None:
        self.copy_in(page, contents)  # foreign bytes, once read, are the sanitizer's error
