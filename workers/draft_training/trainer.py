"""Trainer: a draft's weights, its optimizer, and one step after another. One device, one thread."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workers.draft_training.batches import Batch, batches_from, epoch_batches, make_batch
from workers.draft_training.corpus import Sample
from workers.draft_training.options import TrainOptions
from workers.draft_training.simulation import draft_and_compare, view_target
from workers.draft_training.vocabulary import DraftVocabulary
from workers.models.decoder import Decoder
from workers.models.eagle_draft import Eagle3Draft

_WARM_UP_RATIO = 0.04
_LAST_RATIO = 0.02
"""Of the peak learning rate, at the end."""
_MAX_GRADIENT_NORM = 1.0
_BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Evaluated:
    """What simulated drafting from greedy answers came to. `accept_length`: tokens that a verify step brings,
    its own included; `rates`: of the drafts at each place, how many are right if those before are."""

    accept_length: float
    rates: list[float]


class Trainer:
    """Trains `draft`, in float32, beside a `decoder` that stays as it is."""

    def __init__(
        self,
        decoder: Decoder,
        draft: Eagle3Draft,
        vocabulary: DraftVocabulary,
        samples: Sequence[Sample],
        options: TrainOptions,
    ) -> None:
        self.draft = draft
        self.step = 0
        self._decoder = decoder
        self._vocabulary = vocabulary
        self._samples = samples
        self._options = options
        self._device = torch.device(options.device)
        self._max_len = options.max_prompt_tokens + options.max_answer_tokens + 1
        self._lens = [len(sample.token_ids) for sample in samples]
        placements = draft.placements()
        self._parameters = list({id(p.parameter): p.parameter for p in placements.values()}.values())
        for parameter in self._parameters:
            parameter.requires_grad_(True)
        self._optimizer = torch.optim.AdamW(
            self._parameters,
            lr=options.learning_rate,
            betas=_BETAS,
            weight_decay=0.0,
            fused=self._device.type == "cuda",
        )
        per_epoch = len(epoch_batches(self._lens, options.batch_tokens, self._max_len, options.seed, 0))
        self.num_steps = options.steps or max(1, round(options.epochs * per_epoch))
        self._order = batches_from(self._lens, options.batch_tokens, self._max_len, options.seed, 0)

    def train_step(self) -> tuple[Tensor, Tensor]:
        """Take the next step; return its loss and, for each draft's place, the share of right ones, both on
        the device: reading them waits for it."""
        batch = make_batch([self._samples[i] for i in next(self._order)], self._max_len, self._device)
        for group in self._optimizer.param_groups:
            group["lr"] = self._options.learning_rate * learning_rate_ratio(self.step, self.num_steps)
        target = view_target(self._decoder, batch, self.draft.feature_layers, self._vocabulary)
        with self._precision():
            simulated = draft_and_compare(
                self.draft, batch, target, self._vocabulary, self._options.simulated_drafts
            )
        self._optimizer.zero_grad(set_to_none=True)
        simulated.loss.backward()  # type: ignore[no-untyped-call]  # torch's own
        torch.nn.utils.clip_grad_norm_(self._parameters, _MAX_GRADIENT_NORM)
        self._optimizer.step()
        self.step += 1
        return simulated.loss.detach(), self._rates(simulated.right, batch)

    @torch.no_grad()
    def evaluate(self, held_out: Sequence[Sample]) -> Evaluated:
        """Let the draft guess along the held-out answers, round after round as a serving engine would."""
        num_steps = self._options.simulated_drafts
        num_rounds = num_kept = 0
        tried, right = np.zeros(num_steps, np.int64), np.zeros(num_steps, np.int64)
        lens = [len(sample.token_ids) for sample in held_out]
        for chosen in epoch_batches(lens, self._options.batch_tokens, self._max_len, 0, 0):
            batch = make_batch([held_out[i] for i in chosen], self._max_len, self._device)
            target = view_target(self._decoder, batch, self.draft.feature_layers, self._vocabulary)
            with self._precision():
                simulated = draft_and_compare(self.draft, batch, target, self._vocabulary, num_steps)
            guessed, behind = simulated.right.cpu().numpy(), batch.behind.cpu().numpy()
            for first in np.flatnonzero(behind == 0):
                following = np.flatnonzero(behind[first + 1 :] == 0)
                end = first + 1 + following[0] if len(following) else len(behind)
                for num_tried, num_right in rounds(guessed[:, first:end]):
                    num_rounds += 1
                    num_kept += num_right + 1
                    tried[: min(num_tried, num_right + 1)] += 1
                    right[:num_right] += 1
        return Evaluated(num_kept / max(1, num_rounds), (right / np.maximum(1, tried)).tolist())

    def state(self) -> dict[str, Any]:
        """Return all that the next step depends on, beside options and corpus."""
        return {
            "step": self.step,
            "parameters": [parameter.detach().cpu() for parameter in self._parameters],
            "optimizer": self._optimizer.state_dict(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of a trainer with the same options and corpus."""
        with torch.no_grad():
            for parameter, saved in zip(self._parameters, state["parameters"], strict=True):
                parameter.copy_(saved)
        self._optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        options = self._options
        self._order = batches_from(self._lens, options.batch_tokens, self._max_len, options.seed, self.step)

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        """Return in what the draft computes: bfloat16 over float32 weights, but for float32 on the CPU."""
        if self._device.type == "cpu" and self._decoder.norm.weight.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, dtype=torch.bfloat16)

    def _rates(self, right: Tensor, batch: Batch) -> Tensor:
        reached = torch.stack([batch.behind >= step for step in range(len(right))])
        return right.sum(dim=1) / reached.sum(dim=1).clamp(min=1)


def learning_rate_ratio(step: int, num_steps: int) -> float:
    """Return the share of the peak learning rate that a step has: a rise, then a half turn of a cosine."""
    warm_up = max(1, round(_WARM_UP_RATIO * num_steps))
    if step < warm_up:
        return (step + 1) / warm_up
    turn = min(1.0, (step - warm_up) / max(1, num_steps - warm_up))
    return _LAST_RATIO + (1 - _LAST_RATIO) * 0.5 * (1 + math.cos(math.pi * turn))


def rounds(right: np.ndarray[Any, np.dtype[np.bool_]]) -> list[tuple[int, int]]:
    """Return how many drafts each round along one answer tries and gets right.

    `right` [drafts, entries]: the draft for `entry`'s next token, that many steps on, is right. A round from
    an entry on goes as far as its drafts are right, and one token more; the next begins there.
    """
    num_drafts, num_entries = right.shape
    found, entry = [], 0
    while entry < num_entries:
        num_tried = min(num_drafts, num_entries - entry)
        num_right = 0
        while num_right < num_tried and right[num_right, entry + num_right]:
            num_right += 1
        found.append((num_tried, num_right))
        entry += num_right + 1
    return found
