"""Drafts change no distribution: many thousand draws over a small vocabulary say so, and notice a bias."""

import math

import numpy as np
import pytest
import torch

from workers.engine.copies import InlineCopies
from workers.engine.sampled import Sampled
from workers.engine.sampler import Sampler
from workers.plan import OpenSlot
from workers.protocol import SamplingParams
from workers.speculative.acceptance import Verified, VerifiedRows, choose, count_right

VOCAB_SIZE = 8
NUM_DRAWS = 20_000
NUM_SLOTS = 500
ANSWER_LEN = 3
PROMPT = [1, 5]
MAX_SIGMAS = 5.0
"""A statistic of chi-squared with n degrees of freedom has mean n and deviation sqrt(2 n)."""

# The model: the logits behind each token.
LOGITS = torch.randn(VOCAB_SIZE, VOCAB_SIZE, generator=torch.Generator().manual_seed(3)) * 1.2

SAMPLINGS = {
    "plain": SamplingParams(),
    "temperature": SamplingParams(temperature=0.6),
    "top-p": SamplingParams(temperature=1.3, top_p=0.8),
    "top-k": SamplingParams(top_k=3),
    "penalties": SamplingParams(frequency_penalty=0.9, presence_penalty=0.4, repetition_penalty=1.4),
}


class Biased(Sampler):
    """Takes the likeliest token, which is the draft's, wherever it is likely at all."""

    def sample(self, logits, slots, positions):
        found = super().sample(logits, slots, positions)
        p, likeliest = torch.softmax(logits.float(), -1).max(-1)
        return Sampled(torch.where(p > 0.1, likeliest, found.token_ids), found.logprobs)


def drafts_behind(token_id, num_drafts):
    """The likeliest continuation, as a good draft guesses it."""
    drafts = []
    for _ in range(num_drafts):
        token_id = int(LOGITS[token_id].argmax())
        drafts.append(token_id)
    return drafts


def draw(sampling, num_drafts, first_seed, kind=Sampler, count=count_right):
    """Return NUM_DRAWS answers of ANSWER_LEN tokens, in rounds that verify `num_drafts` drafts."""
    answers = []
    for base in range(0, NUM_DRAWS, NUM_SLOTS):
        sampler = kind(VOCAB_SIZE, NUM_SLOTS, "cpu", InlineCopies())
        for slot in range(NUM_SLOTS):
            sampler.open(OpenSlot(slot, sampling, first_seed + base + slot, len(PROMPT), PROMPT))
        texts = [list(PROMPT) for _ in range(NUM_SLOTS)]
        while going := [slot for slot, text in enumerate(texts) if len(text) < len(PROMPT) + ANSWER_LEN]:
            ends = np.array([len(texts[slot]) for slot in going])
            nums = np.minimum(num_drafts, len(PROMPT) + ANSWER_LEN - ends - 1)
            drafts = torch.tensor([drafts_behind(texts[slot][-1], num_drafts) for slot in going]).long()
            drafts = drafts.view(len(going), num_drafts)
            rows = VerifiedRows(np.array(going), ends, nums)
            guessed = zip(going, nums, drafts.tolist(), strict=True)
            tokens = [token for slot, num, row in guessed for token in (texts[slot][-1], *row[:num])]
            of_slots = torch.zeros(NUM_SLOTS, num_drafts, dtype=torch.int64)
            of_slots[torch.tensor(going)] = drafts
            choices = choose(sampler, LOGITS[tokens], rows, of_slots, InlineCopies())
            num_right = count(choices.token_ids, drafts, torch.from_numpy(nums))
            verified = Verified(num_right, choices)
            found = iter(verified.read()[0])
            for slot, num in zip(going, verified.num_tokens, strict=True):
                texts[slot] += [next(found) for _ in range(num)]
        answers += [tuple(text[len(PROMPT) :]) for text in texts]
    return answers


def distance(found, expected):
    """Return how many deviations the counts of two samples of one size are apart, by chi-squared."""
    kinds = sorted({*found, *expected})
    counts = np.array([[sample.count(kind) for kind in kinds] for sample in (found, expected)], dtype=float)
    # Rare answers together: the approximation wants ten or so.
    is_rare = counts.sum(axis=0) < 20
    counts = np.hstack([counts[:, ~is_rare], counts[:, is_rare].sum(axis=1, keepdims=True)])
    counts = counts[:, counts.sum(axis=0) > 0]
    statistic = ((counts[0] - counts[1]) ** 2 / counts.sum(axis=0)).sum()
    degrees = counts.shape[1] - 1
    return (statistic - degrees) / math.sqrt(2 * degrees)


@pytest.mark.parametrize("name", SAMPLINGS)
def test_answers_have_the_distribution_of_those_without_drafts(name):
    sampling = SAMPLINGS[name]
    plain = draw(sampling, 0, first_seed=1)
    assert len(plain) == NUM_DRAWS
    assert abs(distance(draw(sampling, 2, first_seed=1_000_001), plain)) < MAX_SIGMAS


@pytest.mark.parametrize("name", SAMPLINGS)
def test_a_biased_acceptance_is_found_out(name):
    sampling = SAMPLINGS[name]
    plain = draw(sampling, 0, first_seed=1)
    assert distance(draw(sampling, 2, first_seed=1_000_001, kind=Biased), plain) > 10 * MAX_SIGMAS


def believes_the_first(token_ids, drafts, num_drafts):
    """Takes a row's first draft as right whatever the target chose."""
    chosen = token_ids.clone()
    if drafts.shape[1]:
        chosen[:, :1] = torch.where(num_drafts[:, None] > 0, drafts[:, :1], chosen[:, :1])
    token_ids.copy_(chosen)
    return count_right(token_ids, drafts, num_drafts)


# With penalties nothing is chosen behind the first wrong draft.
@pytest.mark.parametrize("name", sorted(SAMPLINGS.keys() - {"penalties"}))
def test_a_draft_that_is_believed_is_found_out(name):
    sampling = SAMPLINGS[name]
    plain = draw(sampling, 0, first_seed=1)
    found = draw(sampling, 2, first_seed=1_000_001, count=believes_the_first)
    assert distance(found, plain) > 10 * MAX_SIGMAS


@pytest.mark.parametrize("name", SAMPLINGS)
def test_each_seeds_answer_is_the_very_same(name):
    assert draw(SAMPLINGS[name], 2, first_seed=7) == draw(SAMPLINGS[name], 0, first_seed=7)
