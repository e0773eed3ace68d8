"""Acceptance: which drafted tokens the target would have chosen itself. Every rank's Engine calls it.

Drafts are deterministic, so the target needs no more than its own choice at each place: it is the draft's
token, and what follows it counts, or it is another, and the answer goes on with that. The Sampler draws by
(seed, position, token), so a request gets the very tokens that it would get without a draft, sampled ones
too. That is lossless rejection sampling for a draft that is certain of its token: accepted with the
probability that the target gives it, else drawn from all others. A tree is several such drafts at once, of
which at most one goes on as the target chooses.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from workers.engine.copies import CopyStream, Fence
from workers.engine.sampled import Sampled
from workers.engine.sampler import Sampler
from workers.protocol import TokenLogprobs
from workers.speculative.tree import DEPTH, PARENT

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class VerifiedRows:
    """A step's B sampled rows, in the plan's order."""

    slots: IntArray
    """[B]"""
    positions: IntArray
    """[B]: of each row's next token, which is the first draft's place as well"""
    num_drafts: IntArray
    """[B]: drafts that the row brings"""


@dataclass(frozen=True)
class HostTrees:
    """Trees of all slots on their way to the host, to be read once `fence` was passed."""

    drafts: Tensor
    """[slots, max_drafts] int64"""
    fields: Tensor
    """[slots, NUM_FIELDS, max_drafts] int64; see tree.py"""
    fence: Fence | None

    def wait(self) -> tuple[IntArray, IntArray]:
        """Wait, and return both."""
        if self.fence is not None:
            self.fence.synchronize()
        return self.drafts.numpy(), self.fields.numpy()


@dataclass(frozen=True)
class Choices:
    """What the target chooses behind each number of B rows' tokens: 0 is a row's own, n its n-th draft.

    Behind a row's first wrong draft, and behind its last number, there may be anything.
    """

    token_ids: Tensor
    """[B, places] int64, for all numbers that any row has at least"""
    parts: list[tuple[IntArray, Sampled]]
    """What was sampled behind which numbers, row * places + number"""

    def to_host(self, copies: CopyStream) -> "Choices":
        """Return the same on the host; to be read once a fence behind this call was passed."""
        parts = [(places, sampled.to_host(copies)) for places, sampled in self.parts]
        return Choices(copies.to_host(self.token_ids), parts)


@dataclass(frozen=True)
class Verified:
    """What a step's rows got, as StepOutput tells it: drafts that were right, and one token more.

    All fields are on their way to the host, to be read once a fence behind them was passed.
    """

    num_right: Tensor
    """[B] int64"""
    choices: Choices
    path: Tensor | None = None
    """[B, max_drafts] int64: of a tree, the numbers of the right ones, in order"""

    @property
    def num_tokens(self) -> list[int]:
        """StepOutput's."""
        return [num + 1 for num in self.num_right.tolist()]  # on the host: waits for nothing

    def read(self) -> tuple[list[int], list[TokenLogprobs | None]]:
        """Return tokens and logprobs of all rows, one after another."""
        num_places = self.choices.token_ids.shape[1]
        rows = self.choices.token_ids.tolist()  # on the host: waits for nothing
        if self.path is not None:
            paths = [[0, *path] for path in self.path.tolist()]
        else:
            paths = [list(range(num_places))] * len(rows)
        kept = [(row, number) for row, num in enumerate(self.num_tokens) for number in paths[row][:num]]
        tokens = [rows[row][number] for row, number in kept]
        if all(sampled.logprobs is None for _, sampled in self.choices.parts):
            return tokens, [None] * len(tokens)
        told: dict[int, TokenLogprobs | None] = {}
        for places, sampled in self.choices.parts:
            told.update(zip(places.tolist(), sampled.read()[1], strict=True))
        return tokens, [told[row * num_places + number] for row, number in kept]


def choose(
    sampler: Sampler,
    logits: Tensor,
    rows: VerifiedRows,
    all_drafts: Tensor,
    copies: CopyStream,
    trees: HostTrees | None = None,
) -> Choices:
    """Choose tokens behind all numbers of `rows`; `all_drafts` [slots, max_drafts] int64 are on the device.

    `logits` [samples, this rank's tokens]: of each row one for its own last token and one for each of its
    drafts, in order. `trees`: what the drafts are, unless they are chains; may be None where every row is
    plain. Waits for the device only where penalties make a token depend on those before it, and for `trees`.
    """
    #   rows      |    row 0 (2 drafts)     | row 1 (none) | ...
    #   logits    | own | draft 1 | draft 2 |     own      |
    num_rows, num_places = len(rows.slots), all_drafts.shape[1] + 1
    lens = 1 + rows.num_drafts
    firsts = np.cumsum(lens) - lens
    row = np.repeat(np.arange(num_rows), lens)  # [samples]
    number = np.arange(len(row)) - firsts[row]
    ahead = number
    if trees is not None:
        guessed, fields = trees.wait()
        depths = np.zeros((len(guessed), num_places), dtype=np.int64)
        depths[:, 1:] = fields[:, DEPTH]
        ahead = depths[rows.slots[row], number]
    has_history = sampler.has_history(rows.slots)
    positions = rows.positions[row] + ahead
    width = int(lens.max())
    if len(row) == num_rows * width and not has_history.any():  # as they come
        sampled = sampler.sample(logits, rows.slots[row], positions)
        return Choices(sampled.token_ids.view(num_rows, width), [(np.arange(len(row)), sampled)])
    token_ids = torch.zeros(num_rows * num_places, dtype=torch.int64, device=all_drafts.device)
    choices = Choices(token_ids.view(num_rows, num_places), [])

    def sample(which: IntArray) -> Tensor:
        """Choose at some of the samples."""
        taken = logits if len(which) == len(logits) else logits.index_select(0, copies.upload(which))
        sampled = sampler.sample(taken, rows.slots[row[which]], positions[which])
        places = row[which] * num_places + number[which]
        token_ids.index_copy_(0, copies.upload(places), sampled.token_ids)
        choices.parts.append((places, sampled))
        return sampled.token_ids

    if (free := np.flatnonzero(~has_history[row])).size:
        sample(free)
    if not (going := np.flatnonzero(has_history)).size:
        return choices
    # Penalties count what was right: a wait.
    drafts = (guessed if trees is not None else all_drafts.cpu().numpy())[rows.slots]
    parents = (
        fields[rows.slots, PARENT]
        if trees is not None
        else np.broadcast_to(np.arange(num_places - 1), drafts.shape)
    )
    is_there = np.arange(1, num_places) <= rows.num_drafts[:, None]
    at = np.zeros(num_rows, dtype=np.int64)
    while going.size:
        found = sample(firsts[going] + at[going]).cpu().numpy()
        is_next = is_there[going] & (parents[going] == at[going, None]) & (drafts[going] == found[:, None])
        goes_on = is_next.any(axis=1)
        going = going[goes_on]
        at[going] = 1 + np.flatnonzero(is_next) % max(num_places - 1, 1)
    return choices


def count_right(token_ids: Tensor, drafts: Tensor, num_drafts: Tensor) -> Tensor:
    """Return how many of each row's first drafts are what the target chose, [B] int64, on the device.

    `token_ids` [B, max_drafts + 1] are Choices', `drafts` [B, max_drafts], of which `num_drafts` [B] count.
    """
    max_drafts = drafts.shape[1]
    is_right = token_ids[:, :max_drafts] == drafts
    is_right &= torch.arange(max_drafts, device=drafts.device) < num_drafts[:, None]
    return is_right.cumprod(dim=1).sum(dim=1)
