"""Rotary position embedding (https://arxiv.org/abs/2104.09864), halves layout, and its context scalings."""

import math

import torch
from torch import nn

from workers.models.config import (
    FrequencyFactors,
    LinearScaling,
    Llama3Scaling,
    ModelConfig,
    YarnScaling,
)


class Rotary(nn.Module):
    """Tables of cos and sin for positions 0 .. max_positions - 1, in the model's dtype."""

    table: torch.Tensor

    def __init__(
        self, config: ModelConfig, max_positions: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        frequencies, scale = inverse_frequencies(config)
        angles = torch.arange(max_positions, dtype=torch.float32)[:, None] * frequencies
        table = torch.cat([angles.cos() * scale, angles.sin() * scale], dim=-1)
        # [max_positions, head_dim]: cos in the first half, sin in the second
        self.register_buffer("table", table.to(device=device, dtype=dtype), persistent=False)

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin of positions [tokens], each [tokens, 1, head_dim / 2]."""
        cos, sin = self.table[positions].unsqueeze(1).chunk(2, dim=-1)
        return cos, sin


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate [tokens, heads, head_dim] by its tokens' angles; returns a new tensor."""
    first, second = heads.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def inverse_frequencies(config: ModelConfig) -> tuple[torch.Tensor, float]:
    """Return the inverse frequencies [head_dim / 2] (float32) and the factor on cos and sin."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    plain = 1.0 / (config.rope_theta**exponents)
    scaling = config.rope_scaling
    if scaling is None:
        return plain, 1.0
    if isinstance(scaling, LinearScaling):
        return plain / scaling.factor, 1.0
    if isinstance(scaling, FrequencyFactors):
        return plain / torch.tensor(scaling.factors, dtype=torch.float32), 1.0
    if isinstance(scaling, Llama3Scaling):
        return _llama3(plain, scaling), 1.0
    return _yarn(config, scaling), scaling.attention_factor


def _llama3(plain: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    """Wavelengths beyond original / low are stretched, those under original / high kept, a ramp between."""
    wavelengths = 2 * math.pi / plain
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = (scaling.original_context_len / wavelengths - low) / (high - low)
    ramp = (1 - smooth) * plain / scaling.factor + smooth * plain
    stretched = torch.where(wavelengths > scaling.original_context_len / low, plain / scaling.factor, ramp)
    return torch.where(wavelengths < scaling.original_context_len / high, plain, stretched)


def _yarn(config: ModelConfig, scaling: YarnScaling) -> torch.Tensor:
    """Dimensions that turn more than beta_fast times over the original context are kept, those under
    beta_slow are interpolated, a linear ramp between (the paper's section 3.2)."""
    dim, base = config.head_dim, config.rope_theta

    def dimension_turning(num_turns: float) -> float:
        return dim * math.log(scaling.original_context_len / (num_turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension_turning(scaling.beta_fast), dimension_turning(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a ramp of no width would divide by zero
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    frequencies = base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    kept, interpolated = 1.0 / frequencies, 1.0 / (scaling.factor * frequencies)
    return interpolated * ramp + kept * (1 - ramp)
