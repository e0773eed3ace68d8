"""Fake ranks: apply a plan's ops and rows to pages of plain token ids, and refuse what no real rank survives.

The fake model reads every token it attends to through the row's pages, so a wrong page is a wrong text.
Nothing here uses the code under test but the plan's records.
"""

import hashlib
from collections.abc import Collection, Sequence
from itertools import islice

from tests.property.fake_arena import Contents
from tests.property.fake_mover import FakeMover
from workers.move_board import MoveStatus
from workers.plan import (
    BatchPlan,
    CloseSlot,
    CompletePages,
    FreePages,
    LoadPages,
    OpenSlot,
    OwnPages,
    PlanOp,
    RelocationVersion,
    SavePages,
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


_NONSENSE = -1
"""A token that no model knows: what a torn page holds, and what is computed from one."""


class FakeRank:
    """One rank's pages and page table. A step stays incomplete until `finish`: its copies are under way.

    With a mover, pages come from an arena and go there, each when its copy runs.
    """

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
        self.mover: FakeMover | None = None
        self.loads: dict[int, tuple[int, bytes]] = {}  # page -> its LOAD and key, until it is complete
        self.unsure: set[int] = set()  # pages that may differ from other ranks': loading, torn, made of such
        self.misled: set[int] = set()  # slots that read a torn page in this step
        self.last_tokens: dict[int, int] = {}  # slot -> the token sampled last
        self.drafts: dict[int, list[int]] = {}  # slot -> what its next step may verify

    def run(self, plan: BatchPlan) -> StepOutput:
        assert plan.step == self.last_step + 1, "log: a step is missing"
        self.last_step = plan.step
        self.apply_all(plan.ops)
        self.check_version(plan)
        self.misled.clear()
        self.wait_for_loads(plan)
        assert len(set(plan.slots)) == len(plan.slots), "log: a slot runs twice"
        rows = self.run_rows(plan)
        token_ids = [token_id for row in rows for token_id in row]
        self.incomplete[plan.step] = {page for slot in plan.slots for page in self.rows[slot]}
        logprobs: list[TokenLogprobs | None] = [None] * len(token_ids)
        num_tokens = [len(row) for row in rows] if plan.num_drafts else []
        return StepOutput(plan.step, self.version, token_ids, logprobs, num_tokens)

    def apply_all(self, ops: Sequence[PlanOp]) -> None:
        for op in ops:
            self.apply(op)

    def wait_for_loads(self, plan: BatchPlan) -> None:
        if self.mover is None:
            return
        for slot, start, length in zip(plan.slots, plan.starts, plan.lens, strict=True):
            read = self.rows[slot][: -(-(start + length) // self.page_size)]
            self.mover.wait_for(slot, read)
            if any(_NONSENSE in self.pages[page] for page in read if page in self.unsure):
                self.misled.add(slot)

    def run_rows(self, plan: BatchPlan) -> list[list[int]]:
        """Return the tokens of each sampled row."""
        sampled: list[list[int]] = []
        given = self.tokens_of(plan)
        offset = 0
        for row, (slot, start, length) in enumerate(zip(plan.slots, plan.starts, plan.lens, strict=True)):
            self.write(slot, start, given[offset : offset + length])
            offset += length
            if row in plan.sampled:
                end = start + length - plan.drafts(row)
                sampled.append(self.verify(slot, end, plan.drafts(row)))
                self.last_tokens[slot] = sampled[-1][-1]
                self.propose(slot, end + len(sampled[-1]) - 1, plan.draft_len)
        assert offset == len(given), "log: tokens without a row"
        return sampled

    def tokens_of(self, plan: BatchPlan) -> list[int]:
        """The tokens that the rows run, those included that only the ranks know when the step is planned."""
        assert set(plan.lens[: plan.num_awaited]) <= {1}, "log: a row awaits more than one token"
        found = [self.last_tokens[slot] for slot in plan.slots[: plan.num_awaited]]
        given = iter(plan.token_ids)
        for row in range(plan.num_awaited, len(plan.slots)):
            num_drafts = plan.drafts(row)
            found += islice(given, plan.lens[row] - num_drafts)
            found += self.drafts[plan.slots[row]][:num_drafts] if num_drafts else []
        return found + list(given)

    def verify(self, slot: int, context_len: int, num_drafts: int) -> list[int]:
        """What the model says behind so many tokens, and behind each draft that was right."""
        token_ids: list[int] = []
        for place in range(num_drafts + 1):
            token_ids.append(self.sample(slot, context_len + place))
            if place < num_drafts and token_ids[-1] != self.drafts[slot][place]:
                break
        return token_ids

    def propose(self, slot: int, num_computed: int, draft_len: int) -> None:
        """Draft behind the token sampled last, which takes the place behind those computed: right mostly."""
        assert num_computed + draft_len <= len(self.rows[slot]) * self.page_size, (
            f"reserve: slot {slot} drafts beyond its pages"
        )
        self.drafts[slot] = []
        text = [*self.read(slot, num_computed), self.last_tokens[slot]] if draft_len else []
        for place in range(draft_len):
            token_id = next_token(text, self.slots[slot].seed, self.vocab_size)
            is_wrong = next_token(text, place, 3) == 0
            text.append((token_id + is_wrong) % self.vocab_size)
            self.drafts[slot].append(text[-1])

    def attach(self, mover: FakeMover) -> None:
        self.mover = mover

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
                self.drafts.pop(op.slot, None)
            case OwnPages():
                self.own(op)
            case CompletePages():
                self.complete(op)
            case SetRow():
                self.set_row(op)
            case FreePages():
                self.free(op)
            case SavePages():
                self.save(op)
            case LoadPages():
                self.load(op)

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
            assert page not in self.keys, f"complete: page {page} twice"
            if page in self.loads:
                self.complete_load(page, key)
            else:
                assert None not in self.pages[page], f"complete: page {page} has holes"
            self.keys[page] = key

    def set_row(self, op: SetRow) -> None:
        row = self.rows[op.slot]
        assert op.first <= len(row), "row: a gap"
        for index, (page, generation) in enumerate(zip(op.pages, op.generations, strict=True)):
            assert page in self.pages, f"row: page {page} is not owned"
            assert generation == self.generations[page], f"generation: page {page} is named by a stale one"
            if op.keys:
                key = self.loads[page][1] if page in self.loads else self.keys.get(page)
                assert key == op.keys[index], f"row: page {page} holds other tokens"
            else:
                assert page not in self.keys and page not in self.loads, (
                    f"row: page {page} is complete, yet to be written"
                )
            row[op.first + index : op.first + index + 1] = [page]

    def free(self, op: FreePages) -> None:
        self.relocated()
        for page in op.pages:
            holders = [slot for slot, row in self.rows.items() if page in row]
            assert not holders, f"free: page {page} is in the row of slot {holders}"
            steps = [step for step, pages in self.incomplete.items() if page in pages]
            assert not steps, f"fence: page {page} is freed while step {steps} may touch it"
            move = self.mover.move_of(page) if self.mover is not None else None
            assert move is None, f"move: page {page} is freed while {move} may touch it"
            del self.pages[page]
            self.keys.pop(page, None)
            self.loads.pop(page, None)
            self.unsure.discard(page)

    def save(self, op: SavePages) -> None:
        for page, key in zip(op.pages, op.keys, strict=True):
            assert self.keys.get(page) == key, f"save: page {page} holds other tokens"
        self.start(op)

    def load(self, op: LoadPages) -> None:
        for number, (page, key) in enumerate(zip(op.pages, op.keys, strict=True), op.first_move):
            assert page not in self.keys and page not in self.loads, f"load: page {page} is another's"
            holders = [slot for slot, row in self.rows.items() if page in row]
            assert not holders, f"load: page {page} is slot {holders}'s to write"
            self.check_untouched(page)
            self.loads[page] = (number, key)
            self.unsure.add(page)
        self.start(op)

    def start(self, op: SavePages | LoadPages) -> None:
        assert self.mover is not None, "move: there is no tier"
        self.mover.start(op)

    def complete_load(self, page: int, key: bytes) -> None:
        assert self.mover is not None
        number, loaded_key = self.loads.pop(page)
        status = self.mover.status(number)
        assert status in (MoveStatus.ENQUEUED, MoveStatus.DONE, MoveStatus.FAILED_TORN), (
            f"complete: page {page}, whose LOAD is {status.name}"
        )
        assert key == loaded_key, f"complete: page {page} is loaded with other tokens"

    def check_untouched(self, page: int) -> None:
        assert set(self.pages[page]) == {None}, f"load: page {page} was written before"

    def contents_of(self, tokens: tuple[int, ...]) -> Contents:
        """What a page of these tokens looks like, on another node too."""
        return tokens, b""

    def copy_out(self, page: int) -> Contents:
        return tuple(self.pages[page]), b""

    def copy_in(self, page: int, contents: Contents) -> None:
        self.check_untouched(page)
        self.pages[page] = list(contents[0])
        self.unsure.discard(page)

    def copy_in_torn(self, page: int, contents: Contents) -> None:
        self.copy_in(page, ((_NONSENSE,) * self.page_size, contents[1]))
        self.unsure.add(page)

    def relocated(self) -> None:
        self.version = RelocationVersion(self.version.incarnation, self.version.counter + 1)

    def write(self, slot: int, start: int, token_ids: Sequence[int]) -> None:
        row = self.rows[slot]
        room = len(row) * self.page_size
        assert start + len(token_ids) <= room, f"reserve: slot {slot} writes beyond its pages"
        for position, token_id in enumerate(token_ids, start):
            page = row[position // self.page_size]
            assert page not in self.keys, f"write: page {page} is complete and may be shared"
            assert page not in self.loads, f"write: page {page} is being loaded"
            if slot in self.misled:
                self.unsure.add(page)
                token_id = _NONSENSE
            self.pages[page][position % self.page_size] = token_id

    def sample(self, slot: int, context_len: int) -> int:
        op = self.slots[slot]
        token_ids = self.read(slot, context_len)
        known = min(context_len, len(op.token_ids))
        assert token_ids[:known] == op.token_ids[:known] or slot in self.misled, (
            f"read: slot {slot} reads another's text"
        )
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
                if page not in self.keys and page not in self.loads:
                    assert page not in writers, (
                        f"row: page {page} has two writers, {slot} and {writers[page]}"
                    )
                    writers[page] = slot
