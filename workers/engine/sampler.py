"""Sampler: turns the logits of a step's sampled rows into tokens. Every rank's Engine owns and calls one.

It keeps what a slot's next token depends on beside its logits: parameters, seed, token counts. Rows are
processed together but independently: what a row yields depends on that row alone. Ranks have the logits of
their own part of the vocabulary, and all come to the same tokens, those of a group of one. On CUDA nothing
here waits for the device.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from workers.engine.copies import CopyStream
from workers.engine.nucleus import MAX_ROWS, nucleus
from workers.engine.random_numbers import Purpose, gumbel, row_keys
from workers.engine.sampled import Sampled, SampledLogprobs
from workers.engine.sampling_table import SamplingTable
from workers.engine.vocabulary_shard import VocabularyShard, greedy_keys, ids_of, keys_of, values_of
from workers.parallel import TPGroup
from workers.plan import OpenSlot

_FIRST_NUM_CANDIDATES = 256
"""Tokens ranked for a nucleus before it is known how many it needs; most need fewer."""

IntArray = npt.NDArray[np.int64]

GreedyTokens = Callable[[Tensor], Tensor]
"""Of logits [rows, vocab] in any dtype each row's largest, of equal ones the lower id: [rows] int64."""


GreedyKeys = Callable[[Tensor, int], Tensor]
"""See vocabulary_shard.greedy_keys."""


def greedy_tokens(logits: Tensor) -> Tensor:
    """GreedyTokens by torch, which is far slower over narrow floats on CPU than to widen them first."""
    return logits.float().argmax(dim=-1)


_PROBABILITY_BITS = 40
"""Probabilities relative to a row's largest are whole multiples of 2^-40: their sums are exact."""


class Sampler:
    """Chooses the next token of each row; holds the sampling state of the open slots.

    Order: repetition penalty, frequency and presence penalty, logit_bias, min_tokens' ban; logprobs are taken
    here; then temperature, top_k, top_p (of what top_k left), min_p, and a draw by Gumbel noise keyed by
    (seed, position, token id). Equal logits rank by token id, the lower first.
    """

    def __init__(
        self,
        vocab_size: int,
        max_slots: int,
        device: torch.device | str,
        copies: CopyStream,
        may_wait: bool | None = None,
        greedy: GreedyTokens = greedy_tokens,
        group: TPGroup | None = None,
        keys: GreedyKeys = greedy_keys,
    ) -> None:
        """`may_wait`: whether a nucleus is sought among more and more tokens, which takes a look at the
        device's results, or by `nucleus`. None: on CPU only. `group`: among which the vocabulary is divided;
        None: it is whole. `keys` take the place of `greedy` where it is divided."""
        self._shard = shard = VocabularyShard(vocab_size, group or TPGroup.single())
        self._vocab_size = vocab_size
        self._max_slots = max_slots
        self._device = torch.device(device)
        self._copies = copies
        self._may_wait = self._device.type == "cpu" if may_wait is None else may_wait
        self._greedy_tokens = greedy
        self._greedy_keys = keys
        self._table = SamplingTable(vocab_size, max_slots)
        ids = torch.arange(shard.num_tokens, dtype=torch.int32, device=self._device) + shard.first
        self._ids = ids[None]  # [1, num_tokens]
        # Grown with the number of open slots that have penalties, of which there are few.
        self._generated_counts = torch.zeros(0, shard.num_tokens, dtype=torch.int32, device=self._device)
        self._in_prompt = torch.zeros(0, shard.num_tokens, dtype=torch.bool, device=self._device)
        self._free_counts_rows: list[int] = []

    def open(self, op: OpenSlot) -> None:
        """Begin a request in a slot, or go on with one that was preempted.

        Token ids of its bias, stop and end tokens must be in the vocabulary: admission has checked them.
        """
        table = self._table
        assert not table.is_open[op.slot], f"slot {op.slot} is open"
        table.open(op)
        if table.has_penalties[op.slot]:
            table.counts_row[op.slot] = self._take_counts_row(op)

    def close(self, slot: int) -> None:
        """Forget a slot's request."""
        table = self._table
        assert table.is_open[slot], f"slot {slot} is not open"
        table.close(slot)
        if table.has_penalties[slot]:
            self._free_counts_rows.append(int(table.counts_row[slot]))

    def is_plain(self, slots: IntArray) -> npt.NDArray[np.bool_]:
        """Tell of each slot whether its next token is that of the largest logit, wherever its place is."""
        found: npt.NDArray[np.bool_] = self._table.is_plain[slots]
        return found

    def has_history(self, slots: IntArray) -> npt.NDArray[np.bool_]:
        """Tell of each slot whether its next token depends on those before it, beside their place."""
        found: npt.NDArray[np.bool_] = self._table.has_penalties[slots]
        return found

    def sample(
        self, logits: Tensor, slots: Sequence[int] | IntArray, positions: Sequence[int] | IntArray
    ) -> Sampled:
        """Choose one token a row and count it to the row's history.

        logits [rows, this rank's tokens], in the model's dtype, are left as they are. `positions[i]` is the
        absolute position that row i's new token takes. All ranks call it together.
        """
        rows, places = np.asarray(slots, dtype=np.int64), np.asarray(positions, dtype=np.int64)
        if self._table.is_plain[rows].all():
            return Sampled(self._greedy(logits, rows, places), None)
        scores = self._adjust(logits.float(), rows, places)
        chosen = self._choose(scores, rows, places)
        self._count(chosen, rows)
        return Sampled(chosen, self._logprobs(scores, chosen, rows))

    def check(self) -> None:
        """Assert that the rows of the token counts are either free or owned by exactly one slot."""
        table = self._table
        owned = table.counts_row[table.is_open & table.has_penalties].tolist()
        rows = sorted(owned + self._free_counts_rows)
        assert rows == list(range(self._generated_counts.shape[0])), f"count rows {rows}"

    def _take_counts_row(self, op: OpenSlot) -> int:
        if not self._free_counts_rows:
            first = self._generated_counts.shape[0]
            more = min(max(1, first), self._max_slots - first)
            self._generated_counts = torch.cat(
                [self._generated_counts, self._generated_counts.new_zeros(more, self._shard.num_tokens)]
            )
            self._in_prompt = torch.cat(
                [self._in_prompt, self._in_prompt.new_zeros(more, self._shard.num_tokens)]
            )
            self._free_counts_rows.extend(range(first, first + more))
        counts_row = self._free_counts_rows.pop()
        places = np.array(op.token_ids, dtype=np.int64) - self._shard.first
        is_here = (places >= 0) & (places < self._shard.num_tokens)
        num_prompt = int(is_here[: op.prompt_len].sum())
        token_ids = self._copies.upload(places[is_here])
        prompt, generated = token_ids[:num_prompt], token_ids[num_prompt:]
        self._in_prompt[counts_row].fill_(False).index_fill_(0, prompt, True)
        counts = self._generated_counts[counts_row].fill_(0)
        counts.index_add_(0, generated, torch.ones_like(generated, dtype=torch.int32))
        return counts_row

    def _count(self, chosen: Tensor, rows: IntArray) -> None:
        which, counted = self._part(chosen, self._table.has_penalties[rows])
        if which.size:
            counts_rows = self._copies.upload(self._table.counts_row[rows[which]])
            at, is_here = self._shard.place(counted)
            self._generated_counts[counts_rows, at] += is_here.to(torch.int32)

    def _adjust(self, logits: Tensor, rows: IntArray, places: IntArray) -> Tensor:
        """Return logits after penalties, biases and bans; `logits` itself where no row has any."""
        at: list[int] = []
        token_ids: list[int] = []
        additions: list[float] = []
        for i in np.flatnonzero(self._table.has_additions[rows]).tolist():
            first, end = self._shard.first, self._shard.first + self._shard.num_tokens
            for token_id, value in zip(*self._table.additions(int(rows[i]), int(places[i])), strict=True):
                if first <= token_id < end:
                    at.append(i)
                    token_ids.append(token_id - first)
                    additions.append(value)
        which, penalized = self._part(logits, self._table.has_penalties[rows])
        if not which.size and not at:
            return logits
        scores = logits.clone()
        if which.size:
            scores.index_copy_(0, self._copies.upload(which), self._penalize(penalized, rows[which]))
        if at:
            index = self._copies.upload(np.array([at, token_ids], dtype=np.int64))
            values_at = self._copies.upload(np.array(additions, dtype=np.float32))
            scores.index_put_((index[0], index[1]), values_at, accumulate=True)
        return scores

    def _penalize(self, scores: Tensor, rows: IntArray) -> Tensor:
        """Penalize repetition as CTRL does (Keskar et al. 2019): prompt and output; the rest as OpenAI."""
        counts_rows = self._copies.upload(self._table.counts_row[rows])
        penalties = self._copies.upload(self._table.penalties[rows])
        repetition, frequency, presence = penalties[:, :1], penalties[:, 1:2], penalties[:, 2:]
        counts = self._generated_counts[counts_rows]  # [rows, vocab]
        was_generated = counts > 0
        was_seen = was_generated | self._in_prompt[counts_rows]
        scores = torch.where(
            was_seen, torch.where(scores > 0, scores / repetition, scores * repetition), scores
        )
        scores -= frequency * counts
        scores -= presence * was_generated
        return scores

    def _choose(self, scores: Tensor, rows: IntArray, places: IntArray) -> Tensor:
        """Return each row's token, each kind of rows drawn together."""
        table = self._table
        is_drawn, has_top_k = ~table.is_greedy[rows], table.has_top_k[rows]
        has_top_p = table.has_top_p[rows] & ~has_top_k
        kinds = (
            (~is_drawn, self._greedy),
            (is_drawn & ~has_top_k & ~has_top_p, self._draw_whole),
            (is_drawn & has_top_k, self._draw_top_k),
            (is_drawn & has_top_p, self._draw_nucleus),
        )
        chosen = torch.empty(len(rows), dtype=torch.int64, device=scores.device)
        for mask, draw in kinds:
            which, part = self._part(scores, mask)
            if which.size == len(rows):
                return draw(scores, rows, places)
            if which.size:
                chosen.index_copy_(0, self._copies.upload(which), draw(part, rows[which], places[which]))
        return chosen

    def _part(self, values: Tensor, mask: npt.NDArray[np.bool_]) -> tuple[IntArray, Tensor]:
        """Return which rows are in the mask, and these rows of `values`."""
        which = np.flatnonzero(mask)
        if which.size in (0, len(mask)):
            return which, values
        return which, values.index_select(0, self._copies.upload(which))

    def _greedy(self, scores: Tensor, rows: IntArray, places: IntArray) -> Tensor:
        if self._shard.is_whole:
            return self._greedy_tokens(scores)
        return self._shard.best(self._greedy_keys(scores, self._shard.first))

    def _draw_whole(self, scores: Tensor, rows: IntArray, places: IntArray) -> Tensor:
        """Draw from the whole vocabulary, min_p aside, which needs no ranking."""
        log_p, filters = self._scaled(scores, rows)
        if self._table.has_min_p[rows].any():
            log_p = log_p.masked_fill(log_p < filters[:, 2:], -math.inf)
        noisy = log_p.add_(gumbel(self._keys(rows, places), self._ids))
        return noisy.argmax(dim=-1) if self._shard.is_whole else self._greedy(noisy, rows, places)

    def _draw_top_k(self, scores: Tensor, rows: IntArray, places: IntArray) -> Tensor:
        log_p, filters = self._scaled(scores, rows)
        return self._draw_ranked(log_p, filters, None, rows, places, int(self._table.top_k[rows].max()))[0]

    def _draw_nucleus(self, scores: Tensor, rows: IntArray, places: IntArray) -> Tensor:
        """Draw from the most likely tokens, as many as top_p wants."""
        if not self._may_wait:
            starts = range(0, len(rows), MAX_ROWS)
            parts = [slice(start, start + MAX_ROWS) for start in starts]
            return torch.cat([self._search_nucleus(scores[part], rows[part], places[part]) for part in parts])
        log_p, filters = self._scaled(scores, rows)
        mass = self._mass(log_p)
        num_candidates = _FIRST_NUM_CANDIDATES
        chosen, is_enough = self._draw_ranked(log_p, filters, mass, rows, places, num_candidates)
        # The host decides whether to rank more tokens: a wait.
        while (lacking := np.flatnonzero(~is_enough.cpu().numpy())).size:
            num_candidates *= 8
            its_p, its_filters, its_mass = (values[lacking] for values in (log_p, filters, mass))
            tokens, is_enough[lacking] = self._draw_ranked(
                its_p, its_filters, its_mass, rows[lacking], places[lacking], num_candidates
            )
            chosen[lacking] = tokens
        return chosen

    def _search_nucleus(self, scores: Tensor, rows: IntArray, places: IntArray) -> Tensor:
        """Draw as `_draw_nucleus` does, without a wait and without ranking anything."""
        log_p, filters = self._scaled(scores, rows)
        masses = _whole_probabilities(log_p)
        target = filters[:, 1:2].double() * self._shard.sum(masses.sum(dim=-1, keepdim=True))
        is_kept = nucleus(log_p, masses, target, self._shard) & (log_p >= filters[:, 2:])
        noisy = log_p.add_(gumbel(self._keys(rows, places), self._ids)).masked_fill_(~is_kept, -math.inf)
        return self._greedy(noisy, rows, places)

    def _draw_ranked(
        self,
        log_p: Tensor,
        filters: Tensor,
        whole_mass: Tensor | None,
        rows: IntArray,
        places: IntArray,
        num_candidates: int,
    ) -> tuple[Tensor, Tensor]:
        """Draw from the most likely tokens, of what `_scaled` returned; `whole_mass` [rows] is that of all
        tokens, None where top_k leaves fewer.

        Returns a token a row, and whether the candidates held the row's whole nucleus: if not, its token is
        void and the row must be drawn again with more.
        """
        num_candidates = min(num_candidates, self._vocab_size)
        keys = self._shard.largest(log_p, num_candidates)  # [rows, candidates]
        ids, log_p = ids_of(keys), values_of(keys)
        top_k = self._copies.upload(self._table.top_k[rows])[:, None]
        in_top_k = torch.arange(num_candidates, device=ids.device) < top_k
        p = _whole_probabilities(log_p).masked_fill_(~in_top_k, 0)
        mass = p.cumsum(dim=-1)
        # Of what top_k left, the fewest tokens that reach top_p: those before which it is not yet reached.
        target = filters[:, 1:2].double()
        target = target * (mass[:, -1:] if whole_mass is None else whole_mass[:, None])
        target = torch.where(filters[:, 1:2] < 1.0, target, math.inf)
        is_kept = in_top_k & (mass - p < target)
        is_kept &= log_p >= filters[:, 2:]
        is_enough = (mass[:, -1:] >= target) | (num_candidates == self._vocab_size)
        noise = gumbel(self._keys(rows, places), ids.to(torch.int32))
        noisy = (log_p + noise).masked_fill_(~is_kept, -math.inf)
        return ids_of(keys_of(noisy, ids).amax(dim=-1)), is_enough[:, 0]

    def _scaled(self, scores: Tensor, rows: IntArray) -> tuple[Tensor, Tensor]:
        """Return log-probabilities after temperature relative to the row's largest, [rows, tokens], and the
        rows' `filters` [rows, 3]. A token's depends on its own score and the largest alone."""
        filters = self._copies.upload(self._table.filters[rows])
        largest = self._shard.maximum(scores.amax(-1, keepdim=True))
        return (scores - largest).div_(filters[:, :1]), filters

    def _mass(self, log_p: Tensor) -> Tensor:
        """Return the sum of the row's probabilities, [rows] int64."""
        return self._shard.sum(_whole_probabilities(log_p).sum(dim=-1))

    def _keys(self, rows: IntArray, places: IntArray) -> Tensor:
        return self._copies.upload(row_keys(self._table.seed[rows], places, Purpose.SAMPLE))

    def _logprobs(self, scores: Tensor, chosen: Tensor, rows: IntArray) -> SampledLogprobs | None:
        has_logprobs = self._table.has_logprobs[rows]
        which, wanted = self._part(scores, has_logprobs)
        if not which.size:
            return None
        nums = self._table.num_logprobs[rows[which]].tolist()
        log_p = self._shard.log_softmax(wanted)
        top = self._shard.largest(log_p, min(max(nums), self._vocab_size))
        at, is_here = self._shard.place(self._part(chosen, has_logprobs)[1])
        own = torch.where(is_here, log_p.gather(-1, at[:, None])[:, 0], 0.0)
        return SampledLogprobs(which.tolist(), nums, self._shard.sum(own), ids_of(top), values_of(top))


def _whole_probabilities(log_p: Tensor) -> Tensor:
    """Return probabilities in units of 2^-40, int64: whatever is added up in any order gives one sum."""
    return (log_p.double().exp_() * 2.0**_PROBABILITY_BITS).to(torch.int64)
