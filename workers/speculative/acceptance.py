"""Acceptance: which drafted tokens the target would have chosen itself. Rank 0's Engine calls it.

Drafts are deterministic, so the target needs no more than its own choice at each place: it is the draft's
token, and what follows it counts, or it is another, and the answer goes on with that. The Sampler draws by
(seed, position, token), so a request gets the very tokens that it would get without a draft, sampled ones
too. That is lossless rejection sampling for a draft that is certain of its token: accepted with the
probability that the target gives it, else drawn from all others.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from workers.engine.copies import CopyStream
from workers.engine.sampler import Sampler
from workers.protocol import TokenLogprobs

TokenArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class VerifiedRow:
    """A sampled row: its slot, the position of its next token, and the tokens drafted from there on."""

    slot: int
    position: int
    drafts: TokenArray


@dataclass
class Accepted:
    """What a row has got: the drafts that were right, then one token more; with logprobs where asked for."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]


@dataclass(frozen=True)
class Verified:
    """A step's rows as StepOutput tells them; on the host."""

    rows: list[Accepted]

    @property
    def num_tokens(self) -> list[int]:
        """StepOutput's."""
        return [len(row.token_ids) for row in self.rows]

    def read(self) -> tuple[list[int], list[TokenLogprobs | None]]:
        """Return tokens and logprobs of all rows, one after another."""
        token_ids = [token_id for row in self.rows for token_id in row.token_ids]
        return token_ids, [logprobs for row in self.rows for logprobs in row.logprobs]


def accept(
    sampler: Sampler, logits: Tensor, rows: Sequence[VerifiedRow], copies: CopyStream
) -> list[Accepted]:
    """Return the tokens of each row. `logits` [samples, vocab]: of each row one for its own last token and
    one for each of its drafts, in order. Waits for the device."""
    #   rows      |    row 0 (2 drafts)     | row 1 (none) | ...
    #   logits    | own | draft 0 | draft 1 |     own      |
    lens = np.array([1 + len(row.drafts) for row in rows])
    firsts = np.cumsum(lens) - lens
    accepted = [Accepted([], []) for _ in rows]
    # Penalties count the tokens before: such a row is sampled place by place, any other at once.
    has_history = [sampler.has_history(row.slot) for row in rows]
    at_once = [index for index, has in enumerate(has_history) if not has]
    chosen = _sample(
        sampler, logits, copies, [(rows[i], firsts[i] + j, j) for i in at_once for j in range(lens[i])]
    )
    for index in at_once:
        _extend(accepted[index], rows[index], [next(chosen) for _ in range(lens[index])])
    going = [index for index, has in enumerate(has_history) if has]
    for place in range(int(lens.max(initial=0))):
        chosen = _sample(
            sampler, logits, copies, [(rows[index], firsts[index] + place, place) for index in going]
        )
        going = [index for index in going if _extend(accepted[index], rows[index], [next(chosen)])]
    return accepted


def _sample(
    sampler: Sampler,
    logits: Tensor,
    copies: CopyStream,
    places: Sequence[tuple[VerifiedRow, int, int]],
) -> "zip[tuple[int, TokenLogprobs | None]]":
    """Choose a token at each place: (row, its logits, how many drafts come before it)."""
    if not places:
        return zip((), (), strict=True)
    which = np.array([index for _, index, _ in places], dtype=np.int64)
    taken = logits if len(which) == len(logits) else logits.index_select(0, copies.upload(which))
    slots, positions = [row.slot for row, _, _ in places], [row.position + n for row, _, n in places]
    sampled = sampler.sample(taken, slots, positions).to_host(copies)
    if (fence := copies.fence()) is not None:
        fence.synchronize()  # what follows depends on how many were right
    return zip(*sampled.read(), strict=True)


def _extend(accepted: Accepted, row: VerifiedRow, chosen: Sequence[tuple[int, TokenLogprobs | None]]) -> bool:
    """Take tokens on until one is not the draft's; tell whether the row goes on."""
    for token_id, logprobs in chosen:
        place = len(accepted.token_ids)
        accepted.token_ids.append(token_id)
        accepted.logprobs.append(logprobs)
        if place == len(row.drafts) or token_id != row.drafts[place]:
            return False
    return True
