"""The Triton kernels on a card: what they compute, and that none begins before its inputs are there."""

import pytest
import torch

from tests.kernel_cases import KernelCases
from tests.rank_kernel_cases import RankKernelCases
from tests.tree_kernel_cases import TreeKernelCases

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait, globaltimer

from workers.triton_kernels.argmax import greedy_tokens
from workers.triton_kernels.choice import cuda_kernels
from workers.triton_kernels.kv_write import rotate_and_write_kv, write_kv
from workers.triton_kernels.launching import has_dependent_launch

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
LATE_NS = 300_000
"""Many times what the launch of a kernel takes."""
needs_dependent_launch = pytest.mark.skipif(
    not has_dependent_launch(CUDA), reason="needs a card of compute capability 9"
)


class TestOnCuda(KernelCases, TreeKernelCases, RankKernelCases):
    device = "cuda"
    matmul_dtypes = (torch.bfloat16, torch.float16)

    @pytest.fixture
    def kernels(self):
        return cuda_kernels(CUDA, torch.bfloat16)

    @pytest.fixture
    def huge_pool(self):
        return torch.empty(4100 << 20, dtype=torch.float16, device=CUDA)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_sums_round_as_torch_s(self, kernels, dtype):
        """The interpreter cuts bfloat16 off where a card rounds."""
        x, delta = self.randn(9, 4096, dtype=dtype), self.randn(9, 4096, dtype=dtype, seed=1)
        total, _ = kernels.add_rms_norm(x, delta, self.randn(4096, dtype=dtype), 1e-5)
        assert torch.equal(total, x + delta)


@triton.jit
def _late_copy(source, target, size, late_ns, BLOCK: tl.constexpr):
    """Let the next kernel begin at once, and write long after that."""
    gdc_launch_dependents()
    gdc_wait()
    started = globaltimer()
    while globaltimer() - started < late_ns:
        pass
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + place, tl.load(source + place, mask=place < size), mask=place < size)


@triton.jit
def _hasty_copy(source, target, size, BLOCK: tl.constexpr):
    """What no kernel of ours may do: read its input without waiting for it."""
    gdc_launch_dependents()
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + place, tl.load(source + place, mask=place < size), mask=place < size)


def copy_late(source, target):
    size = source.numel()
    _late_copy[(triton.cdiv(size, 1024),)](source, target, size, LATE_NS, BLOCK=1024, launch_pdl=True)


def randn(*shape, seed=0, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(CUDA, dtype)


class Readers:
    """Kernels as functions of one input [4, 1024], all of which each result depends on. They allocate results
    and launch nothing else: what comes before them in the stream is the test's."""

    NAMES = (
        "rms_norm",
        "add_rms_norm",
        "silu_mul",
        "rotate",
        "matmul",
        "deep_matmul",
        "gated_matmul",
        "write_kv",
        "rotate_and_write_kv",
        "one_after_another",
    )

    def __init__(self):
        self.kernels = cuda_kernels(CUDA, torch.bfloat16)
        self.norm, self.delta = randn(1024, seed=1), randn(4, 1024, seed=2)
        self.matmul = self.kernels.matmul(randn(1024, 1024, seed=3), None)
        self.deep = self.kernels.matmul(randn(64, 4096, seed=6), None)
        self.gated_matmul = self.kernels.gated_matmul(randn(192, 1024, seed=4) / 32, None)
        self.cos, self.sin = randn(4, 64, seed=5).unsqueeze(1).chunk(2, dim=-1)
        self.locations = torch.tensor([40, 3, 17, 31], device=CUDA)
        self.pools = torch.zeros(2, 3, 16, 8, 64, dtype=torch.bfloat16, device=CUDA)

    def rms_norm(self, x):
        return [self.kernels.rms_norm(x, self.norm, 1e-5)]

    def add_rms_norm(self, x):
        return self.kernels.add_rms_norm(self.delta, x, self.norm, 1e-5)

    def silu_mul(self, x):
        return [self.kernels.silu_mul(x)]

    def rotate(self, x):
        return [self.kernels.rotate_(x.view(4, 16, 64), self.cos, self.sin)]

    def deep_matmul(self, x):
        """In several tiles, which lets the next kernel begin at its end."""
        return [self.deep(x.view(1, 4096))]

    def write_kv(self, x):
        heads = x.view(4, 16, 64)
        write_kv(heads[:, :8], heads[:, 8:], self.locations, *self.pools, pdl=True)
        return [self.pools]

    def rotate_and_write_kv(self, x):
        heads, pools = x.view(4, 16, 64), self.pools[:, :, :, :4]
        parts = heads[:, :8], heads[:, 8:12], heads[:, 12:]
        rotate_and_write_kv(*parts, self.cos, self.sin, self.locations, *pools, pdl=True)
        return [self.pools, parts[0]]

    def one_after_another(self, x):
        """x is written by the kernel before the one before the last."""
        return self.kernels.add_rms_norm(x, self.matmul(self.delta), self.norm, 1e-5)

    def __call__(self, name, x):
        """Return one tensor of all that kernel `name` made of x."""
        found = getattr(self, name)(x)
        parts = found if isinstance(found, list | tuple) else [found]
        return torch.cat([part.flatten() for part in parts])


@needs_dependent_launch
def test_a_kernel_that_does_not_wait_reads_what_was_there_before():
    """The tests below can fail."""
    old, new = torch.zeros(4096, device=CUDA), torch.ones(4096, device=CUDA)
    found = torch.empty_like(old)
    _hasty_copy[(4,)](old, found, 4096, BLOCK=1024, launch_pdl=True)  # compiled before it is timed
    copy_late(old.clone(), old)
    torch.cuda.synchronize()
    copy_late(new, old)
    _hasty_copy[(4,)](old, found, 4096, BLOCK=1024, launch_pdl=True)
    torch.cuda.synchronize()
    assert not found.any()


@needs_dependent_launch
@pytest.mark.parametrize("name", Readers.NAMES)
def test_a_kernel_reads_what_the_one_before_it_writes_late(name):
    read, new = Readers(), randn(4, 1024, seed=7)
    expected = read(name, new.clone())  # and compiles
    for _ in range(3):
        buffer = torch.zeros_like(new)
        copy_late(new, buffer)
        assert torch.equal(read(name, buffer), expected)


@needs_dependent_launch
def test_greedy_tokens_wait_for_the_logits():
    logits = randn(2, 50_000)
    expected = greedy_tokens(logits, pdl=True)
    buffer = torch.zeros_like(logits)
    copy_late(logits, buffer)
    assert torch.equal(greedy_tokens(buffer, pdl=True), expected)


@needs_dependent_launch
@pytest.mark.parametrize("name", Readers.NAMES)
def test_a_captured_kernel_waits_as_well(name):
    read = Readers()
    source, buffer = randn(4, 1024, seed=7), torch.zeros(4, 1024, dtype=torch.bfloat16, device=CUDA)
    copy_late(source, buffer)
    read(name, buffer)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        copy_late(source, buffer)
        found = read(name, buffer)
    for seed in range(10, 14):
        source.copy_(randn(4, 1024, seed=seed))
        buffer.zero_()
        graph.replay()
        assert torch.equal(found, read(name, source.clone()))


def test_ten_thousand_launches_give_one_result():
    """A race would show as a sum that differs."""
    kernels = cuda_kernels(CUDA, torch.bfloat16)
    product = kernels.matmul(randn(4096, 4096, seed=1), None)
    gated = kernels.gated_matmul(randn(8192, 4096, seed=2) / 64, None)
    x, norm = randn(3, 4096), randn(4096, seed=3)

    def chain():
        total, y = kernels.add_rms_norm(x, product(x), norm, 1e-5)
        return total + product(gated(y))

    expected = chain()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = [chain() for _ in range(20)]
        num_wrong = sum((one != expected).sum() for one in found)
    for _ in range(100):
        graph.replay()
        assert int(num_wrong) == 0
