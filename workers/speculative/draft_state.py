"""DraftState: what a rank's draft keeps of each slot from step to step, on the device. Engine's thread."""

import torch

from workers.kvcache.kv_pool import KVPool
from workers.speculative.tree import NUM_FIELDS, visible


class DraftState:
    """One row a slot, and one more for pads, which is written and means nothing."""

    def __init__(self, pool: KVPool, max_slots: int, max_drafts: int, vocab_size: int, topk: int = 1) -> None:
        device = pool.data.device
        num_drafts = (max_slots + 1) * max_drafts
        self.topk = topk
        """Of a tree, of which `max_drafts` are the most nodes; 1: a chain."""
        self.token_ids = torch.arange(vocab_size + num_drafts, device=device)
        """Each token's own id, then `drafts`: where a step's tokens are looked up; see DraftIds"""
        self.drafts = self.token_ids[vocab_size:].view(max_slots + 1, max_drafts).zero_()
        """[max_slots + 1, max_drafts]: the tokens that the slot's next step verifies"""
        num_fields = NUM_FIELDS if topk > 1 else 0
        self.fields = torch.zeros(max_slots + 1, num_fields, max_drafts, dtype=torch.int64, device=device)
        """[max_slots + 1, NUM_FIELDS, max_drafts]: of a tree's nodes; see tree.py. A chain has none"""
        self.carried = pool.tails.new_zeros(max_slots + 1, pool.tails.shape[1])
        """[max_slots + 1, feature_size]: the feature of the token before the slot's next one"""

    @property
    def max_drafts(self) -> int:
        """The most tokens that are drafted for a slot at a time."""
        return self.drafts.shape[1]

    @property
    def max_depth(self) -> int:
        """The most tokens ahead of a slot's own that are drafted."""
        return self.max_drafts // self.topk

    def rehearse(self) -> None:
        """Put drafts in place that never were: tokens 0, one behind the other, right where token 0 is chosen.
        All other nodes of a tree are wrong."""
        self.drafts.zero_()
        if self.topk > 1:
            self.drafts[:, self.max_depth :] = -1
            numbers = torch.arange(self.max_drafts, device=self.drafts.device)
            parents = (numbers * (numbers < self.max_depth)).expand(len(self.drafts), -1)
            fields = [parents, numbers.clamp_max(self.max_depth - 1).expand_as(parents) + 1]
            self.fields.copy_(torch.stack([*fields, visible(parents, self.max_depth)], dim=1))
