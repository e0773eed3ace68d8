"""Fake ranks: apply a plan's ops and rows to pages of plain token ids, and refuse what no real rank survives.

The fake model reads every token it attends to through the row's pages, so a wrong page is a wrong text.
Nothing here uses the code under test but the plan's records.
"""

import hashlib
from collections.abc import Collection, Sequence

from workers.plan import (
    BatchPlan,
    CloseSlot,
    CompletePages,
    FreePages,
    OpenSlot,
    OwnPages,
    PlanOp,
    RelocationVersion,
    SetRow,
    StepOutput,
)
from workers.protocol import TokenLogprobs


def next_token(token_ids: Sequence[int], seed: int, vocab_size: int, banned: Collection[int] = ()) -> int:
    """The fake model: a token that depends on the seed and on all tokens before it."""
    state = repr((seed, list(token_ids))).encode()
    while True:
        state = hashlib.sha256(state).digest()
        token_id = int.from_bytes(state[:8], "little") % vocab_size
        if token_id not in banned:
            return token_id


class FakeRank:
    """One rank's pages and page table. A step stays incomplete until `finish`: its copies are under way."""

    def __init__(self, num_pages: int, page_size: int, vocab_size: int, incarnation: int) -> None:
        self.page_size = page_size
        self.vocab_size = vocab_size
        self.version = RelocationVersion(incarnation, 0)
        self.pages: dict[int, list[int | None]] = {}  # owned pages
        self.generations = [0] * (num_pages + 1)
        self.keys: dict[int, bytes] = {}  # complete pages
        self.slots: dict[int, OpenSlot] = {}
        self.rows: dict[int, list[int]] = {}
        self.incomplete: dict[int, set[int]] = {}  # step -> pages it may still touch
        self.last_step = 0

    def run(self, plan: BatchPlan) -> StepOutput:
        assert plan.step == self.last_step + 1, "log: a step is missing"
        self.last_step = plan.step
        for op in plan.ops:
            self.apply(op)
        self.check_version(plan)
        assert len(set(plan.slots)) == len(plan.slots), "log: a slot runs twice"
        token_ids: list[int] = []
        touched: set[int] = set()
        offset = 0
        for row, (slot, start, length) in enumerate(zip(plan.slots, plan.starts, plan.lens, strict=True)):
            self.write(slot, start, plan.token_ids[offset : offset + length])
            touched.update(self.rows[slot])
            offset += length
            if row in plan.sampled:
                token_ids.append(self.sample(slot, start + length))
        assert offset == len(plan.token_ids), "log: tokens without a row"
        self.incomplete[plan.step] = touched
        logprobs: list[TokenLogprobs | None] = [None] * len(token_ids)
        return StepOutput(plan.step, self.version, token_ids, logprobs)

    def finish(self, step: int) -> int:
        """Let the steps up to `step` complete; return the last step up to which all are."""
        for done in [known for known in self.incomplete if known <= step]:
            del self.incomplete[done]
        return min(self.incomplete) - 1 if self.incomplete else self.last_step

    def check_version(self, plan: BatchPlan) -> None:
        assert self.version == plan.relocation_version, "version: the rank's log differs from the plan's"

    def apply(self, op: PlanOp) -> None:
        match op:
            case OpenSlot():
                assert op.slot not in self.slots, "row: the slot is open"
                self.slots[op.slot] = op
                self.rows[op.slot] = []
            case CloseSlot():
                del self.slots[op.slot], self.rows[op.slot]
            case OwnPages():
                self.own(op)
            case CompletePages():
                self.complete(op)
            case SetRow():
                self.set_row(op)
            case FreePages():
                self.free(op)

    def own(self, op: OwnPages) -> None:
        self.relocated()
        for page, generation in zip(op.pages, op.generations, strict=True):
            assert page != 0, "own: the dummy page was handed out"
            assert page not in self.pages, f"own: page {page} has an owner"
            assert generation > self.generations[page], f"generation: page {page} is not told from before"
            self.generations[page] = generation
            self.pages[page] = [None] * self.page_size

    def complete(self, op: CompletePages) -> None:
        for page, key in zip(op.pages, op.keys, strict=True):
            assert None not in self.pages[page], f"complete: page {page} has holes"
            assert page not in self.keys, f"complete: page {page} twice"
            self.keys[page] = key

    def set_row(self, op: SetRow) -> None:
        row = self.rows[op.slot]
        assert op.first <= len(row), "row: a gap"
        for index, (page, generation) in enumerate(zip(op.pages, op.generations, strict=True)):
            assert page in self.pages, f"row: page {page} is not owned"
            assert generation == self.generations[page], f"generation: page {page} is named by a stale one"
            if op.keys:
                assert self.keys.get(page) == op.keys[index], f"row: page {page} holds other tokens"
            else:
                assert page not in self.keys, f"row: page {page} is complete, yet to be written"
            row[op.first + index : op.first + index + 1] = [page]

    def free(self, op: FreePages) -> None:
        self.relocated()
        for page in op.pages:
            holders = [slot for slot, row in self.rows.items() if page in row]
            assert not holders, f"free: page {page} is in the row of slot {holders}"
            steps = [step for step, pages in self.incomplete.items() if page in pages]
            assert not steps, f"fence: page {page} is freed while step {steps} may touch it"
            del self.pages[page]
            self.keys.pop(page, None)

    def relocated(self) -> None:
        self.version = RelocationVersion(self.version.incarnation, self.version.counter + 1)

    def write(self, slot: int, start: int, token_ids: Sequence[int]) -> None:
        row = self.rows[slot]
        room = len(row) * self.page_size
        assert start + len(token_ids) <= room, f"reserve: slot {slot} writes beyond its pages"
        for position, token_id in enumerate(token_ids, start):
            page = row[position // self.page_size]
            assert page not in self.keys, f"write: page {page} is complete and may be shared"
            self.pages[page][position % self.page_size] = token_id

    def sample(self, slot: int, context_len: int) -> int:
        op = self.slots[slot]
        token_ids = self.read(slot, context_len)
        known = min(context_len, len(op.token_ids))
        assert token_ids[:known] == op.token_ids[:known], f"read: slot {slot} reads another's text"
        is_banning = context_len - op.prompt_len < op.sampling.min_tokens
        banned = {*op.end_token_ids, *op.sampling.stop_token_ids} if is_banning else ()
        return next_token(token_ids, op.seed, self.vocab_size, banned)

    def read(self, slot: int, context_len: int) -> list[int]:
        token_ids: list[int] = []
        for position in range(context_len):
            page = self.rows[slot][position // self.page_size]
            token_id = self.pages[page][position % self.page_size]
            assert token_id is not None, f"read: slot {slot} reads what was never written"
            token_ids.append(token_id)
        return token_ids

    def check(self) -> None:
        writers: dict[int, int] = {}
        for slot, row in self.rows.items():
            assert len(set(row)) == len(row), f"row: slot {slot} names a page twice"
            for page in row:
                assert page in self.pages, f"row: slot {slot} names page {page}, which is not owned"
                if page not in self.keys:
                    assert page not in writers, (
                        f"row: page {page} has two writers, {slot} and {writers[page]}"
                    )
                    writers[page] = slot
