"""The token ids of a plan's rows as they are staged: known ones, and codes of those that were drafted."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from workers.plan import BatchPlan

SlotArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class DraftIds:
    """What stands for tokens of drafts until the pass looks them up: ids behind the vocabulary's,
    `vocab_size` + slot * `max_drafts` + number."""

    vocab_size: int
    max_drafts: int

    def firsts(self, slots: SlotArray) -> npt.NDArray[np.int64]:
        """Return the id of each slot's draft number 0, [slots, 1]."""
        found: npt.NDArray[np.int64] = (self.vocab_size + self.max_drafts * slots)[:, None]
        return found


def known_tokens(plan: BatchPlan, draft_ids: DraftIds | None = None) -> npt.NDArray[np.int64]:
    """Return the tokens of a plan's rows; in place of those that are awaited one that is legal, of those that
    are drafted where they are found."""
    tokens = np.zeros(plan.num_tokens, dtype=np.int64)
    if not plan.num_drafts:
        tokens[plan.num_awaited :] = plan.token_ids
        return tokens
    lens, num_drafts = np.array(plan.lens, dtype=np.int64), np.array(plan.num_drafts, dtype=np.int64)
    numbers = count_up(lens) - np.repeat(lens - num_drafts, lens)  # of drafts, of known tokens less than 0
    is_known = numbers < 0
    is_known[: plan.num_awaited] = False
    tokens[is_known] = plan.token_ids
    if draft_ids is not None:
        codes = np.repeat(draft_ids.firsts(np.array(plan.slots, dtype=np.int64)), lens) + numbers
        tokens[numbers >= 0] = codes[numbers >= 0]
    return tokens


def are_chains(plan: BatchPlan) -> bool:
    """Tell whether all rows have one known token and as many drafts, and are sampled."""
    if not plan.num_drafts or plan.num_awaited or len(plan.sampled) < len(plan.slots):
        return False
    num_rows, num_drafts, length = len(plan.slots), plan.num_drafts[0], plan.lens[0]
    is_even = plan.num_drafts.count(num_drafts) == plan.lens.count(length) == num_rows
    return is_even and length == 1 + num_drafts


def count_up(lens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return 0 .. len - 1 for each of the lengths, one after another."""
    counts: npt.NDArray[np.int64] = np.arange(lens.sum()) - np.repeat(np.cumsum(lens) - lens, lens)
    return counts
