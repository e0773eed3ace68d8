"""check_kernels: a library that computes wrongly on this CPU is refused before it makes wrong text."""

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from workers.native.build import NativeBuildError

if TYPE_CHECKING:
    from workers.native.kernels import NativeKernels

_ROWS = (1, 2, 3, 5, 8, 13)
"""Of tiles of every height."""
_MAX_ERROR = 2**-7
"""Relative to the largest value: two roundings to bf16."""


def check_kernels(kernels: "NativeKernels") -> None:
    """Compare what depends on the CPU's vector units with torch; some milliseconds.

    Raise NativeBuildError on a difference.
    """
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(130, 70, generator=random).bfloat16()
    packed = kernels.pack_linear(weight)
    for rows in _ROWS:
        x = torch.randn(rows, 70, generator=random).bfloat16()
        _compare("linear", kernels.linear(x, packed, 130), x.float() @ weight.float().T)
        wide = torch.randn(rows, 70, generator=random)
        _compare("linear", kernels.linear(wide, packed, 130), wide @ weight.float().T)
    gate_up = 4 * torch.randn(3, 70, generator=random)
    gate, up = gate_up.chunk(2, dim=-1)
    _compare("silu_mul", kernels.silu_mul(gate_up), functional.silu(gate) * up)
    expected = gate_up * torch.rsqrt(gate_up.pow(2).mean(-1, keepdim=True) + 1e-5)
    _compare("rms_norm", kernels.rms_norm(gate_up, torch.ones(70), 1e-5), expected)


def _compare(name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    error = ((found.float() - expected).abs().max() / expected.abs().max()).item()
    if not error <= _MAX_ERROR:  # so that NaN is an error too
        raise NativeBuildError(
            f"kernel {name} is off by {error:.2g} on this CPU, allowed is {_MAX_ERROR:.2g};"
            " set attention_backend to reference and report the CPU's model"
        )
