"""Trees of drafts: what is kept of a draft's guesses, what each node sees, and which path was right."""

import itertools

import pytest
import torch

from workers.engine.vocabulary_shard import VocabularyShard
from workers.parallel import TPGroup
from workers.speculative.tree import DEPTH, PARENT, VISIBLE, follow, guess, keep, right_path, visible

VOCAB = 12


def guesses_of(logits, scores, topk, group=None):
    """Return what a draft guesses whose logits [rows, nodes, VOCAB] these are, by the rank's part of them."""
    shard = VocabularyShard(VOCAB, group or TPGroup.single())
    own = logits[..., shard.first : shard.first + shard.num_tokens]
    found = shard.likeliest(own.flatten(0, 1), topk)
    return guess(*(each.view(*logits.shape[:2], topk) for each in found), scores)


def grow(topk, depth, num_rows=5, seed=0):
    """Grow trees under a draft whose guesses depend on the whole path; return them and its likelihoods."""
    known = {}

    def likelihoods(row, path):
        key = (row, *path)
        if key not in known:
            generator = torch.Generator().manual_seed(seed + hash(key) % 2**31)
            known[key] = torch.log_softmax(2 * torch.randn(VOCAB, generator=generator), dim=-1)
        return known[key]

    paths = [[()] for _ in range(num_rows)]
    scores = torch.zeros(num_rows, 1)
    depths, followed = [], []
    for number in range(depth):
        found = torch.stack([torch.stack([likelihoods(r, p) for p in of]) for r, of in enumerate(paths)])
        depths.append(guesses_of(found, scores, topk))
        if number < depth - 1:
            chosen = follow(depths[-1], topk)
            followed.append(chosen)
            scores = depths[-1].scores.gather(1, chosen)
            parents = depths[-1].parents.gather(1, chosen).tolist()
            tokens = depths[-1].token_ids.gather(1, chosen).tolist()
            paths = [
                [(*of[parent], token) for parent, token in zip(*each, strict=True)]
                for of, each in zip(paths, zip(parents, tokens, strict=True), strict=True)
            ]
    return keep(depths, followed, topk * depth), likelihoods


def texts_of(token_ids, fields):
    """Return the path of tokens to each node of one row, by its number."""
    texts = {0: ()}
    for number, (token, parent) in enumerate(zip(token_ids, fields[PARENT], strict=True), start=1):
        texts[number] = (*texts[parent], token)
    return texts


@pytest.mark.parametrize(("topk", "depth"), [(2, 1), (2, 3), (4, 2), (3, 5), (8, 7)])
def test_the_likeliest_nodes_are_kept_each_behind_its_parent(topk, depth):
    (token_ids, fields), likelihoods = grow(topk, depth)
    for row, (tokens, of) in enumerate(zip(token_ids.tolist(), fields.tolist(), strict=True)):
        texts = texts_of(tokens, of)
        assert len(set(texts.values())) == topk * depth + 1, "a node twice"
        assert [len(texts[n]) for n in range(1, len(texts))] == of[DEPTH]
        for number in range(1, len(texts)):
            assert of[PARENT][number - 1] < number
            seen = {n for n in range(len(texts)) if of[VISIBLE][number - 1] >> n & 1}
            assert seen == {n for n, text in texts.items() if text == texts[number][: len(text)]}
        chain = ()
        for _ in range(depth):  # the draft's first choice of its first choice
            chain = (*chain, int(likelihoods(row, chain).argmax()))
            assert chain in texts.values()
        # Of what the draft was asked, no node that is not there is likelier than one that is.
        score = {(): 0.0}
        for text in sorted(texts.values(), key=len):
            for token, gain in enumerate(likelihoods(row, text).tolist() if len(text) < depth else ()):
                score[*text, token] = score.get(text, -1e9) + gain
        least = min(score[text] for text in texts.values() if text and text != chain[: len(text)])
        firsts = sorted((score[token,] for token in range(VOCAB)), reverse=True)[:topk]
        kept = {text for text in texts.values() if len(text) == 1}
        assert all(
            score[token,] <= max(least, firsts[-1]) + 1e-3 for token in range(VOCAB) if (token,) not in kept
        )


def test_of_equal_guesses_the_parent_is_kept():
    """A draft that is certain of all that it says: its continuations are as likely as what they continue."""
    certain = torch.full((1, 1, VOCAB), -50.0)
    certain[..., 3] = 0.0
    first = guesses_of(certain, torch.zeros(1, 1), 2)
    chosen = follow(first, 2)
    second = guesses_of(certain.expand(1, 2, VOCAB), first.scores.gather(1, chosen), 2)
    token_ids, fields = keep([first, second], [chosen], 4)
    assert {(3,), (3, 3)} <= set(texts_of(token_ids[0].tolist(), fields[0].tolist()).values())


@pytest.mark.parametrize("others", [-torch.inf, torch.nan])
@pytest.mark.parametrize("topk", [2, 4])
def test_of_a_draft_whose_guesses_are_no_numbers_each_node_is_behind_its_parent(others, topk):
    """One token is certain, what is said of the others cannot be compared; of some nodes nothing is said."""
    random = torch.Generator().manual_seed(topk)

    def likelihoods(num_nodes):
        found = torch.full((8, num_nodes, VOCAB), others)
        found[..., 3] = 0.0
        found[torch.rand(8, num_nodes, generator=random) < 0.3] = torch.nan
        return found

    depths, followed = [guesses_of(likelihoods(1), torch.zeros(8, 1), topk)], []
    for _ in range(3):
        followed.append(follow(depths[-1], topk))
        depths.append(guesses_of(likelihoods(topk), depths[-1].scores.gather(1, followed[-1]), topk))
    _, fields = keep(depths, followed, 4 * topk)
    for parents, node_depths, _ in fields.tolist():
        assert max(node_depths) == 4, "its chain is there"
        assert all(parent <= number for number, parent in enumerate(parents))
        assert node_depths == [1 + (node_depths[parent - 1] if parent else 0) for parent in parents]


def test_a_chain_sees_all_before_it():
    parents = torch.arange(20)[None]
    assert visible(parents, 20).tolist() == [[(1 << number + 2) - 1 for number in range(20)]]


@pytest.mark.parametrize("seed", range(20))
def test_the_right_path_is_what_a_walk_finds(seed):
    (token_ids, fields), _ = grow(3, 4, num_rows=8, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    num_nodes = token_ids.shape[1]
    chosen = torch.randint(0, VOCAB, (8, num_nodes + 1), generator=generator)
    for row, number in itertools.product(range(8), range(num_nodes + 1)):  # most choices are some child's
        children = (fields[row, PARENT] == number).nonzero().view(-1)
        if len(children) and torch.rand((), generator=generator) < 0.8:
            pick = int(torch.randint(0, len(children), (), generator=generator))
            chosen[row, number] = token_ids[row, children[pick]]
    num_drafts = torch.randint(0, num_nodes + 1, (8,), generator=generator)
    num_right, path = right_path(chosen, token_ids, fields, num_drafts)
    for row in range(8):
        walked, at = [], 0
        while True:
            following = [
                n + 1
                for n in range(int(num_drafts[row]))
                if int(fields[row, PARENT, n]) == at and int(token_ids[row, n]) == int(chosen[row, at])
            ]
            if not following:
                break
            (at,) = following
            walked.append(at)
        assert path[row].tolist() == walked + [0] * (num_nodes - len(walked))
        assert int(num_right[row]) == len(walked)
