"""SamplingTable: how the request of each slot samples, in columns: a step's rows take theirs in one go.

The Sampler owns it. It lies in host memory; what a step needs of it is copied to the device.
"""

import math

import numpy as np

from workers.plan import OpenSlot

MIN_TEMPERATURE = 1e-5
"""Below it, sampling is greedy: the division would only lose the logits' order."""
_UINT64 = (1 << 64) - 1


class SamplingTable:
    """Columns [max_slots]; of a slot that is not open they mean nothing, but for `is_open`."""

    def __init__(self, vocab_size: int, max_slots: int) -> None:
        self._vocab_size = vocab_size
        self.is_open = np.zeros(max_slots, dtype=np.bool_)
        self.is_plain = np.zeros(max_slots, dtype=np.bool_)
        """Greedy, and nothing but the largest logit matters."""
        self.is_greedy = np.zeros(max_slots, dtype=np.bool_)
        self.has_top_k = np.zeros(max_slots, dtype=np.bool_)
        self.has_top_p = np.zeros(max_slots, dtype=np.bool_)
        self.has_min_p = np.zeros(max_slots, dtype=np.bool_)
        self.has_penalties = np.zeros(max_slots, dtype=np.bool_)
        self.has_additions = np.zeros(max_slots, dtype=np.bool_)
        """Biases, or bans while min_tokens are not reached."""
        self.has_logprobs = np.zeros(max_slots, dtype=np.bool_)
        self.seed = np.zeros(max_slots, dtype=np.uint64)
        self.top_k = np.zeros(max_slots, dtype=np.int64)
        self.counts_row = np.zeros(max_slots, dtype=np.int64)
        """Where the slot's token counts are; only with penalties."""
        self.num_logprobs = np.zeros(max_slots, dtype=np.int64)
        #: temperature, top_p, log of min_p
        self.filters = np.zeros((max_slots, 3), dtype=np.float32)
        #: repetition, frequency, presence penalty
        self.penalties = np.zeros((max_slots, 3), dtype=np.float32)
        self._additions: dict[int, tuple[list[int], list[float]]] = {}
        self._bans: dict[int, tuple[list[int], int]] = {}  # tokens, and the position where they are free

    def open(self, op: OpenSlot) -> None:
        """Write a slot's columns, all but `counts_row`."""
        slot, sampling = op.slot, op.sampling
        self.is_open[slot] = True
        self.is_greedy[slot] = is_greedy = sampling.temperature < MIN_TEMPERATURE
        self.has_top_k[slot] = sampling.top_k is not None and sampling.top_k < self._vocab_size
        self.has_top_p[slot] = sampling.top_p < 1.0
        self.has_min_p[slot] = sampling.min_p > 0.0
        self.has_penalties[slot] = has_penalties = (
            sampling.repetition_penalty != 1.0
            or sampling.presence_penalty != 0.0
            or sampling.frequency_penalty != 0.0
        )
        self.has_additions[slot] = has_additions = bool(sampling.logit_bias) or sampling.min_tokens > 0
        self.has_logprobs[slot] = has_logprobs = sampling.num_logprobs is not None
        self.is_plain[slot] = is_greedy and not (has_penalties or has_additions or has_logprobs)
        self.seed[slot] = op.seed & _UINT64
        self.top_k[slot] = min(sampling.top_k or self._vocab_size, self._vocab_size)
        self.num_logprobs[slot] = sampling.num_logprobs or 0
        log_min_p = math.log(sampling.min_p) if sampling.min_p > 0 else -math.inf
        self.filters[slot] = (max(sampling.temperature, MIN_TEMPERATURE), sampling.top_p, log_min_p)
        self.penalties[slot] = (
            sampling.repetition_penalty,
            sampling.frequency_penalty,
            sampling.presence_penalty,
        )
        if has_additions:
            end_ids = [] if sampling.ignore_eos else list(op.end_token_ids)
            banned = sorted({*end_ids, *sampling.stop_token_ids})
            biases = sampling.logit_bias
            self._additions[slot] = ([token_id for token_id, _ in biases], [bias for _, bias in biases])
            self._bans[slot] = (banned, op.prompt_len + sampling.min_tokens)

    def close(self, slot: int) -> None:
        """Forget a slot."""
        self.is_open[slot] = False
        self._additions.pop(slot, None)
        self._bans.pop(slot, None)

    def additions(self, slot: int, position: int) -> tuple[list[int], list[float]]:
        """Return what is added to which logits of a slot whose next token takes `position`."""
        token_ids, values = self._additions[slot]
        banned, free_from = self._bans[slot]
        if position < free_from:
            return token_ids + banned, values + [-math.inf] * len(banned)
        return token_ids, values
