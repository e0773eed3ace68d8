"""TreePasses: a draft that follows its likeliest guesses at each depth. The part of a DraftLoop that makes
drafts a tree.

    place     p         p+1 ... p+w                p+w+1 ... p+2w             ...      w: topk
    token     chosen    followed of depth 1        followed of depth 2

The step that verifies gives the tree's nodes the places s + 1, s + 2, ... of its row, in the order of their
numbers. Those that were right are then moved to where their text has them: target's entries, draft's, tails.
"""

import torch

from workers.engine.forward_batch import TokenTree
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
        depths: list[Guesses] = []
        followed: list[torch.Tensor] = []
        scores = torch.zeros(size, 1, device=hidden.device)
        seen = torch.ones(size, 1, dtype=torch.int64, device=hidden.device)
        for number in range(draft_len):
            if (logits := model.logits(hidden)) is not None:
                likelihoods = torch.log_softmax(logits.float(), dim=-1).view(size, -1, logits.shape[-1])
                depths.append(guess(likelihoods, scores, topk))
            if number == draft_len - 1:
                break
            beam = self._follow(depths, followed)
            tokens, parents = beam[0], beam[1]
            if depths:
                scores = depths[-1].scores.gather(1, followed[-1])
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

    def _follow(self, depths: list[Guesses], followed: list[torch.Tensor]) -> torch.Tensor:
        """Return tokens and parents of the nodes to be followed, [2, rows, topk], equal on every rank."""
        size, topk = self._inputs.size, self._parts.state.topk
        beam = torch.empty(2, size, topk, dtype=torch.int64, device=self._places.device)
        if depths:  # rank 0's
            followed.append(follow(depths[-1], topk))
            tokens = depths[-1].token_ids.gather(1, followed[-1])
            beam[0].copy_(self._parts.draft.target_ids(tokens))
            beam[1].copy_(depths[-1].parents.gather(1, followed[-1]))
        self._parts.group.broadcast(beam)
        return beam

    def _keep(self, depths: list[Guesses], followed: list[torch.Tensor], num_nodes: int) -> None:
        """Leave the tree where its slots' next step finds it."""
        state, slots = self._parts.state, self._inputs.slots
        shape = (self._inputs.size, 1 + state.fields.shape[1], num_nodes)
        kept = torch.empty(shape, dtype=torch.int64, device=slots.device)
        if depths:
            token_ids, fields = keep(depths, followed, num_nodes)
            kept[:, 0].copy_(self._parts.draft.target_ids(token_ids))
            kept[:, 1:].copy_(fields)
        self._parts.group.broadcast(kept)
        state.drafts[:, :num_nodes].index_copy_(0, slots, kept[:, 0])
        state.fields[:, :, :num_nodes].index_copy_(0, slots, kept[:, 1:])

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
