"""NativeAttention against the reference backend, over the same poisoned pages."""

import mmap
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from workers.attention.backend import AttentionLayer
from workers.attention.native import NativeAttention
from workers.attention.reference import ReferenceAttention
from workers.engine.forward_batch import ForwardBatch
from workers.kvcache.kv_pool import KVPool
from workers.kvcache.layout import target_only
from workers.native.kernels import NativeKernels

CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-2}


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that share their cores with other tests mostly wait for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def kernels():
    return NativeKernels.load()


@dataclass
class Case:
    batch: ForwardBatch
    pool: KVPool
    layer: AttentionLayer
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    def attend(self, backend_of):
        """The backend's result, and the pool it leaves."""
        pool = KVPool(self.pool.layout, self.pool.num_pages, CPU)
        pool.data.copy_(self.pool.data)
        backend = backend_of(pool)
        backend.plan(self.batch)
        return backend.forward(self.layer, self.q, self.k, self.v), pool


def make_case(
    context_lens,
    query_lens,
    *,
    page_size=16,
    heads=(6, 2),
    head_dim=32,
    window=None,
    dtype="float32",
    seed=0,
    num_pages=None,
):
    """Rows over shuffled pages; everything nobody wrote is NaN."""
    random = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads = heads
    num_columns = [-(-length // page_size) for length in context_lens]
    num_pages = num_pages or sum(num_columns) + 1
    pool = KVPool(target_only(2, page_size, num_kv_heads, head_dim, dtype), num_pages, CPU)
    pool.poison_all()
    free = torch.randperm(num_pages, generator=random).add(1).tolist()
    rows = np.zeros((len(context_lens), max(num_columns)), dtype=np.int32)
    locations = []
    for row, (length, queries) in enumerate(zip(context_lens, query_lens, strict=True)):
        rows[row, : num_columns[row]] = [free.pop() for _ in range(num_columns[row])]
        places = np.arange(length)
        found = rows[row, places // page_size].astype(np.int64) * page_size + places % page_size
        written = torch.from_numpy(found[: length - queries])
        for part in pool.layer(1):
            part[written // page_size, written % page_size] = torch.randn(
                len(written), num_kv_heads, head_dim, generator=random
            ).to(DTYPES[dtype])
        locations += found[length - queries :].tolist()
    starts = np.cumsum([0, *query_lens]).astype(np.int32)
    lens = np.array(context_lens, dtype=np.int32)
    num_tokens = int(starts[-1])
    # As a fused projection leaves them: views of one tensor.
    qkv = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim, generator=random).to(DTYPES[dtype])
    return Case(
        ForwardBatch(
            mode="mixed",
            bucket=None,
            num_real_rows=len(context_lens),
            num_samples=len(context_lens),
            token_ids=torch.zeros(num_tokens, dtype=torch.int64),
            positions=torch.zeros(num_tokens, dtype=torch.int64),
            page_rows=torch.from_numpy(rows),
            num_columns=torch.zeros(1, dtype=torch.int32),
            max_columns=0,
            query_starts=torch.from_numpy(starts),
            slots=torch.arange(len(starts) - 1),
            context_lens=torch.from_numpy(lens),
            out_locations=torch.tensor(locations),
            sample_indices=torch.zeros(0, dtype=torch.int64),
            host_query_starts=starts,
            host_context_lens=lens,
        ),
        pool,
        AttentionLayer(1, num_heads, num_kv_heads, head_dim, head_dim**-0.5, window),
        qkv[:, :num_heads],
        qkv[:, num_heads : num_heads + num_kv_heads],
        qkv[:, num_heads + num_kv_heads :],
    )


def assert_equals_reference(case, kernels, dtype="float32"):
    found, pool = case.attend(lambda pool: NativeAttention(pool, kernels))
    expected, expected_pool = case.attend(ReferenceAttention)
    assert torch.equal(pool.data, expected_pool.data)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


MIXES = {
    "decode": ([1, 5, 64, 65, 300, 512, 513, 1300], [1] * 8),
    "extend": ([7, 90, 300, 1100], [7, 33, 290, 40]),
    "mixed": ([9, 33, 70, 128, 700], [1, 33, 2, 1, 3]),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("window", [None, 1, 8, 100, 600])
@pytest.mark.parametrize("mix", MIXES)
def test_equals_the_reference_over_poisoned_pages(kernels, mix, window, page_size, dtype):
    case = make_case(*MIXES[mix], page_size=page_size, window=window, dtype=dtype)
    assert_equals_reference(case, kernels, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(1, 1), (9, 3), (8, 8), (16, 1), (12, 4)])
@pytest.mark.parametrize("head_dim", [4, 20, 64, 80, 128])
def test_equals_the_reference_for_any_heads(kernels, heads, head_dim, dtype):
    case = make_case([600, 40, 3, 77], [1, 40, 1, 5], heads=heads, head_dim=head_dim, dtype=dtype)
    assert_equals_reference(case, kernels, dtype)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_row_does_not_depend_on_its_neighbours_nor_on_threads(kernels, num_threads):
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        lens = ([900, 40, 1, 700], [1, 30, 1, 650])
        together, _ = make_case(*lens, seed=3).attend(lambda pool: NativeAttention(pool, kernels))
        case = make_case(*lens, seed=3)
        starts = np.cumsum([0, *lens[1]])
        for row in range(4):
            alone = only_row(case, row, int(starts[row]), int(starts[row + 1]))
            found, _ = alone.attend(lambda pool: NativeAttention(pool, kernels))
            assert torch.equal(found, together[starts[row] : starts[row + 1]])
    finally:
        torch.set_num_threads(before)


def only_row(case, row, start, stop):
    batch = case.batch
    starts = np.array([0, stop - start], dtype=np.int32)
    return Case(
        ForwardBatch(
            mode="mixed",
            bucket=None,
            num_real_rows=1,
            num_samples=1,
            token_ids=batch.token_ids[start:stop],
            positions=batch.positions[start:stop],
            page_rows=batch.page_rows[row : row + 1],
            num_columns=torch.zeros(1, dtype=torch.int32),
            max_columns=0,
            query_starts=torch.from_numpy(starts),
            slots=torch.arange(len(starts) - 1),
            context_lens=batch.context_lens[row : row + 1].clone(),
            out_locations=batch.out_locations[start:stop],
            sample_indices=batch.sample_indices,
            host_query_starts=starts,
            host_context_lens=batch.host_context_lens[row : row + 1],
        ),
        case.pool,
        case.layer,
        case.q[start:stop],
        case.k[start:stop],
        case.v[start:stop],
    )


def test_poison_that_is_read_shows(kernels):
    case = make_case([40, 40], [1, 1])
    page = int(case.batch.page_rows[1, 0])
    case.pool.poison([page])
    found, _ = case.attend(lambda pool: NativeAttention(pool, kernels))
    assert found[0].isfinite().all()
    assert found[1].isnan().all()


class MappedPool:
    """One layer over address space that costs memory only where it is touched."""

    page_size = 64
    num_layers = 1

    def __init__(self, num_pages, num_kv_heads, head_dim):
        page_elements = 2 * self.page_size * num_kv_heads * head_dim
        self._memory = mmap.mmap(-1, num_pages * page_elements * 2)
        data = torch.frombuffer(self._memory, dtype=torch.bfloat16)
        self._data = data.view(num_pages, 2, self.page_size, num_kv_heads, head_dim)

    def layer(self, index):
        return self._data[:, 0], self._data[:, 1]


def test_page_addresses_pass_two_to_the_32(kernels):
    num_pages = 2**32 // (2 * 64 * 8 * 128) + 8
    pool = MappedPool(num_pages, 8, 128)
    last = num_pages - 1
    k, v = pool.layer(0)
    assert last * k.stride(0) > 2**32
    starts, lens = np.array([0, 1], dtype=np.int32), np.array([65], dtype=np.int32)
    random = torch.Generator().manual_seed(0)
    k[last] = torch.randn(64, 8, 128, generator=random).bfloat16()
    v[last] = torch.randn(64, 8, 128, generator=random).bfloat16()
    batch = ForwardBatch(
        mode="decode",
        bucket=None,
        num_real_rows=1,
        num_samples=1,
        token_ids=torch.zeros(1, dtype=torch.int64),
        positions=torch.tensor([64]),
        page_rows=torch.tensor([[last, last - 1]], dtype=torch.int32),
        num_columns=torch.zeros(1, dtype=torch.int32),
        max_columns=0,
        query_starts=torch.from_numpy(starts),
        slots=torch.arange(len(starts) - 1),
        context_lens=torch.from_numpy(lens),
        out_locations=torch.tensor([(last - 1) * 64]),
        sample_indices=torch.zeros(1, dtype=torch.int64),
        host_query_starts=starts,
        host_context_lens=lens,
    )
    layer = AttentionLayer(0, 8, 8, 128, 128**-0.5)
    q, new_k, new_v = torch.randn(3, 1, 8, 128, generator=random).bfloat16().unbind()
    results = []
    for backend in (NativeAttention(pool, kernels), ReferenceAttention(pool)):
        k[last - 1], v[last - 1] = 0, 0
        backend.plan(batch)
        results.append(backend.forward(layer, q, new_k, new_v))
        assert torch.equal(k[last - 1, 0], new_k[0])
    torch.testing.assert_close(*results, rtol=1e-2, atol=1e-2)
