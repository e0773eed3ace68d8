"""CudaRows: rows of random KV in a poisoned pool on the card, their batch, and what it should come to."""

import numpy as np
import torch

from workers.attention.backend import AttentionLayer
from workers.attention.flashinfer import FlashInferAttention
from workers.attention.flashinfer_kernels import FlashInferKernels, HeadShape
from workers.attention.reference import ReferenceAttention
from workers.engine.copies import CudaCopies
from workers.engine.forward_batch import ForwardBatch
from workers.engine.mechanisms import ALL_ON, Mechanisms
from workers.kvcache.kv_pool import KVPool
from workers.kvcache.layout import ElementType, target_only
from workers.speculative.tree import MAX_NODES

CUDA = torch.device("cuda")
MAX_ROWS, MAX_TOKENS = 16, 1024
# Rows of one token come first, as they are staged.
MIXES = {
    "decode": ([1, 5, 64, 65, 300, 3000], [1, 1, 1, 1, 1, 1]),
    "extend": ([7, 90, 300, 700], [7, 33, 290, 300]),
    "mixed": ([9, 128, 2000, 33, 70, 600], [1, 1, 1, 33, 6, 257]),
    "multi-token": ([9, 128, 33, 1000], [1, 3, 4, 6]),
}


class CudaRows:
    """`first_page`: rows' pages lie behind it."""

    def __init__(
        self,
        context_lens: list[int],
        query_lens: list[int],
        *,
        page_size: int = 16,
        num_heads: int = 4,
        num_kv_heads: int = 2,
        head_dim: int = 64,
        dtype: ElementType = "bfloat16",
        num_layers: int = 2,
        first_page: int = 1,
        seed: int = 0,
    ) -> None:
        random = np.random.default_rng(seed)
        num_columns = [-(-length // page_size) for length in context_lens]
        layout = target_only(num_layers, page_size, num_kv_heads, head_dim, dtype)
        self.pool = KVPool(layout, first_page + sum(num_columns), CUDA)
        self.pool.data[first_page:].fill_(0xFF)
        self.layer = AttentionLayer(1, num_heads, num_kv_heads, head_dim, head_dim**-0.5)
        free = (random.permutation(sum(num_columns)) + first_page).astype(np.int32)
        rows = np.zeros((len(context_lens), max(num_columns)), dtype=np.int32)
        locations, old_locations, taken = [], [], 0
        for row, (length, queries) in enumerate(zip(context_lens, query_lens, strict=True)):
            rows[row, : num_columns[row]] = free[taken : taken + num_columns[row]]
            taken += num_columns[row]
            places = np.arange(length)
            found = rows[row, places // page_size].astype(np.int64) * page_size + places % page_size
            old_locations += found[: length - queries].tolist()
            locations += found[length - queries :].tolist()
        self.old = torch.tensor(old_locations, dtype=torch.int64, device=CUDA)
        generator = torch.Generator(CUDA).manual_seed(seed)
        for half in self.pool.layer(1):
            values = torch.randn(len(old_locations), num_kv_heads, head_dim, device=CUDA, generator=generator)
            half[self.old // page_size, self.old % page_size] = values.to(half.dtype)
        # As the decoder hands them over: parts of one tensor.
        num_tokens = sum(query_lens)
        qkv = torch.randn(
            num_tokens, num_heads + 2 * num_kv_heads, head_dim, device=CUDA, generator=generator
        ).to(self.pool.layer(1)[0].dtype)
        self.q, self.k, self.v = qkv.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
        starts = np.cumsum([0, *query_lens]).astype(np.int32)
        lens = np.array(context_lens, dtype=np.int32)
        positions = [np.arange(n - m, n) for n, m in zip(context_lens, query_lens, strict=True)]
        self.batch = ForwardBatch(
            mode="mixed",
            bucket=None,
            num_real_rows=len(context_lens),
            num_samples=len(context_lens),
            token_ids=torch.zeros(num_tokens, dtype=torch.int64, device=CUDA),
            positions=torch.from_numpy(np.concatenate(positions)).to(CUDA),
            page_rows=torch.from_numpy(rows).to(CUDA),
            num_columns=torch.tensor(rows.shape[1:], dtype=torch.int32, device=CUDA),
            max_columns=rows.shape[1],
            query_starts=torch.from_numpy(starts).to(CUDA),
            slots=torch.arange(len(starts) - 1, device=CUDA),
            context_lens=torch.from_numpy(lens).to(CUDA),
            out_locations=torch.tensor(locations, device=CUDA),
            sample_indices=torch.from_numpy(starts[1:].astype(np.int64) - 1).to(CUDA),
            host_query_starts=starts,
            host_context_lens=lens,
        )

    def with_window(self, window: int | None) -> AttentionLayer:
        own = self.layer
        return AttentionLayer(
            own.index, own.num_heads, own.num_kv_heads, own.head_dim, own.scale, sliding_window=window
        )

    def attention(
        self, windows: tuple[int | None, ...] = (None,), mechanisms: Mechanisms = ALL_ON
    ) -> FlashInferAttention:
        own = self.layer
        shape = HeadShape(
            own.num_heads, own.num_kv_heads, own.head_dim, self.pool.page_size, self.pool.layer(0)[0].dtype
        )
        return FlashInferAttention(
            self.pool,
            [self.with_window(window) for window in windows],
            FlashInferKernels(shape, list(windows), CUDA),
            CudaCopies(CUDA),
            max_rows=MAX_ROWS,
            max_tokens=MAX_TOKENS,
            mechanisms=mechanisms,
            max_tree_tokens=MAX_NODES + 1,
        )

    def attend(self, attention: FlashInferAttention, window: int | None = None) -> torch.Tensor:
        attention.plan(self.batch)
        attention.begin()
        return attention.forward(self.with_window(window), self.q, self.k, self.v)

    def expected(self, window: int | None = None) -> torch.Tensor:
        """Return the reference's output, whether or not the new tokens are in the pool already."""
        reference = ReferenceAttention(self.pool)
        reference.plan(self.batch)
        return reference.forward(self.with_window(window), self.q, self.k, self.v)


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Weights are rounded to 8 bits (bfloat16) on their way to the second product."""
    torch.testing.assert_close(found.float(), expected.float(), rtol=2e-2, atol=2e-2)
