"""ModelConfig: the shape and the switches of a decoder, whatever file they were read from.

Written by `workers.card`, read by the decoder, the weight loaders and the bundle layout. No torch.
"""

from dataclasses import dataclass
from typing import Literal, get_args

Family = Literal["llama", "mistral", "qwen2", "qwen3"]
FAMILIES: tuple[Family, ...] = get_args(Family)

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)


class ModelError(Exception):
    """A model cannot be read or served; the message names the file, what was found and what is allowed."""


@dataclass(frozen=True)
class LinearScaling:
    """All positions divided by `factor`."""

    factor: float


@dataclass(frozen=True)
class Llama3Scaling:
    """Low frequencies divided by `factor`, high ones kept, a ramp between (Llama 3.1)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context_len: int


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (https://arxiv.org/abs/2309.00071): a ramp over dimensions, and cos and sin scaled."""

    factor: float
    original_context_len: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True)
class FrequencyFactors:
    """Each inverse frequency divided by its own factor: how GGUF files store Llama 3's scaling."""

    factors: tuple[float, ...]


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling | FrequencyFactors


@dataclass(frozen=True)
class ModelConfig:
    """One decoder. Head counts are the model's own, before any sharding or padding."""

    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_context_len: int
    dtype: Dtype
    """Of the checkpoint; bfloat16 for quantised files."""
    rope_scaling: RopeScaling | None = None
    tied_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    """Bias of the attention's output projection."""
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMSNorm over each query and key head, before RoPE."""
    sliding_window: int | None = None
    """A token sees itself and the sliding_window - 1 tokens before it, in the layers that slide."""
    full_layers: tuple[int, ...] = ()
    """Layers that see the whole context in a model with a sliding window."""
    num_mtp_layers: int = 0
    """Layers behind the others in the checkpoint that predict further tokens: a draft."""

    def window_of(self, layer: int) -> int | None:
        """Return the sliding window of a layer; None: the layer sees the whole context."""
        return None if layer in self.full_layers else self.sliding_window
