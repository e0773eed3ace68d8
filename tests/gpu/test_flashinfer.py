"""FlashInferAttention against the reference. Compiles kernels for heads of 64 and 128 in bfloat16, of 64 in
float16 and of 64 with windows: some minutes, once."""

import time

import pytest
import torch

from tests.gpu.cuda_rows import CUDA, MAX_ROWS, MAX_TOKENS, MIXES, CudaRows, assert_near
from workers.attention.flashinfer_kernels import FlashInferKernels, HeadShape, PlanLimits, ShortRowKernels
from workers.engine.mechanisms import ALL_ON, Mechanisms

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(900),
]


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("page_size", [1, 2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("mix", MIXES)
def test_equals_the_reference_over_poisoned_pages(mix: str, page_size: int, head_dim: int) -> None:
    rows = CudaRows(*MIXES[mix], page_size=page_size, head_dim=head_dim)
    found = rows.attend(rows.attention())
    assert_near(found, rows.expected())


@pytest.mark.parametrize("group_size", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("mix", MIXES)
def test_every_number_of_heads_of_a_group(mix: str, group_size: int) -> None:
    rows = CudaRows(*MIXES[mix], num_heads=3 * group_size, num_kv_heads=3)
    found = rows.attend(rows.attention())
    assert_near(found, rows.expected())


@pytest.mark.parametrize("window", [1, 8, 100, 1000])
@pytest.mark.parametrize("mix", MIXES)
def test_windows_beside_whole_contexts(mix: str, window: int) -> None:
    rows = CudaRows(*MIXES[mix])
    attention = rows.attention((None, window))
    attention.plan(rows.batch)
    attention.begin()
    for of_layer in (window, None):
        found = attention.forward(rows.with_window(of_layer), rows.q, rows.k, rows.v)
        assert_near(found, rows.expected(of_layer))
    assert attention.captured_modes == {"decode", "verify"}


@pytest.mark.parametrize("mix", MIXES)
def test_float16(mix: str) -> None:
    rows = CudaRows(*MIXES[mix], dtype="float16")
    found = rows.attend(rows.attention())
    assert found.dtype == torch.float16
    assert_near(found, rows.expected())


@pytest.mark.parametrize("mix", ["decode", "mixed"])
def test_page_addresses_pass_two_to_the_32(mix: str) -> None:
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of the card's memory")
    # 2 MiB a page, a million elements: of page 4,100 on, all lie beyond 2^32.
    rows = CudaRows(*MIXES[mix], num_heads=32, num_kv_heads=8, head_dim=128, num_layers=32, first_page=4100)
    pool_k = rows.pool.layer(1)[0]
    assert pool_k.stride(0) * 4100 > 2**32
    found = rows.attend(rows.attention())
    assert_near(found, rows.expected())
    key = pool_k[rows.batch.out_locations // 16, rows.batch.out_locations % 16]
    assert torch.equal(key, rows.k)


def test_writes_only_the_batch_s_own_places() -> None:
    rows = CudaRows(*MIXES["mixed"])
    before = rows.pool.data.clone()
    rows.attend(rows.attention())
    changed = (rows.pool.data != before).any(dim=1).nonzero().flatten().tolist()
    assert set(changed) == set((rows.batch.out_locations // 16).tolist())


def moving_context(step: int, num_rows: int = 6) -> tuple[list[int], list[int]]:
    """Return a decode step in which row `step` is long and the others short: its plan is like no other's."""
    return [2000 if row == step else 3 for row in range(num_rows)], [1] * num_rows


def errors_behind_a_slow_stream(mechanisms: Mechanisms) -> tuple[list[float], float]:
    """Plan six steps ahead of a stream that sleeps; return each one's error, and what planning three took."""
    steps = [CudaRows(*moving_context(step), seed=step) for step in range(6)]
    contents = [rows.pool.data.clone() for rows in steps]
    for rows in steps:  # over one pool
        rows.pool = steps[0].pool
    attention = steps[0].attention(mechanisms=mechanisms)
    found, planned_s = [], 0.0
    torch.cuda.synchronize()
    for step, rows in enumerate(steps):
        torch.cuda._sleep(200_000_000)  # about 0.1 s in front of every copy
        rows.pool.data.copy_(contents[step])
        started_s = time.monotonic()
        found.append(rows.attend(attention))
        planned_s += time.monotonic() - started_s if step < 3 else 0.0
    torch.cuda.synchronize()
    errors = []
    for rows, content, out in zip(steps, contents, found, strict=True):
        rows.pool.data.copy_(content)
        errors.append((out.float() - rows.expected().float()).abs().max().item())
    return errors, planned_s


def check_that_each_pass_reads_its_own_plan(mechanisms: Mechanisms) -> float:
    errors, planned_s = errors_behind_a_slow_stream(mechanisms)
    assert max(errors) < 2e-2, f"planned_rows: errors are {errors}"
    return planned_s


def test_a_delayed_stream_reads_each_step_s_own_plan_and_planning_does_not_wait() -> None:
    check_that_each_pass_reads_its_own_plan(ALL_ON)  # compiles, allocates
    assert check_that_each_pass_reads_its_own_plan(ALL_ON) < 0.1
    with pytest.raises(AssertionError, match="planned_rows: errors are"):
        check_that_each_pass_reads_its_own_plan(Mechanisms(rings_staging=False))


@pytest.mark.parametrize("num_rows", [1, 3, 40, 256])
@pytest.mark.parametrize("heads", [(32, 8), (9, 3), (28, 4)])
def test_workspaces_are_as_large_as_the_library_wants(heads: tuple[int, int], num_rows: int) -> None:
    shape = HeadShape(*heads, 128, 16, torch.bfloat16)
    kernels = FlashInferKernels(shape, [None], CUDA).short(None)
    assert isinstance(kernels, ShortRowKernels)
    for limits, query_len, context_len in (
        (PlanLimits(num_rows, num_rows, is_captured=True), 1, 5000),
        (PlanLimits(num_rows, num_rows, is_captured=False), 1, 5000),
        (PlanLimits(num_rows, 100 * num_rows, is_captured=False), 100, 5000),
    ):
        num_pages = -(-context_len // 16)
        starts = torch.arange(num_rows + 1, dtype=torch.int32)
        floats, integers = kernels._module.workspace_size(
            torch.empty(1, dtype=torch.uint8, device=CUDA),
            starts * query_len,
            starts * num_pages,
            torch.full((num_rows,), context_len, dtype=torch.int32),
            limits.num_tokens,
            num_rows,
            *heads,
            16,
            limits.is_captured,
            128,
            128,
            True,
            -1,
            -1,
            False,
            0,
        )
        assert floats <= kernels.float_bytes(limits)
        assert integers <= kernels.plan_bytes(limits)
        if limits.is_captured:
            assert kernels.float_bytes(limits) - floats < 10_000


def test_a_batch_as_large_as_any_fits_into_the_workspaces() -> None:
    rows = CudaRows([3000] * MAX_ROWS, [MAX_TOKENS // MAX_ROWS] * MAX_ROWS, head_dim=128)
    assert_near(rows.attend(rows.attention()), rows.expected())
