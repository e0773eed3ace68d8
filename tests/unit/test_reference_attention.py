"""ReferenceAttention against a dense computation over contiguous keys and values."""

import numpy as np
import pytest
import torch

from workers.attention.backend import AttentionLayer
from workers.attention.reference import ReferenceAttention
from workers.engine.forward_batch import ForwardBatch
from workers.kvcache.kv_pool import KVPool
from workers.kvcache.layout import target_only

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 6, 2, 16
CPU = torch.device("cpu")


class PagedRows:
    """Rows of random KV in a poisoned pool, and the same values contiguous."""

    def __init__(self, context_lens: list[int], query_lens: list[int], page_size: int, seed: int = 0) -> None:
        random = torch.Generator().manual_seed(seed)
        num_columns = [-(-length // page_size) for length in context_lens]
        self.pool = KVPool(
            target_only(2, page_size, NUM_KV_HEADS, HEAD_DIM, "float32"), sum(num_columns) + 2, CPU
        )
        self.pool.poison_all()
        free = torch.randperm(sum(num_columns), generator=random).add(1).tolist()
        self.context_lens, self.query_lens = context_lens, query_lens
        rows = np.zeros((len(context_lens), max(num_columns)), dtype=np.int32)
        shape = (NUM_KV_HEADS, HEAD_DIM)
        self.k = [torch.randn(n, *shape, generator=random) for n in context_lens]
        self.v = [torch.randn(n, *shape, generator=random) for n in context_lens]
        self.q = [torch.randn(n, NUM_HEADS, HEAD_DIM, generator=random) for n in query_lens]
        locations = []
        for row, (length, queries) in enumerate(zip(context_lens, query_lens, strict=True)):
            rows[row, : num_columns[row]] = [free.pop() for _ in range(num_columns[row])]
            places = np.arange(length)
            found = rows[row, places // page_size].astype(np.int64) * page_size + places % page_size
            self._write(torch.from_numpy(found[: length - queries]), row)
            locations += found[length - queries :].tolist()
        starts = np.cumsum([0, *query_lens]).astype(np.int32)
        lens = np.array(context_lens, dtype=np.int32)
        positions = [torch.arange(n - m, n) for n, m in zip(context_lens, query_lens, strict=True)]
        self.batch = ForwardBatch(
            mode="mixed",
            bucket=None,
            num_real_rows=len(context_lens),
            num_samples=len(context_lens),
            token_ids=torch.zeros(sum(query_lens), dtype=torch.int64),
            positions=torch.cat(positions),
            page_rows=torch.from_numpy(rows),
            num_columns=torch.tensor(rows.shape[1:], dtype=torch.int32),
            max_columns=rows.shape[1],
            query_starts=torch.from_numpy(starts),
            slots=torch.arange(len(starts) - 1),
            context_lens=torch.from_numpy(lens),
            out_locations=torch.tensor(locations),
            sample_indices=torch.from_numpy(starts[1:].astype(np.int64) - 1),
            host_query_starts=starts,
            host_context_lens=lens,
        )

    def _write(self, locations: torch.Tensor, row: int) -> None:
        page_size = self.pool.page_size
        for pool, own in zip(self.pool.layer(1), (self.k, self.v), strict=True):
            pool[locations // page_size, locations % page_size] = own[row][: len(locations)]

    def replace_row(self, other: "PagedRows") -> None:
        """Give row 0 the values of other's row 0, of the same length."""
        for mine, theirs in ((self.k, other.k), (self.v, other.v), (self.q, other.q)):
            mine[0] = theirs[0]
        places = torch.arange(self.context_lens[0] - self.query_lens[0])
        pages = self.batch.page_rows[0, places // self.pool.page_size].long()
        self._write(pages * self.pool.page_size + places % self.pool.page_size, 0)

    def attend(self, window: int | None) -> torch.Tensor:
        backend = ReferenceAttention(self.pool)
        backend.plan(self.batch)
        return backend.forward(layer(window), *self.new_tokens())

    def new_tokens(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return q, k and v of the batch's tokens."""
        k, v = (
            torch.cat([own[r][self.context_lens[r] - self.query_lens[r] :] for r in range(len(own))])
            for own in (self.k, self.v)
        )
        return torch.cat(self.q), k, v

    def dense(self, row: int, window: int | None) -> torch.Tensor:
        queries, keys = self.query_lens[row], self.context_lens[row]
        k = self.k[row].repeat_interleave(NUM_HEADS // NUM_KV_HEADS, dim=1).double()
        v = self.v[row].repeat_interleave(NUM_HEADS // NUM_KV_HEADS, dim=1).double()
        out = torch.zeros(queries, NUM_HEADS, HEAD_DIM, dtype=torch.float64)
        for i in range(queries):
            last = keys - queries + i
            first = 0 if window is None else max(0, last - window + 1)
            scores = torch.einsum("hd,khd->hk", self.q[row][i].double(), k[first : last + 1])
            weights = torch.softmax(scores * HEAD_DIM**-0.5, dim=-1)
            out[i] = torch.einsum("hk,khd->hd", weights, v[first : last + 1])
        return out.flatten(1)


def layer(window: int | None) -> AttentionLayer:
    return AttentionLayer(1, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, HEAD_DIM**-0.5, window)


MIXES = {
    "decode": ([1, 5, 64, 65, 300], [1, 1, 1, 1, 1]),
    "extend": ([7, 90, 300], [7, 33, 290]),
    "mixed": ([9, 33, 70, 128], [1, 33, 6, 1]),
}


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("window", [None, 1, 8, 100])
@pytest.mark.parametrize("mix", MIXES)
def test_equals_dense_attention_over_poisoned_pages(mix: str, window: int | None, page_size: int) -> None:
    rows = PagedRows(*MIXES[mix], page_size)
    out = rows.attend(window).split(rows.query_lens)
    for row, found in enumerate(out):
        torch.testing.assert_close(found.double(), rows.dense(row, window), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("row", [(300, 1), (40, 1), (120, 30)])
@pytest.mark.parametrize("others", [([500], [1]), ([64, 2, 90], [1, 2, 50])])
def test_a_row_does_not_depend_on_its_neighbours(
    row: tuple[int, int], others: tuple[list[int], list[int]]
) -> None:
    alone = PagedRows([row[0]], [row[1]], 16, seed=3)
    both = PagedRows([row[0], *others[0]], [row[1], *others[1]], 16, seed=4)
    both.replace_row(alone)
    # Not bit for bit: a batched matmul chooses its kernel by the size of the batch.
    torch.testing.assert_close(both.attend(None)[: row[1]], alone.attend(None), rtol=0, atol=1e-6)


def test_writes_only_the_batch_s_own_places() -> None:
    rows = PagedRows([20, 33], [1, 2], 16)
    before = rows.pool.data.clone()
    rows.attend(None)
    changed = (rows.pool.data != before).view(rows.pool.num_pages + 1, -1).any(dim=1)
    written = rows.batch.out_locations // 16
    assert set(changed.nonzero().flatten().tolist()) == set(written.tolist())
    k, v = rows.pool.layer(1)
    for row in (0, 1):
        last = rows.batch.out_locations[rows.batch.sample_indices[row]]
        assert torch.equal(k[last // 16, last % 16], rows.k[row][-1])
        assert torch.equal(v[last // 16, last % 16], rows.v[row][-1])


def test_bfloat16_stays_near_float32() -> None:
    rows = PagedRows([70], [1], 16)
    exact = rows.attend(None)
    pool = KVPool(target_only(2, 16, NUM_KV_HEADS, HEAD_DIM, "bfloat16"), rows.pool.num_pages, CPU)
    for low, high in zip(pool.layer(1), rows.pool.layer(1), strict=True):
        low.copy_(high)
    backend = ReferenceAttention(pool)
    backend.plan(rows.batch)
    q, k, v = (own[0][-1:].bfloat16() for own in (rows.q, rows.k, rows.v))
    found = backend.forward(layer(None), q, k, v)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), exact, rtol=3e-2, atol=3e-2)
