"""KernelCases: every Triton kernel against float64 and the layers' torch code, on a card or interpreted.

The files that run them are tests/gpu/test_kernels.py and tests/unit/test_triton_kernels.py. All memory that a
kernel's results come in holds NaN before.
"""

import pytest
import torch
from torch.nn import functional

from tests.unit.engine_plans import tiny_card
from workers.attention.pool_kernels import TorchPoolKernels
from workers.attention.row_pages import RowPages
from workers.layers.norm import RMSNorm
from workers.layers.rotary import rotate
from workers.models.decoder import Decoder
from workers.parallel import TPGroup

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""Of the largest value: two roundings."""

NORM_SHAPES = [(1, 576), (8, 4096), (5, 64), (3, 5), (1, 1), (4, 67), (0, 64)]
SILU_SHAPES = [(1, 1536), (3, 2050), (2, 33), (7, 1), (0, 32)]
ROTATED = [(1, 12, 64), (8, 40, 128), (5, 3, 6), (4, 2, 80), (2, 9, 256), (0, 2, 8)]
MATMUL_SHAPES = [(576, 960), (1536, 576), (64, 33), (70, 31), (640, 17), (1, 1), (2560, 48), (2500, 40)]
MATMUL_ROWS = [1, 2, 5, 8, 9, 16, 17]
HEADS = [(9, 3, 64), (32, 8, 128), (4, 4, 80), (5, 1, 6)]


class BesideAttention:
    """An AttentionBackend whose heads attend to themselves: query plus key, both after RoPE, plus value."""

    def __init__(self, num_tokens, num_layers, dtype, device, pdl=False):
        self.pools = torch.zeros(num_layers, 2, 4, 16, 2, 16, dtype=dtype, device=device)
        self.locations = torch.arange(num_tokens, device=device) + 3
        self.pdl = pdl

    def plan(self, batch):
        raise NotImplementedError

    def forward(self, layer, q, k, v):
        self.pools[layer.index, 0].view(64, 2, 16)[self.locations] = k
        self.pools[layer.index, 1].view(64, 2, 16)[self.locations] = v
        return self.attended(layer, q)

    def attended(self, layer, q):
        k, v = self.pools[layer.index].view(2, 64, 2, 16)[:, self.locations]
        return (q + (k + v).repeat_interleave(2, dim=1)).flatten(1)


class RotatingBesideAttention(BesideAttention):
    def forward_unrotated(self, layer, q, k, v, cos, sin):
        from workers.triton_kernels.kv_write import rotate_and_write_kv

        rotate_and_write_kv(q, k, v, cos, sin, self.locations, *self.pools[layer.index], pdl=self.pdl)
        return self.attended(layer, q)


class KernelCases:
    """`device` and the dtypes of matrix products are the subclass's."""

    device: str
    matmul_dtypes: tuple[torch.dtype, ...]

    @pytest.fixture(autouse=True)
    def poisoned_memory(self):
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty returns with NaN
        assert torch.empty(1, device=self.device).isnan().all()
        yield
        torch.use_deterministic_algorithms(before)

    @pytest.fixture
    def kernels(self):
        raise NotImplementedError

    def randn(self, *shape, dtype=torch.float32, seed=0):
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(self.device, dtype)

    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("shape", NORM_SHAPES)
    def test_norms_equal_the_layer_s(self, kernels, shape, dtype):
        x, delta = self.randn(*shape, dtype=dtype), self.randn(*shape, dtype=dtype, seed=1)
        layer = RMSNorm(shape[1], 1e-5, dtype=dtype, device=torch.device(self.device))
        layer.weight.copy_(self.randn(shape[1], dtype=dtype, seed=2))
        assert_close(kernels.rms_norm(x, layer.weight, 1e-5), layer(x), dtype)
        total, found = kernels.add_rms_norm(x, delta, layer.weight, 1e-5)
        assert_close(total, x + delta, dtype)
        assert_close(found, layer(total), dtype)
        wide = total.double()
        exact = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5) * layer.weight.double()
        assert_close(found, exact, dtype)

    def test_a_norm_takes_rows_that_lie_apart(self, kernels):
        wide, weight = self.randn(6, 200), self.randn(50, seed=1)
        apart = wide[:, 100:150]
        assert_close(
            kernels.rms_norm(apart, weight, 1e-5),
            kernels.rms_norm(apart.clone(), weight, 1e-5),
            torch.float32,
        )
        across = wide.T[:50].T
        assert torch.equal(
            kernels.rms_norm(across, weight, 1e-5), kernels.rms_norm(across.clone(), weight, 1e-5)
        )

    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("shape", SILU_SHAPES)
    def test_silu_mul_equals_torch(self, kernels, shape, dtype):
        gate_up = 20 * self.randn(shape[0], 2 * shape[1], dtype=dtype)
        gate, up = gate_up.double().chunk(2, dim=-1)
        assert_close(kernels.silu_mul(gate_up), functional.silu(gate) * up, dtype)
        padded = functional.pad(gate_up, (3, 4))[:, 3:-4]
        assert torch.equal(kernels.silu_mul(padded), kernels.silu_mul(gate_up))

    def test_silu_of_extremes_is_finite(self, kernels):
        gate = torch.tensor([[-1e30, -200.0, -88.0, -20.0, 0.0, 20.0, 88.0, 200.0, 1e30]], device=self.device)
        found = kernels.silu_mul(torch.cat([gate, torch.ones_like(gate)], dim=1))
        torch.testing.assert_close(found, functional.silu(gate), rtol=1e-5, atol=1e-30)

    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("shape", ROTATED)
    def test_rotate_equals_the_layer_s_and_leaves_v_alone(self, kernels, shape, dtype):
        tokens, heads, dim = shape
        qkv = self.randn(tokens, heads + 2, dim, dtype=dtype)
        before = qkv.clone()
        cos, sin = self.angles(tokens, dim, dtype)
        exact = rotate(before[:, :heads].double(), cos.double(), sin.double())
        found = kernels.rotate_(qkv[:, :heads], cos, sin)
        assert found.data_ptr() == qkv.data_ptr()
        assert_close(found, exact, dtype)
        assert torch.equal(qkv[:, heads:], before[:, heads:])

    @pytest.mark.parametrize("shape", MATMUL_SHAPES)
    def test_matmul_equals_float64_for_every_number_of_rows(self, kernels, shape):
        depth, width = shape
        for dtype in self.matmul_dtypes:
            weight = self.randn(width, depth, dtype=dtype)
            bias = self.randn(width, dtype=dtype, seed=1)
            for rows in MATMUL_ROWS:
                x = self.randn(rows, depth, dtype=dtype, seed=rows)
                exact = x.double() @ weight.double().T
                assert_close(kernels.matmul(weight, None)(x), exact, dtype)
                assert_close(kernels.matmul(weight, bias)(x), exact + bias.double(), dtype)

    @pytest.mark.parametrize("shape", MATMUL_SHAPES)
    def test_gated_matmul_equals_float64_for_every_number_of_rows(self, kernels, shape):
        depth, width = shape
        for dtype in self.matmul_dtypes:
            weight = self.randn(2 * width, depth, dtype=dtype) / depth**0.5
            bias = self.randn(2 * width, dtype=dtype, seed=1)
            for rows in MATMUL_ROWS:
                x = self.randn(rows, depth, dtype=dtype, seed=rows)
                for given in (None, bias):
                    exact = x.double() @ weight.double().T
                    gate, up = (exact if given is None else exact + given.double()).chunk(2, dim=-1)
                    found = kernels.gated_matmul(weight, given)(x)
                    assert_close(found, functional.silu(gate) * up, dtype, num_roundings=4)

    @pytest.mark.parametrize("rows", [20, 64])
    @pytest.mark.parametrize("shape", [(256, 100), (200, 64), (64, 130)])
    def test_matmul_takes_more_rows_where_warps_share_a_tile(self, shape, rows):
        from workers.triton_kernels.skinny_matmul import SkinnyConfig, skinny_matmul

        (depth, width), dtype = shape, self.matmul_dtypes[0]
        config = SkinnyConfig(64, 128, num_parts=1, num_stages=3, prefetch_lines=0)
        x = self.randn(rows, depth, dtype=dtype)
        weight = self.randn(2 * width, depth, dtype=dtype, seed=1) / 8
        bias = self.randn(2 * width, dtype=dtype, seed=2)
        exact = x.double() @ weight.double().T + bias.double()
        found = skinny_matmul(x, weight, bias, config, is_gated=False, pdl=self.pdl)
        assert_close(found, exact, dtype)
        gate, up = exact.chunk(2, dim=-1)
        found = skinny_matmul(x, weight, bias, config, is_gated=True, pdl=self.pdl)
        assert_close(found, functional.silu(gate) * up, dtype, num_roundings=4)

    def test_a_product_that_torch_computes_as_fast_stays_with_it(self, kernels):
        dtype = self.matmul_dtypes[0]
        head = torch.zeros(49152, 576, dtype=dtype, device=self.device)
        assert kernels.matmul(head, None) is None
        assert kernels.gated_matmul(head, None) is None
        assert kernels.matmul(head[:8448], None) is not None

    def test_matmul_takes_views_and_leaves_their_neighbours_alone(self, kernels):
        dtype = self.matmul_dtypes[0]
        wide = self.randn(9, 400, dtype=dtype)
        weight = self.randn(60, 200, dtype=dtype)[5:55, 50:150]
        product = kernels.matmul(weight, None)
        for x in (wide[:4, 100:200], wide[:9, 3:103], wide.T[:100].T[:3]):
            assert_close(product(x), x.double() @ weight.double().T, dtype)
        assert product(wide[:0, :100]).shape == (0, 50)

    def test_a_row_does_not_depend_on_its_neighbours(self, kernels):
        dtype = self.matmul_dtypes[0]
        weight, x = self.randn(96, 640, dtype=dtype), self.randn(8, 640, dtype=dtype, seed=1)
        for product in (kernels.matmul(weight, None), kernels.gated_matmul(weight, None)):
            alone = product(x)
            others = x.clone()
            others[[0, 2, 3, 4, 5, 6, 7]] = 1000 * self.randn(7, 640, dtype=dtype, seed=2)
            assert torch.equal(product(others)[1], alone[1])
            assert torch.equal(product(x), alone)

    def test_nan_and_infinity_pass_through_matmul_and_stay_in_their_rows(self, kernels):
        dtype = self.matmul_dtypes[0]
        x = self.randn(3, 64, dtype=dtype)
        x[1, 5], x[2, 7] = float("nan"), float("inf")
        found = kernels.matmul(torch.ones(40, 64, dtype=dtype, device=self.device), None)(x)
        assert found[0].isfinite().all()
        assert found[1].isnan().all()
        assert (found[2] == float("inf")).all()

    def test_float32_products_stay_with_torch(self, kernels):
        assert kernels.matmul(self.randn(64, 48), None) is None
        assert kernels.gated_matmul(self.randn(64, 48), None) is None

    @pytest.mark.parametrize("page_size", [1, 16, 64])
    @pytest.mark.parametrize("heads", HEADS)
    def test_kv_is_written_at_its_locations_and_nowhere_else(self, heads, page_size):
        from workers.triton_kernels.kv_write import write_kv

        num_heads, num_kv_heads, dim = heads
        qkv = self.randn(6, num_heads + 2 * num_kv_heads, dim, dtype=torch.bfloat16)
        k, v = qkv[:, num_heads : num_heads + num_kv_heads], qkv[:, num_heads + num_kv_heads :]
        pools = self.pools(20 // page_size + 3, page_size, num_kv_heads, dim, torch.bfloat16)
        locations = self.locations(pools[0], 6)
        expected = written(*pools, k, v, locations)
        write_kv(k, v, locations, *pools, pdl=self.pdl)
        assert all(torch.equal(pool, exact) for pool, exact in zip(pools, expected, strict=True))

    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("heads", HEADS)
    def test_rotating_and_writing_at_once_equals_one_after_the_other(self, kernels, heads, dtype):
        from workers.triton_kernels.kv_write import rotate_and_write_kv

        num_heads, num_kv_heads, dim = heads
        qkv = self.randn(5, num_heads + 2 * num_kv_heads, dim, dtype=dtype)
        before = qkv.clone()
        num_rotated = num_heads + num_kv_heads
        cos, sin = self.angles(5, dim, dtype)
        rotated = kernels.rotate_(before[:, :num_rotated].clone(), cos, sin)
        pools = self.pools(4, 16, num_kv_heads, dim, dtype)
        locations = self.locations(pools[0], 5)
        expected = written(*pools, rotated[:, num_heads:], before[:, num_rotated:], locations)
        q, k, v = qkv[:, :num_heads], qkv[:, num_heads:num_rotated], qkv[:, num_rotated:]
        rotate_and_write_kv(q, k, v, cos, sin, locations, *pools, pdl=self.pdl)
        assert_close(q, rotated[:, :num_heads], dtype)
        assert torch.equal(qkv[:, num_heads:], before[:, num_heads:])
        assert torch.equal(pools[1], expected[1])
        assert_close(pools[0], expected[0], dtype)
        is_other = torch.ones(64, dtype=torch.bool, device=self.device).index_fill_(0, locations, 0)
        others = [pool.flatten(0, 1)[is_other] for pool in (pools[0], expected[0])]
        assert torch.equal(*others)

    def test_kv_lands_beyond_two_to_the_32_elements(self, huge_pool):
        """`huge_pool`: bytes enough for K and V of pages that lie a mebi-element apart."""
        from workers.triton_kernels.kv_write import rotate_and_write_kv, write_kv

        page_stride = 1 << 20
        shape, strides = (4100, 16, 2, 8), (page_stride, 16, 8, 1)
        pools = [huge_pool.as_strided(shape, strides, offset) for offset in (0, 256)]
        k, v = self.randn(2, 4, 8, dtype=torch.float16).split(2, dim=1)
        locations = torch.tensor([4097 * 16 + 3, 1 * 16 + 3], device=self.device)
        assert 4097 * page_stride > 1 << 32
        for rotates in (False, True):
            for pool in pools:
                pool[1].zero_()
                pool[4097].zero_()
            if rotates:
                cos, sin = torch.ones(2, 1, 2, 4, device=self.device).mul_(0.5).unbind(2)
                rotate_and_write_kv(k.clone(), k, v, cos, sin, locations, *pools, pdl=self.pdl)
                first, second = (0.5 * k.float()).chunk(2, dim=-1)
                keys = torch.cat([first - second, second + first], dim=-1).half()
            else:
                write_kv(k, v, locations, *pools, pdl=self.pdl)
                keys = k
            for token, page in ((0, 4097), (1, 1)):
                assert torch.equal(pools[0][page, 3], keys[token])
                assert torch.equal(pools[1][page, 3], v[token])
            assert sum(int(pool[page].count_nonzero()) for pool in pools for page in (1, 4097)) <= 64

    @pytest.mark.parametrize("page_size", [1, 16])
    @pytest.mark.parametrize("num_columns", [1, 5, 1300])
    @pytest.mark.parametrize("num_rows", [1, 3, 40])
    def test_pages_are_lined_up_as_by_torch(self, kernels, num_rows, num_columns, page_size):
        random = torch.Generator().manual_seed(num_columns)
        page_rows = torch.randint(1, 9999, (num_rows, num_columns), generator=random, dtype=torch.int32)
        page_rows = page_rows.to(self.device)
        width = torch.tensor([num_columns], dtype=torch.int32, device=self.device)
        max_columns = num_columns + 600
        largest = num_columns * page_size
        context_lens = torch.randint(0, largest + 1, (num_rows,), generator=random, dtype=torch.int32)
        context_lens[:2] = torch.tensor([largest, 0])[:num_rows]
        context_lens = context_lens.to(self.device)
        found, expected = (RowPages.room(num_rows, num_columns, page_rows.device) for _ in range(2))
        for by, to in ((kernels, found), (TorchPoolKernels(), expected)):
            by.line_up_pages(
                page_rows, width, max_columns, context_lens, page_size, to.starts, to.pages, to.last_page_lens
            )
        total = int(expected.starts[-1])
        assert torch.equal(found.pages[:total], expected.pages[:total])
        has_tokens = context_lens > 0
        assert torch.equal(found.last_page_lens[has_tokens], expected.last_page_lens[has_tokens])

    @pytest.mark.parametrize(
        "shape", [(1, 49152), (1, 1001), (3, 5000), (40, 1030), (600, 7), (2, 1), (0, 9)]
    )
    def test_greedy_tokens_are_torch_s(self, shape):
        from workers.triton_kernels.argmax import greedy_tokens

        for dtype in FLOATS:
            logits = self.randn(*shape).to(dtype)  # narrow ones are often equal
            padded = functional.pad(logits, (0, 3), value=6e4)[:, : shape[1]]
            for given in (logits, padded):
                assert torch.equal(greedy_tokens(given, pdl=self.pdl), logits.float().argmax(dim=-1))

    @pytest.mark.parametrize("dtype", FLOATS)
    def test_of_equal_logits_the_lower_id_wins(self, dtype):
        from workers.triton_kernels.argmax import greedy_tokens

        logits = torch.full((7, 5000), -3.0, device=self.device)
        logits[0, [4999, 17, 2500]] = 2.0
        logits[1] = -torch.inf
        logits[2, 4000:] = 0.0
        logits[2, 3999] = -0.0
        logits[3, [1023, 1024]] = torch.inf
        logits[4, [70, 4000]] = torch.nan
        logits[4, 70:71].view(torch.int32).bitwise_or_(-(1 << 31))  # of either sign
        logits[4, 60] = torch.inf
        logits[5, 4998:] = 1e-4
        logits = logits.to(dtype)
        expected = torch.tensor([17, 0, 3999, 1023, 70, 4998, 0], device=self.device)
        for rows in (slice(7), slice(1), slice(2, 3), slice(4, 5)):
            assert torch.equal(greedy_tokens(logits[rows], pdl=self.pdl), expected[rows])

    @pytest.mark.parametrize("num_tokens", [1, 6, 20])
    @pytest.mark.parametrize("qk_norm", [False, True])
    @pytest.mark.parametrize("backend", [BesideAttention, RotatingBesideAttention])
    def test_a_decoder_computes_the_same_by_kernels(self, kernels, backend, qk_norm, num_tokens):
        dtype, device = self.matmul_dtypes[0], torch.device(self.device)
        config = tiny_card(hidden_size=128, intermediate_size=192, head_dim=16, qk_norm=qk_norm).config
        decoder = Decoder(config, dtype=dtype, device=device, group=TPGroup.single())
        for number, parameter in enumerate(decoder.parameters()):
            parameter.copy_(self.randn(*parameter.shape, seed=number) / max(parameter.shape) ** 0.5)
        token_ids = torch.arange(3, 3 + num_tokens, device=device)
        attention = BesideAttention(num_tokens, config.num_layers, dtype, device)
        expected = decoder.logits(decoder(token_ids, token_ids, attention))
        decoder.adopt(kernels)
        ours = backend(num_tokens, config.num_layers, dtype, device, self.pdl)
        found = decoder.logits(decoder(token_ids, token_ids, ours))
        assert_close(found.to(dtype), expected, dtype, num_roundings=32)
        assert_close(ours.pools, attention.pools, dtype, num_roundings=32)

    @property
    def pdl(self) -> bool:
        from workers.triton_kernels.launching import has_dependent_launch

        return has_dependent_launch(torch.device(self.device))

    def angles(self, tokens, dim, dtype):
        """Return cos and sin as Rotary makes them: views of one row a token."""
        angle = self.randn(tokens, dim // 2, seed=3)
        table = torch.cat([angle.cos(), angle.sin()], dim=-1).to(dtype)
        return table.unsqueeze(1).chunk(2, dim=-1)

    def pools(self, num_pages, page_size, num_heads, dim, dtype):
        """Return layer 1's K and V of two, in bundles with room behind: views as KVPool.layer makes."""
        plane = page_size * num_heads * dim
        data = self.randn(num_pages, 4 * plane + 32, dtype=dtype, seed=4)
        planes = data[:, : 4 * plane].view(num_pages, 4, page_size, num_heads, dim)
        return planes[:, 2], planes[:, 3]

    def locations(self, pool, num_tokens):
        """Return places in any order, the first and the last of all among them."""
        places = torch.randperm(
            pool.shape[0] * pool.shape[1] - 2, generator=torch.Generator().manual_seed(5)
        )[: num_tokens - 2]
        return torch.cat([places + 1, torch.tensor([pool.shape[0] * pool.shape[1] - 1, 0])]).to(self.device)


def written(pool_k, pool_v, k, v, locations):
    """Return what the pools must hold afterwards, by torch."""
    pages, offsets = locations // pool_k.shape[1], locations % pool_k.shape[1]
    expected = []
    for pool, new in ((pool_k, k), (pool_v, v)):
        pool = pool.clone()
        pool[pages, offsets] = new
        expected.append(pool)
    return expected


def assert_close(found, expected, dtype, num_roundings=2):
    assert found.dtype == dtype
    tolerance = TOLERANCES[dtype] * num_roundings / 2
    scale = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance * scale)
