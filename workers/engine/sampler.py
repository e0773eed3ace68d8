"""Sampler: turns the logits of a step's sampled rows into tokens. Rank 0's Engine owns and calls it.

It keeps what a slot's next token depends on beside its logits: parameters, seed, token counts. Rows are
processed together but independently: what a row yields depends on that row alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.engine.random_numbers import Purpose, gumbel, row_keys
from workers.plan import OpenSlot
from workers.protocol import SamplingParams, TokenLogprobs

MIN_TEMPERATURE = 1e-5
"""Below it, sampling is greedy: the division would only lose the logits' order."""

_FIRST_NUM_CANDIDATES = 256
"""Tokens ranked for a nucleus before it is known how many it needs; most need fewer."""


@dataclass
class _Slot:
    sampling: SamplingParams
    seed: int
    prompt_len: int
    bias_ids: list[int]
    biases: list[float]
    end_ids: list[int]
    """Tokens banned while fewer than min_tokens were generated."""
    counts_row: int | None
    """Row of the token counts; None without penalties."""
    is_greedy: bool
    is_plain: bool
    """Greedy, and nothing but the largest logit matters."""


class Sampler:
    """Chooses the next token of each row; holds the sampling state of the open slots.

    Order: repetition penalty, frequency and presence penalty, logit_bias, min_tokens' ban; logprobs are taken
    here; then temperature, top_k, top_p (of what top_k left), min_p, and a draw by Gumbel noise keyed by
    (seed, position, token id). Equal logits rank by token id, the lower first.
    """

    def __init__(self, vocab_size: int, max_slots: int, device: torch.device | str) -> None:
        self._vocab_size = vocab_size
        self._max_slots = max_slots
        self._device = torch.device(device)
        self._slots: dict[int, _Slot] = {}
        self._ids = torch.arange(vocab_size, dtype=torch.int32, device=self._device)[None]  # [1, vocab]
        # Grown with the number of open slots that have penalties, of which there are few.
        self._generated_counts = torch.zeros(0, vocab_size, dtype=torch.int32, device=self._device)
        self._in_prompt = torch.zeros(0, vocab_size, dtype=torch.bool, device=self._device)
        self._free_counts_rows: list[int] = []

    def open(self, op: OpenSlot) -> None:
        """Begin a request in a slot, or go on with one that was preempted.

        Token ids of its bias, stop and end tokens must be in the vocabulary: admission has checked them.
        """
        assert op.slot not in self._slots, f"slot {op.slot} is open"
        assert len(self._slots) < self._max_slots, f"all {self._max_slots} slots are open"
        sampling = op.sampling
        has_penalties = (
            sampling.repetition_penalty != 1.0
            or sampling.presence_penalty != 0.0
            or sampling.frequency_penalty != 0.0
        )
        end_ids = [] if sampling.ignore_eos else list(op.end_token_ids)
        end_ids += sampling.stop_token_ids
        is_greedy = sampling.temperature < MIN_TEMPERATURE
        self._slots[op.slot] = _Slot(
            sampling=sampling,
            seed=op.seed,
            prompt_len=op.prompt_len,
            bias_ids=[token_id for token_id, _ in sampling.logit_bias],
            biases=[bias for _, bias in sampling.logit_bias],
            end_ids=sorted(set(end_ids)) if sampling.min_tokens > 0 else [],
            counts_row=self._take_counts_row(op) if has_penalties else None,
            is_greedy=is_greedy,
            is_plain=is_greedy
            and not has_penalties
            and not sampling.logit_bias
            and sampling.min_tokens == 0
            and sampling.num_logprobs is None,
        )

    def close(self, slot: int) -> None:
        """Forget a slot's request."""
        counts_row = self._slots.pop(slot).counts_row
        if counts_row is not None:
            self._free_counts_rows.append(counts_row)

    def sample(
        self, logits: Tensor, slots: Sequence[int], positions: Sequence[int]
    ) -> tuple[list[int], list[TokenLogprobs | None]]:
        """Choose one token a row and count it to the row's history.

        logits [rows, vocab] float32 are left as they are. `positions[i]` is the absolute position that row
        i's new token takes. The second list holds None where the request did not ask for logprobs.
        """
        rows = [self._slots[slot] for slot in slots]
        if all(row.is_plain for row in rows):
            # The tokens leave for the Scheduler: the one place where a step waits for the device.
            return logits.argmax(dim=-1).tolist(), [None] * len(rows)
        scores = self._adjust(logits, rows, positions)
        chosen = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
        greedy = [i for i, row in enumerate(rows) if row.is_greedy]
        drawn = [i for i, row in enumerate(rows) if not row.is_greedy]
        ranked = [i for i in drawn if self._needs_ranking(rows[i].sampling)]
        whole = [i for i in drawn if not self._needs_ranking(rows[i].sampling)]
        if greedy:
            chosen[greedy] = scores[greedy].argmax(dim=-1)
        if whole:
            chosen[whole] = self._draw_whole(scores, rows, positions, whole)
        num_candidates = _FIRST_NUM_CANDIDATES
        while ranked:
            tokens, is_enough = self._draw_ranked(scores, rows, positions, ranked, num_candidates)
            chosen[ranked] = tokens
            ranked = [i for i, enough in zip(ranked, is_enough, strict=True) if not enough]
            num_candidates *= 8
        self._count(chosen, rows)
        return chosen.tolist(), self._logprobs(scores, chosen, rows)

    def check(self) -> None:
        """Assert that the rows of the token counts are either free or owned by exactly one slot."""
        owned = [slot.counts_row for slot in self._slots.values() if slot.counts_row is not None]
        rows = sorted(owned + self._free_counts_rows)
        assert rows == list(range(self._generated_counts.shape[0])), f"count rows {rows}"

    def _take_counts_row(self, op: OpenSlot) -> int:
        if not self._free_counts_rows:
            first = self._generated_counts.shape[0]
            more = min(max(1, first), self._max_slots - first)
            self._generated_counts = torch.cat(
                [self._generated_counts, self._generated_counts.new_zeros(more, self._vocab_size)]
            )
            self._in_prompt = torch.cat([self._in_prompt, self._in_prompt.new_zeros(more, self._vocab_size)])
            self._free_counts_rows.extend(range(first, first + more))
        counts_row = self._free_counts_rows.pop()
        token_ids = torch.tensor(op.token_ids, dtype=torch.int64, device=self._device)
        self._in_prompt[counts_row] = False
        self._in_prompt[counts_row, token_ids[: op.prompt_len]] = True
        self._generated_counts[counts_row] = torch.bincount(
            token_ids[op.prompt_len :], minlength=self._vocab_size
        )
        return counts_row

    def _count(self, chosen: Tensor, rows: list[_Slot]) -> None:
        counted = [i for i, row in enumerate(rows) if row.counts_row is not None]
        if counted:
            counts_rows = self._tensor([rows[i].counts_row for i in counted], torch.int64)
            self._generated_counts[counts_rows, chosen[counted]] += 1

    def _adjust(self, logits: Tensor, rows: list[_Slot], positions: Sequence[int]) -> Tensor:
        """Return logits after penalties, biases and bans; `logits` itself where no row has any."""
        at: list[int] = []
        token_ids: list[int] = []
        additions: list[float] = []
        for i, (row, position) in enumerate(zip(rows, positions, strict=True)):
            banned = row.end_ids if position - row.prompt_len < row.sampling.min_tokens else []
            at += [i] * (len(row.bias_ids) + len(banned))
            token_ids += row.bias_ids + banned
            additions += row.biases + [-math.inf] * len(banned)
        penalized = [i for i, row in enumerate(rows) if row.counts_row is not None]
        if not penalized and not at:
            return logits
        scores = logits.clone()
        if penalized:
            scores[penalized] = self._penalize(scores[penalized], [rows[i] for i in penalized])
        if at:
            index = (self._tensor(at, torch.int64), self._tensor(token_ids, torch.int64))
            scores.index_put_(index, self._tensor(additions, torch.float32), accumulate=True)
        return scores

    def _penalize(self, scores: Tensor, rows: list[_Slot]) -> Tensor:
        """Penalize repetition as CTRL does (Keskar et al. 2019): prompt and output; the rest as OpenAI."""
        counts_rows = self._tensor([row.counts_row for row in rows], torch.int64)
        counts = self._generated_counts[counts_rows]  # [rows, vocab]
        was_generated = counts > 0
        was_seen = was_generated | self._in_prompt[counts_rows]
        repetition = self._column([row.sampling.repetition_penalty for row in rows])
        scores = torch.where(
            was_seen, torch.where(scores > 0, scores / repetition, scores * repetition), scores
        )
        scores -= self._column([row.sampling.frequency_penalty for row in rows]) * counts
        scores -= self._column([row.sampling.presence_penalty for row in rows]) * was_generated
        return scores

    def _needs_ranking(self, sampling: SamplingParams) -> bool:
        return sampling.top_p < 1.0 or (sampling.top_k is not None and sampling.top_k < self._vocab_size)

    def _scaled(self, scores: Tensor, rows: list[_Slot], which: list[int]) -> Tensor:
        """Return log-probabilities after temperature of the rows `which`, [len(which), vocab]."""
        # log_softmax works row by row on every device: unlike a plain sum it does not depend on the batch.
        return torch.log_softmax(
            scores[which] / self._column([rows[i].sampling.temperature for i in which]), -1
        )

    def _draw_whole(
        self, scores: Tensor, rows: list[_Slot], positions: Sequence[int], which: list[int]
    ) -> Tensor:
        """Draw from the whole vocabulary, min_p aside, which needs no ranking."""
        log_p = self._scaled(scores, rows, which)
        min_p = [rows[i].sampling.min_p for i in which]
        if any(min_p):
            log_p = log_p.masked_fill(log_p < log_p.amax(-1, keepdim=True) + self._logs(min_p), -math.inf)
        keys = row_keys([rows[i].seed for i in which], [positions[i] for i in which], Purpose.SAMPLE)
        return log_p.add_(gumbel(keys, self._ids)).argmax(dim=-1)

    def _draw_ranked(
        self,
        scores: Tensor,
        rows: list[_Slot],
        positions: Sequence[int],
        which: list[int],
        num_candidates: int,
    ) -> tuple[Tensor, list[bool]]:
        """Draw from the most likely tokens.

        Returns a token a row, and whether the candidates held the row's whole nucleus: if not, its token is
        void and the row must be drawn again with more.
        """
        top_k = [min(rows[i].sampling.top_k or self._vocab_size, self._vocab_size) for i in which]
        wanted = [k for k in top_k if k < self._vocab_size] + [num_candidates]
        num_candidates = min(max(wanted), self._vocab_size)
        log_p = self._scaled(scores, rows, which)
        ids = _largest(log_p, num_candidates)  # [rows, candidates]
        log_p = log_p.gather(-1, ids)
        in_top_k = torch.arange(num_candidates, device=ids.device) < self._column(top_k)
        p = log_p.double().exp().masked_fill_(~in_top_k, 0.0)
        mass = p.cumsum(dim=-1)
        has_top_k = self._column(top_k) < self._vocab_size
        target = self._column([rows[i].sampling.top_p for i in which]).double()
        # Of what top_k left, the fewest tokens that reach top_p: those before which it is not yet reached.
        target = torch.where(target < 1.0, target * torch.where(has_top_k, mass[:, -1:], 1.0), math.inf)
        is_kept = in_top_k & (mass - p < target)
        min_p = [rows[i].sampling.min_p for i in which]
        is_kept &= log_p >= log_p[:, :1] + self._logs(min_p)
        is_enough = has_top_k | (mass[:, -1:] >= target) | (num_candidates == self._vocab_size)
        keys = row_keys([rows[i].seed for i in which], [positions[i] for i in which], Purpose.SAMPLE)
        noisy = (log_p + gumbel(keys, ids.to(torch.int32))).masked_fill_(~is_kept, -math.inf)
        # The host decides whether to rank more tokens: a wait, for rows with top_p only.
        return ids.gather(-1, noisy.argmax(dim=-1, keepdim=True))[:, 0], is_enough[:, 0].tolist()

    def _logprobs(self, scores: Tensor, chosen: Tensor, rows: list[_Slot]) -> list[TokenLogprobs | None]:
        result: list[TokenLogprobs | None] = [None] * len(rows)
        wanted = [
            (i, row.sampling.num_logprobs)
            for i, row in enumerate(rows)
            if row.sampling.num_logprobs is not None
        ]
        if not wanted:
            return result
        which = [i for i, _ in wanted]
        log_p = torch.log_softmax(scores[which], dim=-1)
        ids = _largest(log_p, min(max(n for _, n in wanted), self._vocab_size))
        # Results for the client: they leave the device.
        tops, top_ids = log_p.gather(-1, ids).tolist(), ids.tolist()
        own = log_p.gather(-1, chosen[which][:, None])[:, 0].tolist()
        for k, (i, n) in enumerate(wanted):
            result[i] = TokenLogprobs(own[k], top_ids[k][:n], tops[k][:n])
        return result

    def _column(self, values: Sequence[float]) -> Tensor:
        dtype = torch.int64 if all(isinstance(value, int) for value in values) else torch.float32
        return self._tensor(values, dtype)[:, None]

    def _logs(self, values: Sequence[float]) -> Tensor:
        return self._column([math.log(value) if value > 0 else -math.inf for value in values])

    def _tensor(self, values: Sequence[float | int | None], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self._device)


def _largest(values: Tensor, num: int) -> Tensor:
    """Return the ids of each row's `num` largest values, largest first; equal values, lower id first.

    topk alone leaves the order of equal values open, and logits of bf16 weights are often equal.
    """
    if num == 0:
        return torch.empty(values.shape[0], 0, dtype=torch.int64, device=values.device)
    vocab_size = values.shape[-1]
    bits = (values + 0.0).view(torch.int32)  # + 0.0: the two zeros are equal
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    last_id_first = torch.arange(vocab_size - 1, -1, -1, device=values.device)
    # key: [ order of the value : 32 | vocab_size - 1 - id : 32 ]
    keys = (ordered.to(torch.int64) << 32) | last_id_first
    if num * 8 > vocab_size:  # topk is slower than a sort where it keeps much
        largest = keys.sort(dim=-1, descending=True).values[:, :num]
    else:
        largest = keys.topk(num, dim=-1).values
    return vocab_size - 1 - (largest & 0xFFFFFFFF)
