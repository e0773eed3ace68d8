"""RMSNorm, computed in float32 and rounded once before the weight, as the models were trained."""

import torch
from torch import nn

from workers.layers.kernels import LayerKernels
from workers.layers.linear import Delta, Partial


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (https://arxiv.org/abs/1910.07467)."""

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size, dtype=dtype, device=device), requires_grad=False)
        self._eps = eps
        self._kernels: LayerKernels | None = None

    def adopt(self, kernels: LayerKernels) -> None:
        """Compute by compiled kernels from now on."""
        self._kernels = kernels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise [..., size]; returns x's dtype."""
        if self._kernels is not None:
            rows = x.reshape(-1, x.shape[-1])
            return self._kernels.rms_norm(rows, self.weight, self._eps).view(x.shape)
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self._eps)
        return self.weight * (wide * scale).to(x.dtype)

    def add(self, x: torch.Tensor, delta: Delta) -> tuple[torch.Tensor, torch.Tensor]:
        """Return x + delta and that normalised, [rows, size] each. A Partial is summed on the way."""
        if isinstance(delta, Partial):
            return delta.sums.sum_add_rms_norm(x, delta.part, self.weight, self._eps)
        if self._kernels is not None:
            return self._kernels.add_rms_norm(x, delta, self.weight, self._eps)
        total = x + delta
        normalised: torch.Tensor = self(total)
        return total, normalised
