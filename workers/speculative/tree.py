"""Trees of drafts: how one grows from a draft's guesses, and which path through it was right. On the device.

The tokens of a row that verifies are numbered: 0 is its own, n its n-th node. A node comes behind its parent,
and one of depth d stands for the d-th token behind the row's own:

    number     0     1   2     3   4   5          own -+- 1 -+- 3
    parent           0   0     1   1   2               |     +- 4
    depth      0     1   1     2   2   2               +- 2 --- 5

As EAGLE-2 does (https://arxiv.org/abs/2406.16858): the likeliest continuations are followed at each depth,
and of all that were seen the likeliest are kept. Unlike there, the draft's first choice of its first choice
is always among them: a tree holds the chain of its depth, and finds no less right. A token's own path alone
counts: siblings never see each other, so a path is computed as the chain that it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_NODES = 62
"""What a token sees of its row's numbers fits into one word, whose sign is not used."""
PARENT, DEPTH, VISIBLE = range(3)
"""Of what is kept for each node beside its token. VISIBLE: the numbers that it sees, bit by bit."""
NUM_FIELDS = 3


@dataclass(frozen=True)
class Guesses:
    """The candidates of one depth, [rows, width] each. The first is the chain's."""

    token_ids: Tensor
    """int64"""
    scores: Tensor
    """float32: the logarithm of the likelihood of each one's path, at most that of what it continues"""
    parents: Tensor
    """int64: which of the nodes that were followed it continues"""


def guess(token_ids: Tensor, log_likelihoods: Tensor, scores: Tensor) -> Guesses:
    """Return the continuations of each node that was followed, in the draft's vocabulary.

    token_ids [rows, nodes, topk] int64, of each node the likeliest first, with log_likelihoods, float32, at
    most 0 and never NaN; scores [rows, nodes].
    """
    num_rows, num_nodes, topk = token_ids.shape
    paths = scores[:, :, None] + log_likelihoods
    parents = torch.arange(num_nodes * topk, device=scores.device) // topk
    return Guesses(
        token_ids.reshape(num_rows, -1), paths.view(num_rows, -1), parents.expand(num_rows, -1).contiguous()
    )


def follow(guesses: Guesses, topk: int) -> Tensor:
    """Return which candidates are followed at the next depth, [rows, topk] int64: the chain's, and then the
    likeliest, of equal ones the first."""
    return _chain_first(guesses.scores).sort(dim=1, descending=True, stable=True).indices[:, :topk]


def keep(depths: Sequence[Guesses], followed: Sequence[Tensor], num_nodes: int) -> tuple[Tensor, Tensor]:
    """Return of all candidates the likeliest as a tree: their tokens [rows, num_nodes] int64, in the draft's
    vocabulary, and their fields [rows, NUM_FIELDS, num_nodes] int64.

    `followed[d]` are those of depths[d] that were followed.
    """
    device = depths[0].scores.device
    widths = [each.scores.shape[1] for each in depths]
    scores = torch.cat([_chain_first(each.scores) for each in depths], dim=1)
    #   candidates  | of depth 1 | of depth 2 | ... |, parents before children; -1: the row's own token
    parents, first = [torch.full_like(depths[0].parents, -1)], 0
    for above, each, width in zip(followed, depths[1:], widths, strict=False):
        parents.append(first + above.gather(1, each.parents))
        first += width
    # Of equal ones the first: no node without its parent, however likely they are.
    ranked = scores.sort(dim=1, descending=True, stable=True).indices
    chosen = ranked[:, :num_nodes].sort(dim=1).values
    of_candidate = torch.cat([torch.full((width,), d + 1, device=device) for d, width in enumerate(widths)])
    token_ids = torch.cat([each.token_ids for each in depths], dim=1).gather(1, chosen)
    above = torch.cat(parents, dim=1).gather(1, chosen)
    parent = (torch.searchsorted(chosen, above.contiguous()) + 1) * (above >= 0)
    fields = torch.stack([parent, of_candidate[chosen], visible(parent, len(depths))], dim=1)
    return token_ids, fields


def visible(parents: Tensor, max_depth: int) -> Tensor:
    """Return the numbers that each node sees, its own and its path's down to 0, as bits: like parents
    [rows, nodes] int64, of which none is deeper than `max_depth`."""
    num_rows, num_nodes = parents.shape
    numbers = torch.arange(num_nodes + 1, device=parents.device)
    bits = (torch.ones_like(numbers) << numbers).expand(num_rows, -1)
    above = torch.cat([torch.zeros_like(parents[:, :1]), parents], dim=1)
    for _ in range(max_depth.bit_length()):  # each time twice as far
        bits = bits | bits.gather(1, above)
        above = above.gather(1, above)
    return bits[:, 1:]


def right_path(chosen: Tensor, drafts: Tensor, fields: Tensor, num_drafts: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many nodes of each row are on the path that the target takes, [rows] int64, and their
    numbers in order, like drafts; 0 behind the last.

    chosen [rows, nodes + 1] int64 is what the target chooses behind each number, drafts [rows, nodes] int64,
    fields [rows, NUM_FIELDS, nodes] int64; num_drafts [rows] int64: nodes of each row that count.
    """
    num_nodes = drafts.shape[1]
    numbers = torch.arange(1, num_nodes + 1, device=drafts.device)
    is_right = chosen.gather(1, fields[:, PARENT]) == drafts
    is_right &= numbers <= num_drafts[:, None]
    wrong = (~is_right).long().mul(torch.ones_like(numbers) << numbers).sum(dim=1, keepdim=True)
    is_on_path = is_right & (fields[:, VISIBLE] & wrong == 0)
    path = torch.where(is_on_path, numbers, num_nodes + 1).sort(dim=1).values
    return is_on_path.sum(dim=1), path * (path <= num_nodes)


def _chain_first(scores: Tensor) -> Tensor:
    """Return the scores of one depth's candidates with the chain's above all others."""
    return torch.cat([torch.full_like(scores[:, :1], torch.inf), scores[:, 1:]], dim=1)
