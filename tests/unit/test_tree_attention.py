"""Attention over rows that end in trees: each token sees what is before the tree, its path and itself."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.unit.flashinfer_fakes import FakeLibrary
from tests.unit.test_reference_attention import HEAD_DIM, NUM_HEADS, NUM_KV_HEADS, PagedRows, layer
from workers.attention.flashinfer import FlashInferAttention
from workers.attention.flashinfer_kernels import HeadShape
from workers.attention.native import NativeAttention
from workers.attention.reference import ReferenceAttention
from workers.engine.copies import InlineCopies
from workers.engine.forward_batch import TokenTree
from workers.native.kernels import NativeKernels
from workers.speculative.tree import visible

MAX_NODES = 62
#: context_lens and query_lens, and numbers of the row before those of its tokens
CASES = {
    "verify": ([9, 40, 64, 130, 700], [1, 7, 21, 63, 40], 0),
    "draft": ([70, 75, 530, 77], [4, 4, 4, 4], 9),
}


def draw_tree(num_numbers: int, seed: int) -> tuple[np.ndarray, list[int]]:
    """Return the words that a random tree's numbers see, and their depths; number 0 sees itself."""
    random = np.random.default_rng(seed)
    parents = np.array([random.integers(0, number + 1) for number in range(num_numbers - 1)], dtype=np.int64)
    depths = [0]
    for parent in parents:
        depths.append(depths[parent] + 1)
    words = visible(torch.from_numpy(parents)[None], num_numbers)[0].numpy()
    return np.concatenate([[1], words]), depths


def with_trees(rows: PagedRows, num_before: int) -> tuple[PagedRows, list[list[list[int]]]]:
    """Give rows trees; return the places that each of their tokens sees."""
    words, positions, seen = [], [], []
    for row, (length, queries) in enumerate(zip(rows.context_lens, rows.query_lens, strict=True)):
        own, depths = draw_tree(num_before + queries, row)
        first = length - queries - num_before
        words += own[num_before:].tolist()
        positions += [first + depth for depth in depths[num_before:]]
        seen.append(
            [
                [*range(first), *(first + n for n in range(num_before + queries) if int(word) >> n & 1)]
                for word in own[num_before:]
            ]
        )
    tree = TokenTree(torch.zeros(len(words), dtype=torch.int64), torch.tensor(words), num_before)
    rows.batch = replace(rows.batch, mode="verify", positions=torch.tensor(positions), tree=tree)
    return rows, seen


def expected(rows: PagedRows, seen: list[list[list[int]]], window: int | None) -> torch.Tensor:
    outs = []
    for row, tokens in enumerate(seen):
        k, v = (
            own[row].repeat_interleave(NUM_HEADS // NUM_KV_HEADS, dim=1).double() for own in (rows.k, rows.v)
        )
        first_token = int(rows.batch.query_starts[row])
        for token, places in enumerate(tokens):
            position = int(rows.batch.positions[first_token + token])
            kept = [place for place in places if window is None or place > position - window]
            scores = torch.einsum("hd,khd->hk", rows.q[row][token].double(), k[kept]) * HEAD_DIM**-0.5
            outs.append(torch.einsum("hk,khd->hd", torch.softmax(scores, dim=-1), v[kept]).flatten())
    return torch.stack(outs)


def flashinfer(pool):
    library = FakeLibrary(
        HeadShape(NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, pool.page_size, torch.float32), InlineCopies()
    )
    return FlashInferAttention(
        pool,
        [layer(None)],
        library,
        InlineCopies(),
        max_rows=8,
        max_tokens=400,
        max_tree_tokens=MAX_NODES + 1,
    )


@pytest.fixture(scope="module")
def backends():
    kernels = NativeKernels.load()
    return {
        "reference": ReferenceAttention,
        "native": lambda pool: NativeAttention(pool, kernels),
        "flashinfer": flashinfer,
    }


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("backend", "window"),
    [("reference", None), ("native", None), ("flashinfer", None), ("reference", 90), ("native", 90)],
)
def test_tokens_see_their_paths(backends, backend, window, case, page_size):
    context_lens, query_lens, num_before = CASES[case]
    rows, seen = with_trees(PagedRows(context_lens, query_lens, page_size), num_before)
    attention = backends[backend](rows.pool)
    attention.plan(rows.batch)
    attention.begin()
    found = attention.forward(layer(window), *rows.new_tokens())
    torch.testing.assert_close(found.double(), expected(rows, seen, window), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "native", "flashinfer"])
def test_passes_read_their_lengths_and_trees_when_they_begin(backends, backend):
    """Over a context of which the host knows no more than the number of its rows."""
    context_lens, query_lens, num_before = CASES["draft"]
    rows, seen = with_trees(PagedRows(context_lens, query_lens, 4), num_before)
    known = replace(
        rows.batch,
        context_lens=rows.batch.context_lens.clone().fill_(4),
        host_context_lens=np.full(len(query_lens), 4, dtype=np.int32),
        tree=replace(rows.batch.tree, visible=torch.full_like(rows.batch.tree.visible, -1)),
    )
    attention = backends[backend](rows.pool).for_passes(known)
    known.context_lens.copy_(rows.batch.context_lens)
    known.tree.visible.copy_(rows.batch.tree.visible)
    attention.begin()
    found = attention.forward(layer(None), *rows.new_tokens())
    torch.testing.assert_close(found.double(), expected(rows, seen, None), rtol=1e-4, atol=1e-5)


def test_a_token_that_saw_all_of_its_row_would_be_found_out(backends):
    context_lens, query_lens, num_before = CASES["verify"]
    rows, seen = with_trees(PagedRows(context_lens, query_lens, 16), num_before)
    blind = replace(rows.batch, tree=None)
    attention = backends["native"](rows.pool)
    attention.plan(blind)
    found = attention.forward(layer(None), *rows.new_tokens()).double()
    assert not torch.allclose(found, expected(rows, seen, None), rtol=1e-2, atol=1e-2)
