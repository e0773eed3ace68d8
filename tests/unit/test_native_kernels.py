"""The compiled linear and elementwise kernels against torch, and how they share torch's threads."""

import pytest
import torch
from torch.nn import functional

from workers.native.build import built_library, default_cache_folder
from workers.native.kernels import NativeKernels
from workers.native.packed_torch import packed_by_torch

BOTH = [torch.float32, torch.bfloat16]


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


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(found, expected, dtype):
    """1e-5 of the largest value in float32; two roundings in bf16."""
    scale = expected.abs().max().item()
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("shape", [(3072, 576), (576, 1536), (100, 37), (1, 1), (33, 64), (7, 3)])
def test_linear_equals_torch_for_every_number_of_rows(kernels, shape):
    weight = randn(*shape, dtype=torch.bfloat16)
    bias = randn(shape[0], seed=1)
    packed = kernels.pack_linear(weight)
    for rows in [*range(1, 14), 67]:
        x = randn(rows, shape[1], seed=rows)
        for dtype in BOTH:
            narrow = x.to(dtype)
            exact = narrow.double() @ weight.double().T
            for out_dtype in BOTH:
                found = kernels.linear(narrow, packed, shape[0], out_dtype=out_dtype)
                assert_close(found, exact, out_dtype)
            assert_close(
                kernels.linear(narrow, packed, shape[0], bias, torch.float32), exact + bias, torch.float32
            )


def test_a_row_of_linear_does_not_depend_on_the_others(kernels):
    weight = randn(300, 200, dtype=torch.bfloat16)
    packed = kernels.pack_linear(weight)
    x = randn(150, 200, dtype=torch.bfloat16)
    whole = kernels.linear(x, packed, 300, out_dtype=torch.float32)
    for first, stop in [(0, 1), (149, 150), (3, 5), (10, 13), (20, 24), (40, 45), (60, 67), (0, 100)]:
        assert torch.equal(
            kernels.linear(x[first:stop], packed, 300, out_dtype=torch.float32), whole[first:stop]
        )


def test_linear_takes_views_and_leaves_its_neighbours_alone(kernels):
    wide = randn(9, 400, dtype=torch.bfloat16)
    weight = randn(50, 100, dtype=torch.bfloat16)
    packed = kernels.pack_linear(weight)
    exact = wide[:, 100:200].double() @ weight.double().T
    assert_close(kernels.linear(wide[:, 100:200], packed, 50, out_dtype=torch.float32), exact, torch.float32)
    across = kernels.linear(wide.T[:100].T, packed, 50, out_dtype=torch.float32)
    assert_close(across, wide[:, :100].double() @ weight.double().T, torch.float32)
    sliced = kernels.pack_linear(randn(60, 200, dtype=torch.bfloat16)[5:55, 50:150])
    assert torch.equal(
        sliced, kernels.pack_linear(randn(60, 200, dtype=torch.bfloat16)[5:55, 50:150].clone())
    )


def test_nan_and_infinity_pass_through_linear(kernels):
    x = randn(3, 64, dtype=torch.bfloat16)
    x[1, 5] = float("nan")
    x[2, 7] = float("inf")
    packed = kernels.pack_linear(torch.ones(40, 64, dtype=torch.bfloat16))
    found = kernels.linear(x, packed, 40)
    assert found[0].isfinite().all()
    assert found[1].isnan().all()
    assert (found[2] == float("inf")).all()


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("shape", [(1, 576), (8, 576), (200, 576), (3, 5), (1, 1), (4, 67)])
def test_rms_norm_equals_torch(kernels, shape, dtype):
    x, delta = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype, seed=1)
    weight = randn(shape[1], dtype=dtype, seed=2)

    def exact(values):
        wide = values.double()
        return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5) * weight.double()

    assert_close(kernels.rms_norm(x, weight, 1e-5), exact(x), dtype)
    total, found = kernels.add_rms_norm(x, delta, weight, 1e-5)
    assert torch.equal(total, x + delta)
    assert_close(found, exact(x + delta), dtype)


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("shape", [(1, 12, 64), (8, 12, 64), (300, 12, 64), (5, 3, 6), (4, 2, 80)])
def test_rotate_equals_torch_and_leaves_v_alone(kernels, shape, dtype):
    tokens, heads, dim = shape
    qkv = randn(tokens, heads + 2, dim, dtype=dtype)
    before = qkv.clone()
    cos, sin = randn(tokens, 1, dim, dtype=dtype, seed=1).chunk(2, dim=-1)
    first, second = before[:, :heads].double().chunk(2, dim=-1)
    exact = torch.cat(
        [first * cos.double() - second * sin.double(), second * cos.double() + first * sin.double()], dim=-1
    )
    assert_close(kernels.rotate_(qkv[:, :heads], cos, sin), exact, dtype)
    assert torch.equal(qkv[:, heads:], before[:, heads:])


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("shape", [(1, 1536), (8, 1536), (64, 1536), (3, 5), (2, 33)])
def test_silu_mul_equals_torch(kernels, shape, dtype):
    gate_up = 20 * randn(shape[0], 2 * shape[1], dtype=dtype)
    gate, up = gate_up.double().chunk(2, dim=-1)
    assert_close(kernels.silu_mul(gate_up), functional.silu(gate) * up, dtype)


def test_silu_of_extremes_is_finite(kernels):
    gate = torch.tensor([[-1e30, -200.0, -88.0, -20.0, 0.0, 20.0, 88.0, 200.0, 1e30]])
    found = kernels.silu_mul(torch.cat([gate, torch.ones_like(gate)], dim=1))
    torch.testing.assert_close(found, functional.silu(gate), rtol=1e-5, atol=1e-30)


def test_empty_batches_are_no_work(kernels):
    packed = kernels.pack_linear(randn(40, 64, dtype=torch.bfloat16))
    assert kernels.linear(torch.empty(0, 64), packed, 40).shape == (0, 40)
    assert kernels.silu_mul(torch.empty(0, 64)).shape == (0, 32)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_results_do_not_depend_on_the_number_of_threads(kernels, num_threads):
    before = torch.get_num_threads()
    weight, x = randn(500, 300, dtype=torch.bfloat16), randn(70, 300, dtype=torch.bfloat16)
    packed = kernels.pack_linear(weight)
    expected = kernels.linear(x, packed, 500)
    torch.set_num_threads(num_threads)
    try:
        assert torch.equal(kernels.linear(x, kernels.pack_linear(weight), 500), expected)
        assert torch.equal(kernels.pack_linear(weight), packed)
    finally:
        torch.set_num_threads(before)


def test_products_of_many_rows_can_be_left_to_torch(kernels):
    weight, bias = randn(64, 48, dtype=torch.bfloat16), randn(64, dtype=torch.bfloat16, seed=1)
    x = randn(20, 48, dtype=torch.bfloat16, seed=2)
    expected = functional.linear(x.double(), weight.double(), bias.double())
    mixed = NativeKernels(built_library(default_cache_folder()), max_matmul_rows=4)
    for rows in (1, 4, 5, 20):
        assert_close(mixed.matmul(weight, bias)(x[:rows]), expected[:rows], torch.bfloat16)
        assert_close(kernels.matmul(weight, bias)(x[:rows]), expected[:rows], torch.bfloat16)
        assert_close(packed_by_torch(weight, bias)(x[:rows]), expected[:rows], torch.bfloat16)


def test_float32_products_stay_with_torch(kernels):
    assert kernels.matmul(randn(64, 48), None) is None
