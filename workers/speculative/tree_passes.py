"""TreePasses: a draft that follows its likeliest guesses at each depth. The part of a DraftLoop that makes
drafts a tree.

    place     p         p+1 ... p+w                p+w+1 ... p+2w             ...      w: topk
    token     chosen    followed of depth 1        followed of depth 2

The step that verifies gives the tree's nodes the places s + 1, s + 2, ... of its row, in the order of their
numbers. Those that were right are then moved to where their text has them: target's entries, draft's, tails.
"""

import torch

from workers.engine.forward_batch import TokenTree
from workers.engine.vocabulary_shard import VocabularyShard
from workers.kvcache.kv_pool import DUMMY_PAGE
from workers.speculative.loop_inputs import LoopInputs, LoopParts
from workers.speculative.tree import Guesses, follow, guess, keep, right_path


class TreePasses:
    """See DraftPasses. The first pass is over one token of every row, each other over `topk`."""

    def __init__(self, inputs: LoopInputs, parts: LoopParts) -> None:
        device, size = inputs.pages.device, inputs.size
        state = parts.state
        topk, num_followed = state.topk, state.max_depth - 1
        self._inputs = inputs
        self._parts = parts
        self.path: torch.Tensor | None = torch.zeros(size, state.max_drafts, dtype=torch.int64, device=device)
        """[rows, max_drafts] int64: the numbers of nodes that were right, in order; 0 behind the last"""
        # begin writes, draft reads; of passes behind the first [passes, rows, topk]:
        self._places = torch.zeros(size, dtype=torch.int64, device=device)
        self._root_locations = torch.zeros(size, dtype=torch.int64, device=device)
        self._root_lens = torch.ones(size, dtype=torch.int32, device=device)
        shape = (num_followed, size, topk)
        self._positions = torch.zeros(shape, dtype=torch.int64, device=device)
        self._locations = torch.zeros(shape, dtype=torch.int64, device=device)
        self._context_lens = torch.ones(num_followed, size, dtype=torch.int32, device=device)
        # draft writes and reads: what each followed node sees of its row's numbers, the chosen token's 0.
        self._visible = torch.full(shape, -1, dtype=torch.int64, device=device)
        self._numbers = torch.arange(1, 1 + num_followed * topk, device=device).view(num_followed, 1, topk)
        self._root_attention = parts.pass_attention(
            inputs.batch(self._places, self._root_locations, self._root_lens)
        )
        self._attentions = [
            parts.pass_attention(
                inputs.batch(
                    self._positions[number].view(-1),
                    self._locations[number].view(-1),
                    self._context_lens[number],
                    self._tree_of(number),
                )
            )
            for number in range(num_followed)
        ]

    def reach(self, num_drafts: int) -> int:
        """See DraftPasses."""
        topk = self._parts.state.topk
        return max(num_drafts - topk + 1, 0)

    def accept(self) -> tuple[torch.Tensor, torch.Tensor]:
        """See DraftPasses. Moves what was right."""
        inputs, state = self._inputs, self._parts.state
        assert self.path is not None
        drafts = state.drafts.index_select(0, inputs.slots)
        fields = state.fields.index_select(0, inputs.slots)
        num_right, path = right_path(inputs.chosen, drafts, fields, inputs.num_drafts)
        self.path.copy_(path)
        self._move(path[:, : state.max_depth], num_right)
        return num_right, path.gather(1, (num_right - 1).clamp_min(0)[:, None]).view(-1)

    def begin(self, places: torch.Tensor) -> None:
        """See DraftPasses."""
        inputs = self._inputs
        self._places.copy_(places)
        self._root_locations.copy_(inputs.locations(places))
        self._root_lens.copy_(places + 1)
        if not len(self._positions):
            return
        at = places[:, None] + self._numbers  # [passes, rows, topk]
        depths = self._numbers[:, :, :1] // self._parts.state.topk + 1
        self._positions.copy_(places[:, None] + depths)
        self._locations.copy_(inputs.locations(at.transpose(1, 2)).transpose(1, 2))
        self._context_lens.copy_(at[:, :, -1] + 1)

    def draft(self, token_ids: torch.Tensor, feature: torch.Tensor, draft_len: int) -> None:
        """See DraftPasses."""
        model, state, size = self._parts.draft, self._parts.state, self._inputs.size
        topk = state.topk
        self._root_attention.begin()
        hidden = model.forward(token_ids, feature, self._places, self._root_attention)
        # Every rank grows the same tree by itself.
        shard = VocabularyShard(model.draft_vocab_size, self._parts.group)
        depths: list[Guesses] = []
        followed: list[torch.Tensor] = []
        scores = torch.zeros(size, 1, device=hidden.device)
        seen = torch.ones(size, 1, dtype=torch.int64, device=hidden.device)
        for number in range(draft_len):
            found, log_likelihoods = shard.likeliest(model.logits(hidden), topk)
            guesses = guess(found.view(size, -1, topk), log_likelihoods.view(size, -1, topk), scores)
            depths.append(guesses)
            if number == draft_len - 1:
                break
            chosen = follow(guesses, topk)
            followed.append(chosen)
            tokens = model.target_ids(guesses.token_ids.gather(1, chosen))
            parents, scores = guesses.parents.gather(1, chosen), guesses.scores.gather(1, chosen)
            seen = seen.gather(1, parents) | torch.ones_like(parents) << self._numbers[number]
            self._visible[number].copy_(seen)
            features = model.next_feature(hidden).view(size, -1, feature.shape[1])
            feature = features.gather(1, parents[:, :, None].expand(-1, -1, features.shape[2]))
            feature = feature.reshape(-1, features.shape[2])
            attention = self._attentions[number]
            attention.begin()
            hidden = model.forward(tokens.reshape(-1), feature, self._positions[number].view(-1), attention)
        self._keep(depths, followed, topk * draft_len)

    def written(self, draft_len: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See DraftPasses."""
        followed = self._locations[: draft_len - 1].transpose(0, 1).flatten(1)
        context_lens = self._root_lens if draft_len == 1 else self._context_lens[draft_len - 2]
        return torch.cat([self._root_locations[:, None], followed], dim=1), context_lens

    def _keep(self, depths: list[Guesses], followed: list[torch.Tensor], num_nodes: int) -> None:
        """Leave the tree where its slots' next step finds it."""
        state, slots = self._parts.state, self._inputs.slots
        token_ids, fields = keep(depths, followed, num_nodes)
        state.drafts[:, :num_nodes].index_copy_(0, slots, self._parts.draft.target_ids(token_ids))
        state.fields[:, :, :num_nodes].index_copy_(0, slots, fields)

    def _move(self, path: torch.Tensor, num_right: torch.Tensor) -> None:
        """Move the entries of right nodes, of `path` [rows, depth], to their texts' places."""
        #   places   s    s+1      s+2     ...     inputs.places: s + 1
        #   from     own  node 1   node 2  ...
        #   to       own  path[0]  path[1] ...
        inputs, pool = self._inputs, self._parts.pool
        steps = torch.arange(path.shape[1], device=path.device)
        is_right = (steps < num_right[:, None]).T  # [depth, rows]
        targets = inputs.places + steps[:, None]
        sources = inputs.places + path.T - 1
        # Others move within the dummy page, zeros onto zeros.
        from_at = (inputs.locations(sources * is_right) * is_right).reshape(-1)
        to_at = (inputs.locations(targets * is_right) * is_right).reshape(-1)
        pool.move_entries(from_at, to_at)
        features = inputs.features.index_select(0, (path.T * inputs.size + inputs.row_numbers).reshape(-1))
        ends_page = (to_at + 1) % inputs.page_size == 0
        pages = to_at // inputs.page_size * (ends_page & is_right.reshape(-1))
        pool.tails.index_copy_(0, pages, features)
        pool.tails[DUMMY_PAGE].zero_()

    def _tree_of(self, number: int) -> TokenTree:
        """Return what the tokens of a pass see: the chosen one and those of passes before have places too."""
        visible = self._visible[number].view(-1)
        return TokenTree(torch.zeros_like(visible), visible, num_before=1 + number * self._parts.state.topk)
