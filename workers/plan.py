"""What rank 0's Scheduler decided for one step, and what came of it.

BatchPlan is the unit of the TP group's ordered log (I1): rank 0 makes it, every rank applies its `ops` in
order, checks the relocation version (I8) and runs its rows. StepOutput goes back to the Scheduler.
No torch: plans are built and encoded on the scheduler side.
"""

from itertools import accumulate
from typing import Literal

import msgspec

from workers.protocol import SamplingParams, TokenLogprobs

Mode = Literal["extend", "decode", "verify", "mixed"]
"""`decode`: one input token in every row. `verify`: as decode, with drafts behind it. `extend`: prefill
chunks only. `mixed`: chunks beside rows that decode or verify."""


class RelocationVersion(msgspec.Struct, frozen=True, array_like=True, order=True):
    """Number of the last change of a replica's device pool: an address began or ceased to be valid (I8)."""

    incarnation: int
    counter: int


class RelocationVersionError(RuntimeError):
    """Ranks disagree on which pages are where (I8): a bug, and fatal to the step."""

    def __init__(self, step: int, found: RelocationVersion, planned: RelocationVersion) -> None:
        super().__init__(
            f"step {step}: found relocation version {found.incarnation}.{found.counter}, allowed is "
            f"{planned.incarnation}.{planned.counter}, the plan's: the ranks' logs differ, rebuild the group"
        )
        self.step = step
        self.found = found
        self.planned = planned


class OpenSlot(msgspec.Struct, frozen=True, array_like=True, tag="open"):
    """A request takes a slot. `token_ids` is all it has so far (prompt, then tokens generated before a
    preemption), of which `prompt_len` are the prompt: the sampler's penalties and positions need them."""

    slot: int
    sampling: SamplingParams
    seed: int
    prompt_len: int
    token_ids: list[int]
    end_token_ids: list[int] = []
    """The model's own end tokens, banned while min_tokens is not reached; empty under ignore_eos."""


class CloseSlot(msgspec.Struct, frozen=True, array_like=True, tag="close"):
    """The slot's request finished, was aborted or preempted: its row of the PageTable becomes dummy pages."""

    slot: int


class OwnPages(msgspec.Struct, frozen=True, array_like=True, tag="own"):
    """Pages left the free list under these generations: their addresses begin to be valid (a relocation)."""

    pages: list[int]
    generations: list[int]


class CompletePages(msgspec.Struct, frozen=True, array_like=True, tag="complete"):
    """Pages whose whole bundle is written: each holds exactly the tokens its key covers."""

    pages: list[int]
    keys: list[bytes]


class SetRow(msgspec.Struct, frozen=True, array_like=True, tag="row"):
    """PageTable[slot, first : first + len(pages)] = pages.

    `keys` is empty for pages the request will write itself, else one key a page (a shared prefix).
    """

    slot: int
    first: int
    pages: list[int]
    generations: list[int]
    keys: list[bytes]


class FreePages(msgspec.Struct, frozen=True, array_like=True, tag="free"):
    """Pages went back to the free list: their addresses cease to be valid (a relocation)."""

    pages: list[int]


class SavePages(msgspec.Struct, frozen=True, array_like=True, tag="save"):
    """Copy each page's bundle into this rank's part of its granted slot: moves first_move, first_move + 1...

    Logged with a plan after the step that wrote the pages was committed. A page stays leased until every rank
    is done with its move (I6). No relocation by itself.
    """

    first_move: int
    pages: list[int]
    slots: list[int]
    epochs: list[int]
    keys: list[bytes]


class LoadPages(msgspec.Struct, frozen=True, array_like=True, tag="load"):
    """Fill each page from this rank's part of its slot: moves first_move, first_move + 1...

    The pages are owned by an OwnPages earlier in the log, and nobody else's; each becomes readable once its
    move is done on every rank. No relocation by itself.
    """

    first_move: int
    pages: list[int]
    slots: list[int]
    epochs: list[int]
    keys: list[bytes]


PlanOp = OpenSlot | CloseSlot | OwnPages | CompletePages | SetRow | FreePages | SavePages | LoadPages


class BatchPlan(msgspec.Struct, frozen=True, array_like=True):
    """One step of one TP group.

    Row i runs lens[i] tokens of slot slots[i] at positions starts[i] .. starts[i] + lens[i] - 1. Each of the
    first `num_awaited` rows runs one, the one that was sampled last for its slot: it was not known yet when
    this step was planned. `token_ids` are those of all other rows, in order. `sampled` lists the rows whose
    last token's logits are sampled. `ops` come before the rows run. `relocation_version` is the replica's
    version once `ops` are applied. A plan without rows is legal: it carries ops, or is the heartbeat of an
    idle group.

    With a draft the last num_drafts[i] tokens of row i (none where the list is empty) are those that were
    drafted for its slot when it was sampled last: each rank has them, `token_ids` does not. Where such a row
    is sampled, so is each of its drafts. `draft_len`: how many tokens are then drafted ahead for each sampled
    row. Drafts may be the nodes of a tree: then they take the row's last places, but not these positions.
    """

    step: int
    relocation_version: RelocationVersion
    ops: list[PlanOp]
    slots: list[int]
    starts: list[int]
    lens: list[int]
    token_ids: list[int]
    sampled: list[int]
    num_awaited: int = 0
    num_drafts: list[int] = []
    draft_len: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens that its rows run, awaited and drafted ones included."""
        return self.num_awaited + len(self.token_ids) + sum(self.num_drafts)

    @property
    def num_samples(self) -> int:
        """Tokens whose logits are sampled."""
        return len(self.sampled) + (
            sum(self.num_drafts[row] for row in self.sampled) if self.num_drafts else 0
        )

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens of its prefill chunks."""
        return sum(length for length in self._known_lens() if length > 1)

    @property
    def mode(self) -> Mode:
        """How the rows run."""
        lens = self._known_lens()
        if max(lens, default=1) == 1:
            return "verify" if any(self.num_drafts) else "decode"
        return "mixed" if 1 in lens else "extend"

    @property
    def speculates(self) -> bool:
        """Tell whether it verifies drafted tokens or drafts some: how far its rows come, and which tokens the
        next step verifies, is not known before it has run."""
        return bool(self.sampled) and bool(self.num_drafts or self.draft_len)

    def drafts(self, row: int) -> int:
        """Return how many of a row's tokens are drafts."""
        return self.num_drafts[row] if self.num_drafts else 0

    def _known_lens(self) -> list[int]:
        """Return the rows' lengths without drafts: 1 where a row decodes."""
        if not self.num_drafts:
            return self.lens
        return [length - num_drafts for length, num_drafts in zip(self.lens, self.num_drafts, strict=True)]


class StepOutput(msgspec.Struct, frozen=True, array_like=True):
    """What came of a plan on one rank.

    `token_ids` and `logprobs` follow the order of the plan's `sampled`; both are empty on ranks other than 0,
    which learn the tokens from a later plan, or on the device. `logprobs[i]` is None where the request did
    not ask. `num_tokens`: how many tokens each sampled row has got; empty: one each.
    """

    step: int
    relocation_version: RelocationVersion
    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]
    num_tokens: list[int] = []

    def tokens_by_row(self) -> list[tuple[list[int], list[TokenLogprobs | None]]]:
        """Return the tokens of each sampled row, with their logprobs."""
        if not self.num_tokens:
            return [
                ([token], [logprobs]) for token, logprobs in zip(self.token_ids, self.logprobs, strict=True)
            ]
        ends = list(accumulate(self.num_tokens))
        assert ends[-1] == len(self.token_ids) == len(self.logprobs), "the engine miscounts its tokens"
        spans = [slice(end - count, end) for end, count in zip(ends, self.num_tokens, strict=True)]
        return [(self.token_ids[span], self.logprobs[span]) for span in spans]
