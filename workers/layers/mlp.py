"""GatedMLP: down(silu(gate(x)) * up(x)), its intermediate features divided among the ranks."""

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional

from workers.layers.kernels import LayerKernels, Matmul
from workers.layers.linear import Delta, Linear, RowParallelLinear
from workers.layers.placement import Placement, Run, shard_run, whole
from workers.models.config import ModelConfig
from workers.models.sharding import ceil_div
from workers.parallel import TPGroup


class GatedMLP(nn.Module):
    """One fused projection makes gate and up: rows of gate_up.weight are [ gate | up ]."""

    def __init__(
        self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device, group: TPGroup
    ) -> None:
        super().__init__()
        self._config = config
        self._rank = group.rank
        self._share = ceil_div(config.intermediate_size, group.size)
        self.gate_up = Linear(
            config.hidden_size, 2 * self._share, bias=config.mlp_bias, dtype=dtype, device=device
        )
        self.down = RowParallelLinear(
            self._share,
            config.hidden_size,
            bias=config.mlp_bias,
            dtype=dtype,
            device=device,
            group=group,
        )
        self._kernels: LayerKernels | None = None
        self._gated: Matmul | None = None

    def adopt(self, kernels: LayerKernels) -> None:
        """Gate by a compiled kernel from now on; the projections adopt theirs themselves, after this."""
        assert self.gate_up.weight.numel() > 0, "gate_up has given its weight away"
        self._kernels = kernels
        bias = None if self.gate_up.bias is None else self.gate_up.bias.detach()
        self._gated = kernels.gated_matmul(self.gate_up.weight.detach(), bias)

    def placements(self) -> Iterator[tuple[str, Placement]]:
        """Yield checkpoint names (under the layer's mlp) and where this rank's share goes."""
        config, share = self._config, self._share
        runs = shard_run(config.intermediate_size, self._rank, share)
        for name, start in (("gate_proj", 0), ("up_proj", share)):
            rows = tuple(Run(start + run.target, run.source, run.length) for run in runs)
            shape = (config.intermediate_size, config.hidden_size)
            yield f"{name}.weight", Placement(self.gate_up.weight, shape, rows)
            if self.gate_up.bias is not None:
                yield f"{name}.bias", Placement(self.gate_up.bias, shape[:1], rows)
        shape = (config.hidden_size, config.intermediate_size)
        all_rows = (Run(0, 0, config.hidden_size),)
        yield "down_proj.weight", Placement(self.down.weight, shape, all_rows, runs)
        if self.down.whole_bias is not None:
            yield "down_proj.bias", whole(self.down.whole_bias)

    def forward(self, x: torch.Tensor) -> Delta:
        """Map [tokens, hidden] (normalised) to [tokens, hidden]."""
        return self.down.project(self._gate(x))

    def _gate(self, x: torch.Tensor) -> torch.Tensor:
        if self._gated is not None:
            return self._gated(x)
        gate_up: torch.Tensor = self.gate_up(x)
        if self._kernels is not None:
            return self._kernels.silu_mul(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate) * up
