"""DraftState: what a rank's draft keeps of each slot from step to step, on the device. Engine's thread."""

import torch

from workers.kvcache.kv_pool import KVPool


class DraftState:
    """One row a slot, and one more for pads, which is written and means nothing."""

    def __init__(self, pool: KVPool, max_slots: int, max_drafts: int, vocab_size: int) -> None:
        device = pool.data.device
        num_drafts = (max_slots + 1) * max_drafts
        self.token_ids = torch.arange(vocab_size + num_drafts, device=device)
        """Each token's own id, then `drafts`: where a step's tokens are looked up; see DraftIds"""
        self.drafts = self.token_ids[vocab_size:].view(max_slots + 1, max_drafts).zero_()
        """[max_slots + 1, max_drafts]: the tokens that the slot's next step verifies"""
        self.carried = pool.tails.new_zeros(max_slots + 1, pool.tails.shape[1])
        """[max_slots + 1, feature_size]: the feature of the token before the slot's next one"""

    @property
    def max_drafts(self) -> int:
        """The most tokens that are drafted for a slot at a time."""
        return self.drafts.shape[1]
