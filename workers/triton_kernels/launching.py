"""How kernels of one stream overlap: programmatic dependent launch, from compute capability 9 on.

A kernel launched with `launch_pdl` may begin once every program of the kernel before it has called
`let_next_begin`. Until its own `await_inputs` it may read matrices of weights, which nobody writes, and write
nothing. Every program of every such kernel calls both: who has waited for the kernel before has thereby
waited for all before that.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def let_next_begin(PDL: tl.constexpr):
    """Allow the next kernel to begin once every program has come here."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def await_inputs(PDL: tl.constexpr):
    """Wait until the kernels before have written everything."""
    if PDL:
        gdc_wait()


@triton.jit
def prefetch(pointers):
    """Bring the 128 bytes at each address closer, into the second-level cache, without waiting for them."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


def has_dependent_launch(device: torch.device) -> bool:
    """Tell whether kernels on `device` can begin before those in front of them have ended."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def launch_options(pdl: bool) -> dict[str, bool]:
    """Return what a launch says beside its arguments; the interpreter on a CPU knows none of it."""
    return {"launch_pdl": True} if pdl else {}
