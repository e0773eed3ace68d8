"""Acceptance: which drafted tokens the target would have chosen itself. Rank 0's Engine calls it.

Drafts are deterministic, so the target needs no more than its own choice at each place: it is the draft's
token, and what follows it counts, or it is another, and the answer goes on with that. The Sampler draws by
(seed, position, token), so a request gets the very tokens that it would get without a draft, sampled ones
too. That is lossless rejection sampling for a draft that is certain of its token: accepted with the
probability that the target gives it, else drawn from all others.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from workers.engine.copies import CopyStream
from workers.engine.sampled import Sampled
from workers.engine.sampler import Sampler
from workers.protocol import TokenLogprobs

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
class Choices:
    """What the target chooses at each place of B rows, the last of which is behind all drafts.

    Behind a row's first wrong draft, and behind its last place, there may be anything.
    """

    token_ids: Tensor
    """[B, places] int64"""
    parts: list[tuple[IntArray, Sampled]]
    """What was sampled at which places, row * places + place"""

    def to_host(self, copies: CopyStream) -> "Choices":
        """Return the same on the host; to be read once a fence behind this call was passed."""
        parts = [(places, sampled.to_host(copies)) for places, sampled in self.parts]
        return Choices(copies.to_host(self.token_ids), parts)


@dataclass(frozen=True)
class Verified:
    """What a step's rows got, as StepOutput tells it: drafts that were right, and one token more.

    Both fields are on their way to the host, to be read once a fence behind them was passed.
    """

    num_right: Tensor
    """[B] int64"""
    choices: Choices

    @property
    def num_tokens(self) -> list[int]:
        """StepOutput's."""
        return [num + 1 for num in self.num_right.tolist()]  # on the host: waits for nothing

    def read(self) -> tuple[list[int], list[TokenLogprobs | None]]:
        """Return tokens and logprobs of all rows, one after another."""
        num_places = self.choices.token_ids.shape[1]
        rows = self.choices.token_ids.tolist()  # on the host: waits for nothing
        if all(sampled.logprobs is None for _, sampled in self.choices.parts):
            tokens = [token for row, num in zip(rows, self.num_tokens, strict=True) for token in row[:num]]
            return tokens, [None] * len(tokens)
        told: dict[int, TokenLogprobs | None] = {}
        for places, sampled in self.choices.parts:
            told.update(zip(places.tolist(), sampled.read()[1], strict=True))
        kept = [(row, place) for row, num in enumerate(self.num_tokens) for place in range(num)]
        return [rows[row][place] for row, place in kept], [
            told[row * num_places + place] for row, place in kept
        ]


def choose(
    sampler: Sampler, logits: Tensor, rows: VerifiedRows, all_drafts: Tensor, copies: CopyStream
) -> Choices:
    """Choose tokens at all places of `rows`; `all_drafts` [slots, max_drafts] int64 are on the device.

    `logits` [samples, vocab]: of each row one for its own last token and one for each of its drafts, in
    order. Waits for the device only where penalties make a token depend on those before it.
    """
    #   rows      |    row 0 (2 drafts)     | row 1 (none) | ...
    #   logits    | own | draft 0 | draft 1 |     own      |
    num_rows, num_places = len(rows.slots), all_drafts.shape[1] + 1
    lens = 1 + rows.num_drafts
    firsts = np.cumsum(lens) - lens
    row = np.repeat(np.arange(num_rows), lens)  # [samples]
    place = np.arange(len(row)) - firsts[row]
    has_history = sampler.has_history(rows.slots)
    if len(row) == num_rows * num_places and not has_history.any():  # as they come
        sampled = sampler.sample(logits, rows.slots[row], rows.positions[row] + place)
        return Choices(sampled.token_ids.view(num_rows, num_places), [(np.arange(len(row)), sampled)])
    token_ids = torch.zeros(num_rows * num_places, dtype=torch.int64, device=all_drafts.device)
    choices = Choices(token_ids.view(num_rows, num_places), [])

    def sample(which: IntArray) -> Tensor | None:
        """Choose at some of the samples."""
        if not which.size:
            return None
        taken = logits if len(which) == len(logits) else logits.index_select(0, copies.upload(which))
        positions = rows.positions[row[which]] + place[which]
        sampled = sampler.sample(taken, rows.slots[row[which]], positions)
        places = row[which] * num_places + place[which]
        token_ids.index_copy_(0, copies.upload(places), sampled.token_ids)
        choices.parts.append((places, sampled))
        return sampled.token_ids

    sample(np.flatnonzero(~has_history[row]))
    going = np.flatnonzero(has_history)
    # Penalties count what was right: a wait.
    guessed = all_drafts.cpu().numpy()[rows.slots] if going.size else None
    for number in range(num_places):
        going = going[rows.num_drafts[going] >= number]
        found = sample(firsts[going] + number)
        if found is None or guessed is None or number == num_places - 1:
            break
        going = going[found.cpu().numpy() == guessed[going, number]]
    return choices


def count_right(token_ids: Tensor, drafts: Tensor, num_drafts: Tensor) -> Tensor:
    """Return how many of each row's first drafts are what the target chose, [B] int64, on the device.

    `token_ids` [B, max_drafts + 1] are Choices', `drafts` [B, max_drafts], of which `num_drafts` [B] count.
    """
    max_drafts = drafts.shape[1]
    is_right = token_ids[:, :max_drafts] == drafts
    is_right &= torch.arange(max_drafts, device=drafts.device) < num_drafts[:, None]
    return is_right.long().cumprod(dim=1).sum(dim=1)
