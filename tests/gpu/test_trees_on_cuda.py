"""FlashInfer's attention under a tree's mask against the reference, over poisoned pages, as a graph too."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.gpu.cuda_rows import CUDA, CudaRows, assert_near
from tests.unit.test_tree_attention import draw_tree
from workers.attention.flashinfer import FlashInferAttention
from workers.engine.forward_batch import TokenTree
from workers.triton_kernels.choice import cuda_kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(900),
]

#: context_lens and query_lens, and numbers of the row before those of its tokens
CASES = {
    "verify": ([9, 40, 64, 130, 3000], [1, 7, 21, 63, 40], 0),
    "draft": ([70, 75, 2530, 77], [4, 4, 4, 4], 9),
    "wide draft": ([170, 75, 1530], [8, 8, 8], 33),
}


def with_trees(case: str, page_size: int, head_dim: int = 64, seed: int = 0) -> CudaRows:
    context_lens, query_lens, num_before = CASES[case]
    rows = CudaRows(context_lens, query_lens, page_size=page_size, head_dim=head_dim, seed=seed)
    words, positions = [], []
    for row, (length, queries) in enumerate(zip(context_lens, query_lens, strict=True)):
        own, depths = draw_tree(num_before + queries, row + 100 * seed)
        words += own[num_before:].tolist()
        positions += [length - queries - num_before + depth for depth in depths[num_before:]]
    tree = TokenTree(
        torch.zeros(len(words), dtype=torch.int64, device=CUDA), torch.tensor(words, device=CUDA), num_before
    )
    rows.batch = replace(rows.batch, mode="verify", positions=torch.tensor(positions, device=CUDA), tree=tree)
    return rows


def attention_of(rows: CudaRows, *, is_compiled: bool) -> FlashInferAttention:
    """Return attention that packs masks by Triton's kernel, or by torch."""
    attention = rows.attention()
    if is_compiled:
        own = cuda_kernels(CUDA, torch.bfloat16)
        assert own is not None
        attention._pool_kernels = own
    return attention


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("case", CASES)
def test_tokens_see_their_paths(case: str, page_size: int, head_dim: int, is_compiled: bool) -> None:
    rows = with_trees(case, page_size, head_dim)
    found = rows.attend(attention_of(rows, is_compiled=is_compiled))
    assert_near(found, rows.expected())
    rows.batch = replace(rows.batch, tree=None)
    assert (found.float() - rows.expected().float()).abs().max() > 0.1, "a mask of nothing would do"


@pytest.mark.parametrize("case", ["draft", "wide draft"])
def test_passes_that_were_captured_read_trees_and_lengths_when_they_are_replayed(case: str) -> None:
    rows, other = with_trees(case, 16), with_trees(case, 16, seed=1)
    lens = np.diff(rows.batch.host_query_starts)  # all that the host knows of contexts
    attention = attention_of(rows, is_compiled=True).for_passes(replace(rows.batch, host_context_lens=lens))

    def attend() -> torch.Tensor:
        attention.begin()
        return attention.forward(rows.layer, rows.q, rows.k, rows.v)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        attend()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend()
    for shift in (0, 5):  # with other trees over contexts that are shorter
        if shift:
            assert rows.batch.tree is not None and other.batch.tree is not None
            rows.batch.tree.visible.copy_(other.batch.tree.visible)
            rows.batch.context_lens.sub_(shift)
            rows.batch.out_locations.copy_(shifted(rows, shift))
            rows.batch = replace(rows.batch, host_context_lens=rows.batch.host_context_lens - shift)
        graph.replay()
        assert_near(out, rows.expected())


def shifted(rows: CudaRows, shift: int) -> torch.Tensor:
    """Return where the rows' tokens are, so many places earlier."""
    batch, places = rows.batch, []
    for row, (length, first) in enumerate(
        zip(batch.host_context_lens.tolist(), batch.host_query_starts.tolist(), strict=False)
    ):
        queries = int(batch.host_query_starts[row + 1]) - first
        for place in range(length - shift - queries, length - shift):
            places.append(int(batch.page_rows[row, place // 16]) * 16 + place % 16)
    return torch.tensor(places, device=CUDA)
