"""cuda_kernels: whether a decoder on a device computes by these kernels. Imports Triton only when asked."""

import logging
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from workers.triton_kernels.layer_kernels import Switches, TritonKernels

logger = logging.getLogger(__name__)


class TritonMissingError(RuntimeError):
    """Triton cannot be imported here."""


def cuda_kernels(
    device: torch.device, dtype: torch.dtype, switches: "Switches | None" = None
) -> "TritonKernels | None":
    """Return the kernels for a decoder of `dtype` on `device`; None: they are not for it, torch computes.

    Raises TritonMissingError on a CUDA device without Triton.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return None
    try:
        from workers.triton_kernels.launching import has_dependent_launch
        from workers.triton_kernels.layer_kernels import ALL_ON, TritonKernels
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "triton":
            raise
        raise TritonMissingError(
            f"the CUDA kernels need Triton, which comes with torch's CUDA builds and is not here ({error});"
            " install such a torch, or `pip install triton`"
        ) from error
    return TritonKernels(has_dependent_launch(device), switches or ALL_ON)


def dependent_launch(device: torch.device) -> bool:
    """Tell whether kernels on a CUDA device may begin before those in front of them have ended."""
    from workers.triton_kernels.launching import has_dependent_launch

    return has_dependent_launch(device)
