"""Trees of drafts change no distribution either, and a bias towards their nodes is noticed."""

import numpy as np
import pytest
import torch

from tests.unit.test_acceptance import (
    ANSWER_LEN,
    LOGITS,
    MAX_SIGMAS,
    NUM_DRAWS,
    NUM_SLOTS,
    PROMPT,
    SAMPLINGS,
    VOCAB_SIZE,
    Biased,
    distance,
    draw,
)
from workers.engine.copies import InlineCopies
from workers.engine.sampler import Sampler
from workers.plan import OpenSlot
from workers.speculative.acceptance import HostTrees, Verified, VerifiedRows, choose
from workers.speculative.tree import right_path, visible

#: own -+- 1 -+- 3
#:      |     +- 4
#:      +- 2 --- 5      each the likeliest and the second likeliest behind its parent
PARENTS, CHOICES = [0, 0, 1, 1, 2], [0, 1, 0, 1, 0]
NUM_NODES = len(PARENTS)


def tree_behind(token_id):
    """Return a tree's tokens, and those of its numbers, the own token first."""
    tokens = [token_id]
    for parent, choice in zip(PARENTS, CHOICES, strict=True):
        ranked = LOGITS[tokens[parent]].argsort(descending=True)
        tokens.append(int(ranked[choice]))
    return tokens


def fields():
    parents = torch.tensor([PARENTS])
    depths = torch.tensor([[1, 1, 2, 2, 2]])
    return torch.stack([parents, depths, visible(parents, 2)], dim=1).expand(NUM_SLOTS, -1, -1)


def draw_with_trees(sampling, first_seed, kind=Sampler, path_of=right_path):
    """As `draw`, in rounds that verify trees of NUM_NODES."""
    answers = []
    for base in range(0, NUM_DRAWS, NUM_SLOTS):
        sampler = kind(VOCAB_SIZE, NUM_SLOTS, "cpu", InlineCopies())
        for slot in range(NUM_SLOTS):
            sampler.open(OpenSlot(slot, sampling, first_seed + base + slot, len(PROMPT), PROMPT))
        texts = [list(PROMPT) for _ in range(NUM_SLOTS)]
        while going := [slot for slot, text in enumerate(texts) if len(text) < len(PROMPT) + ANSWER_LEN]:
            trees = [tree_behind(texts[slot][-1]) for slot in going]
            drafts = torch.zeros(NUM_SLOTS, NUM_NODES, dtype=torch.int64)
            drafts[going] = torch.tensor(trees)[:, 1:]
            nums = np.full(len(going), NUM_NODES)
            rows = VerifiedRows(np.array(going), np.array([len(texts[slot]) for slot in going]), nums)
            logits = LOGITS[[token for tree in trees for token in tree]]
            given = HostTrees(drafts, fields(), None)
            choices = choose(sampler, logits, rows, drafts, InlineCopies(), given)
            right = path_of(choices.token_ids, drafts[going], fields()[going], torch.from_numpy(nums))
            verified = Verified(right[0], choices, right[1])
            found = iter(verified.read()[0])
            for slot, num in zip(going, verified.num_tokens, strict=True):
                texts[slot] += [next(found) for _ in range(num)]
        answers += [tuple(text[len(PROMPT) : len(PROMPT) + ANSWER_LEN]) for text in texts]
    return answers


@pytest.mark.parametrize("name", ["plain", "penalties"])
def test_answers_have_the_distribution_of_those_without_drafts(name):
    plain = draw(SAMPLINGS[name], 0, first_seed=1)
    assert abs(distance(draw_with_trees(SAMPLINGS[name], first_seed=1_000_001), plain)) < MAX_SIGMAS


@pytest.mark.parametrize("name", SAMPLINGS)
def test_each_seeds_answer_is_the_very_same(name):
    assert draw_with_trees(SAMPLINGS[name], first_seed=7) == draw(SAMPLINGS[name], 0, first_seed=7)


def test_a_biased_acceptance_is_found_out():
    plain = draw(SAMPLINGS["plain"], 0, first_seed=1)
    found = draw_with_trees(SAMPLINGS["plain"], first_seed=1_000_001, kind=Biased)
    assert distance(found, plain) > 10 * MAX_SIGMAS


def test_a_node_that_is_believed_is_found_out():
    def believes_the_second(chosen, drafts, fields, num_drafts):
        """Takes node 2 as right wherever node 1 is wrong."""
        chosen[:, 0] = torch.where(chosen[:, 0] == drafts[:, 0], chosen[:, 0], drafts[:, 1])
        return right_path(chosen, drafts, fields, num_drafts)

    plain = draw(SAMPLINGS["plain"], 0, first_seed=1)
    found = draw_with_trees(SAMPLINGS["plain"], first_seed=1_000_001, path_of=believes_the_second)
    assert distance(found, plain) > 10 * MAX_SIGMAS
