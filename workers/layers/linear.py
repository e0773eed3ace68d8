"""Linear and RowParallelLinear: the only place where a model multiplies by its weights.

The loader fills `weight`; a compiled CPU kernel may then take it over in its own packed form (`pack`).
Column parallelism needs no class of its own: a rank's Linear simply has its share of the rows.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from workers.parallel import TPGroup

Matmul = Callable[[torch.Tensor], torch.Tensor]
"""x [tokens, in_features] -> [tokens, out_features], bias included."""

Packer = Callable[[torch.Tensor, torch.Tensor | None], Matmul | None]
"""(weight [out_features, in_features], bias) -> the kernel's matmul; None where it has none for the shape."""


class Linear(nn.Module):
    """y = x W^T + b. Weights start as zeros on `device`."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.weight = zeros(out_features, in_features, dtype=dtype, device=device)
        self.bias = zeros(out_features, dtype=dtype, device=device) if bias else None
        self._packed: Matmul | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [tokens, in_features] to [tokens, out_features]."""
        if self._packed is not None:
            return self._packed(x)
        return functional.linear(x, self.weight, self.bias)

    def pack(self, packer: Packer) -> None:
        """Hand the loaded weight to a kernel; the plain copy is dropped if the kernel takes it."""
        packed = packer(self.weight.detach(), None if self.bias is None else self.bias.detach())
        if packed is not None:
            self._packed = packed
            self.weight = zeros(0, 0, dtype=self.weight.dtype, device=self.weight.device)


class RowParallelLinear(Linear):
    """A Linear whose input features are divided among the ranks: partial products are summed, then biased."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
        group: TPGroup,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias and group.size == 1, dtype=dtype, device=device)
        self._group = group
        self.summed_bias = (
            zeros(out_features, dtype=dtype, device=device) if bias and group.size > 1 else None
        )

    @property
    def whole_bias(self) -> nn.Parameter | None:
        """The bias, wherever it is added."""
        return self.bias if self.bias is not None else self.summed_bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map this rank's features [tokens, in_features] to the group's sum [tokens, out_features]."""
        y = super().forward(x)
        self._group.all_reduce(y)
        return y if self.summed_bias is None else y + self.summed_bias


def zeros(*shape: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """Return a parameter of zeros that takes no gradient."""
    return nn.Parameter(torch.zeros(shape, dtype=dtype, device=device), requires_grad=False)
