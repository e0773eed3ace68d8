"""ChainPasses: a draft that guesses one token after another. The part of a DraftLoop that makes it a chain.

place     p         p+1      ...   p+k-1
token     chosen    draft 1  ...   draft k-1
"""

import torch

from workers.engine.vocabulary_shard import VocabularyShard
from workers.speculative.acceptance import count_right
from workers.speculative.loop_inputs import LoopInputs, LoopParts


class ChainPasses:
    """See DraftPasses. Each pass is over one token of every row."""

    path: torch.Tensor | None = None

    def __init__(self, inputs: LoopInputs, parts: LoopParts) -> None:
        device, max_drafts, size = inputs.pages.device, parts.state.max_drafts, inputs.size
        self._inputs = inputs
        self._parts = parts
        # begin writes, draft reads:
        self._positions = torch.zeros(max_drafts, size, dtype=torch.int64, device=device)
        self._locations = torch.zeros(max_drafts, size, dtype=torch.int64, device=device)
        self._context_lens = torch.ones(max_drafts, size, dtype=torch.int32, device=device)
        self._ahead = torch.arange(max_drafts, device=device)[:, None]
        self._attentions = [
            parts.pass_attention(
                inputs.batch(self._positions[number], self._locations[number], self._context_lens[number])
            )
            for number in range(max_drafts)
        ]

    def reach(self, num_drafts: int) -> int:
        """See DraftPasses."""
        return num_drafts

    def accept(self) -> tuple[torch.Tensor, torch.Tensor]:
        """See DraftPasses."""
        inputs, state = self._inputs, self._parts.state
        drafts = state.drafts.index_select(0, inputs.slots)
        num_right = count_right(inputs.chosen, drafts, inputs.num_drafts)
        return num_right, num_right

    def begin(self, places: torch.Tensor) -> None:
        """See DraftPasses."""
        # Pads stay on the dummy page: a place further on would be another row's.
        positions = torch.add(places, self._ahead * self._inputs.is_real, out=self._positions)
        self._locations.copy_(self._inputs.locations(positions))
        torch.add(positions, 1, out=self._context_lens)

    def draft(self, token_ids: torch.Tensor, feature: torch.Tensor, draft_len: int) -> None:
        """See DraftPasses."""
        model, drafted = self._parts.draft, []
        for number in range(draft_len):
            attention = self._attentions[number]
            attention.begin()
            hidden = model.forward(token_ids, feature, self._positions[number], attention)
            token_ids = self._next_tokens(hidden)
            drafted.append(token_ids)
            feature = model.next_feature(hidden)
        drafts = self._parts.state.drafts[:, :draft_len]
        drafts.index_copy_(0, self._inputs.slots, torch.stack(drafted, dim=1))

    def written(self, draft_len: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See DraftPasses."""
        return self._locations[:draft_len].T, self._context_lens[draft_len - 1]

    def _next_tokens(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the likeliest token behind each row, [rows] int64, equal on every rank."""
        model, parts = self._parts.draft, self._parts
        logits, shard = model.logits(hidden), VocabularyShard(model.draft_vocab_size, parts.group)
        if shard.is_whole:
            return model.target_ids(parts.greedy_tokens(logits))
        return model.target_ids(shard.best(parts.greedy_keys(logits, shard.first)))
