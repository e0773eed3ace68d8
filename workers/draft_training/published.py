"""Writes a draft as EAGLE-3 drafts are published: config.json and model.safetensors. The loader reads it
back, to train on as to serve.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from workers.card import ModelCard
from workers.draft_training.vocabulary import DraftVocabulary
from workers.layers.placement import Placement
from workers.models.config import LinearScaling, Llama3Scaling, ModelConfig, YarnScaling
from workers.models.decoder import Decoder

_LAYER, _PUBLISHED_LAYER = "layers.0.", "midlayer."


def draft_config(target: ModelCard, draft_vocab_size: int) -> dict[str, Any]:
    """Return config.json of a draft in the target's shape.

    The taps are EAGLE-3's own, so no list of layers is needed. The residual stream begins with the
    normalised feature: taps grow with the target's depth, and what is not normalised drowns the layer.
    """
    config = target.config
    found: dict[str, Any] = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "draft_vocab_size": draft_vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_context_len,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "norm_before_residual": True,
        "torch_dtype": "bfloat16",
    }
    scaling = _rope_scaling(config)
    return found if scaling is None else {**found, "rope_scaling": scaling}


def initial_weights(
    target: ModelCard, decoder: Decoder, vocabulary: DraftVocabulary, seed: int
) -> dict[str, Tensor]:
    """Return a draft to begin with, by own names, float32: random, but for what the target knows already,
    its final norm and its head's rows for the draft's tokens."""
    config = target.config
    hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
    shapes = {
        "fc.weight": (hidden, 3 * hidden),
        f"{_LAYER}self_attn.q_proj.weight": (config.num_heads * dim, 2 * hidden),
        f"{_LAYER}self_attn.k_proj.weight": (config.num_kv_heads * dim, 2 * hidden),
        f"{_LAYER}self_attn.v_proj.weight": (config.num_kv_heads * dim, 2 * hidden),
        f"{_LAYER}self_attn.o_proj.weight": (hidden, config.num_heads * dim),
        f"{_LAYER}mlp.gate_proj.weight": (inner, hidden),
        f"{_LAYER}mlp.up_proj.weight": (inner, hidden),
        f"{_LAYER}mlp.down_proj.weight": (hidden, inner),
    }
    generator = torch.Generator().manual_seed(seed)
    found = {
        name: torch.randn(shape, generator=generator) * shape[-1] ** -0.5 for name, shape in shapes.items()
    }
    for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm"):
        found[f"{_LAYER}{name}.weight"] = torch.ones(hidden)
    found["norm.weight"] = decoder.norm.weight.detach().float().cpu()
    rows = vocabulary.target_ids.to(decoder.head.weight.device)
    found["lm_head.weight"] = decoder.head.weight.detach()[rows].float().cpu()
    return found


def collected(placements: Mapping[str, Placement]) -> dict[str, Tensor]:
    """Return a draft's weights by own names, from where its one rank has them; float32, on the CPU."""
    found = {}
    for name, placement in placements.items():
        weight = torch.empty(placement.shape)
        for run in placement.rows:
            rows = placement.parameter.detach()[run.target : run.target + run.length].float().cpu()
            if placement.columns is None:
                weight[run.source : run.source + run.length] = rows
                continue
            for columns in placement.columns:
                weight[
                    run.source : run.source + run.length, columns.source : columns.source + columns.length
                ] = rows[:, columns.target : columns.target + columns.length]
        found[name] = weight
    return found


def write_draft(
    folder: Path,
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    vocabulary: DraftVocabulary,
    *,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write config.json and model.safetensors; the weights go by own names."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")
    tensors = {_published(name): weight.to(dtype).contiguous() for name, weight in weights.items()}
    partial = folder / "model.partial"
    save_file({**tensors, **vocabulary.tables()}, partial)
    partial.chmod(0o644)  # the library makes it the owner's alone
    partial.replace(folder / "model.safetensors")


def _published(name: str) -> str:
    return name.replace(_LAYER, _PUBLISHED_LAYER, 1)


def _rope_scaling(config: ModelConfig) -> dict[str, Any] | None:
    """Return the target's scaling. Factors of a GGUF file have no place in config.json: the draft, which is
    trained from nothing, does without."""
    scaling = config.rope_scaling
    if isinstance(scaling, LinearScaling):
        return {"rope_type": "linear", "factor": scaling.factor}
    if isinstance(scaling, Llama3Scaling):
        return {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context_len,
        }
    if isinstance(scaling, YarnScaling):
        return {
            "rope_type": "yarn",
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_context_len,
            "attention_factor": scaling.attention_factor,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "truncate": scaling.truncate,
        }
    return None
