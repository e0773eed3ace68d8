"""Whether a decoder computes by the CUDA kernels, where Triton is missing above all."""

import subprocess
import sys

import pytest
import torch

from workers.triton_kernels.choice import TritonMissingError, cuda_kernels

MODULES = ("layer_kernels", "launching", "elementwise", "kv_write", "skinny_matmul", "argmax", "page_lines")


def test_other_devices_and_dtypes_are_left_to_torch() -> None:
    assert cuda_kernels(torch.device("cpu"), torch.bfloat16) is None
    assert cuda_kernels(torch.device("cuda"), torch.float64) is None


def test_without_triton_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in MODULES:
        monkeypatch.delitem(sys.modules, f"workers.triton_kernels.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)  # import says it is not there
    with pytest.raises(TritonMissingError, match=r"need Triton.*pip install triton"):
        cuda_kernels(torch.device("cuda"), torch.bfloat16)


def test_the_engine_s_modules_load_without_triton() -> None:
    code = (
        "import sys, workers.engine.engine, workers.triton_kernels.choice; assert 'triton' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
