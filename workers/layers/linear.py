"""Linear and RowParallelLinear: the only place where a model multiplies by its weights.

The loader fills `weight`; compiled kernels may then take it over in a form of their own (`adopt`).
Column parallelism needs no class of its own: a rank's Linear simply has its share of the rows.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from workers.layers.kernels import LayerKernels, Matmul
from workers.one_shot_sums import RankSums
from workers.parallel import TPGroup


@dataclass(frozen=True)
class Partial:
    """This rank's `part` [tokens, features] of a sum over the ranks that is yet to be made, once, by all of
    them together: whoever reads it next makes it, in one kernel with what that computes."""

    part: torch.Tensor
    sums: RankSums


Delta = torch.Tensor | Partial
"""What is to be added to a residual stream, [tokens, features]"""


def summed(delta: Delta) -> torch.Tensor:
    """Return the sum over the ranks, [tokens, features], made now if it was not."""
    return delta.sums.sum(delta.part) if isinstance(delta, Partial) else delta


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
        self._matmul: Matmul | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [tokens, in_features] to [tokens, out_features]."""
        if self._matmul is not None:
            return self._matmul(x)
        return functional.linear(x, self.weight, self.bias)

    def adopt(self, kernels: LayerKernels) -> None:
        """Hand the loaded weight to a kernel; the plain copy is dropped if the kernel takes it."""
        bias = None if self.bias is None else self.bias.detach()
        self._matmul = kernels.matmul(self.weight.detach(), bias)
        if self._matmul is not None:
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

    def project(self, x: torch.Tensor) -> Delta:
        """Map this rank's features [tokens, in_features] to the group's sum [tokens, out_features]: to this
        rank's part of it, where that is summed sooner by its reader."""
        y = self(x)
        sums = self._group.one_shot
        if sums is not None and self.summed_bias is None and sums.takes(y):
            return Partial(y, sums)
        total = self._group.sum(y)
        return total if self.summed_bias is None else total + self.summed_bias


def zeros(*shape: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """Return a parameter of zeros that takes no gradient."""
    return nn.Parameter(torch.zeros(shape, dtype=dtype, device=device), requires_grad=False)
