"""The CUDA kernels in Triton's interpreter on the CPU: what they compute, not how they overlap."""

import os

import pytest
import torch

from tests.kernel_cases import KernelCases
from tests.rank_kernel_cases import RankKernelCases
from tests.tree_kernel_cases import TreeKernelCases

if torch.cuda.is_available():
    pytest.skip("tests/gpu/test_kernels.py runs these on the card", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"  # read where the kernels are made, at their first import
pytest.importorskip("triton", reason="Triton is not installed: it comes with torch's CUDA builds")


class TestInterpreted(KernelCases, TreeKernelCases, RankKernelCases):
    device = "cpu"
    matmul_dtypes = (torch.float16,)  # the interpreter multiplies no bfloat16 matrices

    @pytest.fixture
    def kernels(self):
        from workers.triton_kernels.layer_kernels import TritonKernels

        return TritonKernels(dependent_launch=False)

    @pytest.fixture
    def huge_pool(self, tmp_path):
        """A sparse file: only the pages that are written take memory."""
        num_elements = 4100 << 20
        return torch.from_file(str(tmp_path / "pool"), shared=True, size=num_elements, dtype=torch.float16)
