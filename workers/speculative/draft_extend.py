"""DraftExtend: brings the draft up to what the target computes, in the target's own pass. Engine's thread.

    place               s        s+1      s+2     ...      of one row of any step
    token               known    known or drafted
    the entry's feature carried  of s     of s+1  ...      the target's, of the token before; of a tree's
                                                           node its parent's

The draft's entries have the places of the target's: one batch, one plan, one captured graph. What becomes of
a drafted token that is wrong, in both of them and in a page's tail, is written over by the next step. A row
without drafts needs no more than this pass: what it carries on is its last token's feature.
"""

import torch

from workers.attention.backend import AttentionBackend
from workers.engine.forward_batch import ForwardBatch
from workers.engine.graph_guard import Decision, GraphGuard
from workers.engine.part_times import PartTimes
from workers.kvcache.kv_pool import DUMMY_PAGE, KVPool
from workers.models.draft import DraftModel
from workers.speculative.draft_state import DraftState


class DraftExtend:
    """Runs the draft behind the target, over the same batch.

    `attention` is the target's, planned and begun with it, or (`is_apart`) one that cannot be prepared, which
    then runs behind the target's prepared pass.
    """

    def __init__(
        self,
        draft: DraftModel,
        attention: AttentionBackend,
        pool: KVPool,
        state: DraftState,
        guard: GraphGuard,
        times: PartTimes,
        *,
        is_apart: bool,
    ) -> None:
        self.feature_layers = draft.feature_layers
        self.is_apart = is_apart
        self._draft = draft
        self._attention = attention
        self._pool = pool
        self._state = state
        self._guard = guard
        self._times = times
        pages = torch.arange(pool.num_pages + 1, device=pool.data.device)
        self._ended_pages = pages.new_zeros(len(pages) * pool.page_size)
        """The page of each page's last place; of all other places the dummy page."""
        self._ended_pages[pool.page_size - 1 :: pool.page_size] = pages

    def features(self, taps: list[torch.Tensor]) -> torch.Tensor:
        """Return the features [tokens, feature_size] of a pass' taps."""
        return self._draft.feature(taps)

    def look_up(self, batch: ForwardBatch) -> None:
        """Put the tokens that were drafted for its rows into a batch."""
        if batch.bucket is None or batch.bucket.mode != "decode":
            batch.token_ids.copy_(self._state.token_ids.index_select(0, batch.token_ids))

    def behind(
        self, batch: ForwardBatch, features: torch.Tensor | None, decision: Decision, after_load: bool
    ) -> torch.Tensor:
        """Run behind the target's pass where it was no part of that; count how it ran; return features."""
        assert features is not None, "a pass with a draft keeps its features"
        self._times.ended("target")
        if self.is_apart:
            self.run(batch, features)
            if batch.host_query_starts[batch.num_real_rows] < batch.num_tokens:  # the pads' tokens
                self._pool.zero_dummy_page()
            self._times.ended("draft_extend")
        self._guard.count("draft_extend", "unsupported" if self.is_apart else decision.reason, after_load)
        return features

    def run(self, batch: ForwardBatch, features: torch.Tensor) -> None:
        """Compute the batch's entries from its tokens' features; keep those of pages' last tokens."""
        if self.is_apart:
            self._attention.plan(batch)
            self._attention.begin()
        num_tokens = features.shape[0]
        # Rows without tokens, of buckets, begin behind the last token: there is a place for what they carry.
        starts, carried = batch.query_starts.long(), self._state.carried
        before = torch.empty(num_tokens + 1, features.shape[1], dtype=features.dtype, device=features.device)
        if batch.tree is None:
            before[1:] = features
        else:
            torch.index_select(features, 0, batch.tree.parents, out=before[:num_tokens])
        before.index_copy_(0, starts[:-1], carried.index_select(0, batch.slots))
        self._draft.extend(batch.token_ids, before[:num_tokens], batch.positions, self._attention)
        # By place: a tree's node may be another position's, but then another comes to that place.
        pages = self._ended_pages.index_select(0, batch.out_locations)
        self._pool.tails.index_copy_(0, pages, features)
        self._pool.tails[DUMMY_PAGE].zero_()
        # Rows go on from their last token; where that was drafted, accepting finds the one that was right.
        carried.index_copy_(0, batch.slots, features.index_select(0, starts[1:] - 1))
