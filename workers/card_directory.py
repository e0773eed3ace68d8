"""Reads a Hugging Face model directory into a ModelConfig and a TextCard. No torch."""

import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from workers.card_fields import Fields, read_text
from workers.card_tokenizer import TextCard, checked_tokenizer
from workers.models.config import (
    DTYPES,
    Dtype,
    Family,
    LinearScaling,
    Llama3Scaling,
    ModelConfig,
    ModelError,
    RopeScaling,
    YarnScaling,
)

ARCHITECTURES: Mapping[str, Family] = MappingProxyType(
    {
        "LlamaForCausalLM": "llama",
        "MistralForCausalLM": "mistral",
        "Qwen2ForCausalLM": "qwen2",
        "Qwen3ForCausalLM": "qwen3",
        "MiMoForCausalLM": "qwen2",
    }
)
_DEFAULT_EPS = 1e-6
_DEFAULT_THETA = 10000.0
_SLIDING = "sliding_attention"
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read_directory_config(folder: Path) -> ModelConfig:
    """Return the decoder config.json describes. Raise ModelError for missing keys and unsupported kinds."""
    fields = Fields.read(folder / "config.json")
    return read_decoder_config(fields, _family(fields))


def read_decoder_config(fields: Fields, family: Family) -> ModelConfig:
    """Return the decoder that a config.json describes, taken for one of `family`. Raises as above."""
    if fields.optional("quantization_config", dict) is not None:
        raise ModelError(
            f"{fields.path}: quantization_config: quantised safetensors are not supported; "
            "use the unquantised model or a GGUF file"
        )
    activation = fields.optional("hidden_act", str) or "silu"
    if activation != "silu":
        raise ModelError(f"{fields.path}: hidden_act is {activation!r}; 'silu' is supported")
    hidden_size, num_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    num_layers = fields.integer("num_hidden_layers")
    window, full_layers = _window(fields, family, num_layers)
    biased = fields.boolean("attention_bias", False)
    context_len = fields.integer("max_position_embeddings")
    return ModelConfig(
        family=family,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=fields.integer("num_key_value_heads", num_heads),
        head_dim=fields.integer("head_dim", 128 if family == "qwen3" else hidden_size // num_heads),
        rms_norm_eps=fields.number("rms_norm_eps", _DEFAULT_EPS),
        rope_theta=_rope_theta(fields),
        max_context_len=context_len,
        dtype=_dtype(fields),
        rope_scaling=_rope_scaling(fields, context_len),
        tied_embeddings=fields.boolean("tie_word_embeddings", False),
        qkv_bias=family == "qwen2" or (family in ("llama", "qwen3") and biased),
        output_bias=family in ("llama", "qwen3") and biased,
        mlp_bias=family == "llama" and fields.boolean("mlp_bias", False),
        qk_norm=family == "qwen3",
        sliding_window=window,
        full_layers=full_layers,
        num_mtp_layers=fields.integer("num_nextn_predict_layers", 0, minimum=0),
    )


def read_directory_text(folder: Path) -> TextCard:
    """Return the tokenizer, chat template and end tokens of a model directory."""
    path = folder / "tokenizer.json"
    tokenizer_json = read_text(path)
    tokenizer = checked_tokenizer(tokenizer_json, path)
    settings = Fields.read_optional(folder / "tokenizer_config.json")
    generation = Fields.read_optional(folder / "generation_config.json")
    config = Fields.read(folder / "config.json")
    special = {
        name: token for name in _SPECIAL_NAMES if (token := _special_token(settings, name)) is not None
    }
    ids = {name: tokenizer.token_to_id(token) for name, token in special.items()}
    declared = generation.token_ids("eos_token_id") or config.token_ids("eos_token_id")
    eos = ids.get("eos_token")
    ends = tuple(dict.fromkeys([*([] if eos is None else [eos]), *declared]))
    bos = ids.get("bos_token")
    if bos is None and (declared_bos := config.token_ids("bos_token_id")):
        bos = declared_bos[0]
    return TextCard(
        tokenizer_json=tokenizer_json,
        chat_template=_chat_template(folder, settings),
        special_tokens=tuple(special.items()),
        bos_token_id=bos,
        eos_token_id=ends[0] if ends else None,
        end_token_ids=ends,
    )


def _family(fields: Fields) -> Family:
    architectures = fields.strings("architectures")
    for architecture in architectures:
        if architecture in ARCHITECTURES:
            return ARCHITECTURES[architecture]
    allowed = ", ".join(ARCHITECTURES)
    raise ModelError(f"{fields.path}: architectures is {architectures!r}; supported: {allowed}")


def _dtype(fields: Fields) -> Dtype:
    name = fields.optional("torch_dtype", str) or fields.optional("dtype", str) or "float32"
    for dtype in DTYPES:
        if name == dtype:
            return dtype
    raise ModelError(f"{fields.path}: torch_dtype is {name!r}; supported: {', '.join(DTYPES)}")


def _window(fields: Fields, family: Family, num_layers: int) -> tuple[int | None, tuple[int, ...]]:
    """Return the sliding window and the layers without one. Qwen's is off unless use_sliding_window."""
    if family == "llama" or (family != "mistral" and not fields.boolean("use_sliding_window", False)):
        return None, ()
    window = (
        fields.integer("sliding_window", 4096) if "sliding_window" in fields or family != "mistral" else None
    )
    if window is None or family == "mistral":
        return window, ()
    kinds = fields.strings("layer_types")
    if not kinds:
        first = fields.integer("max_window_layers", 28, minimum=0)
        return window, tuple(range(min(first, num_layers)))
    if len(kinds) != num_layers:
        raise ModelError(f"{fields.path}: layer_types has {len(kinds)} entries for {num_layers} layers")
    return window, tuple(layer for layer, kind in enumerate(kinds) if kind != _SLIDING)


def _rope_theta(fields: Fields) -> float:
    for source in (fields.part("rope_parameters"), fields, fields.part("rope_scaling")):
        if "rope_theta" in source:
            return source.number("rope_theta")
    return _DEFAULT_THETA


def _rope_scaling(fields: Fields, context_len: int) -> RopeScaling | None:
    rope = fields.part("rope_parameters") if "rope_parameters" in fields else fields.part("rope_scaling")
    kind = rope.optional("rope_type", str) or rope.optional("type", str) or "default"
    if rope.number("partial_rotary_factor", 1.0) != 1.0 or fields.number("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError(
            f"{fields.path}: partial_rotary_factor: RoPE over a part of the head is not supported"
        )
    if kind == "default":
        return None
    owner = fields if "original_max_position_embeddings" in fields else rope
    if kind == "linear":
        return LinearScaling(rope.number("factor"))
    original = owner.integer("original_max_position_embeddings", context_len)
    if kind == "llama3":
        return Llama3Scaling(
            rope.number("factor"), rope.number("low_freq_factor"), rope.number("high_freq_factor"), original
        )
    if kind == "yarn":
        factor = rope.number("factor", context_len / original)
        return YarnScaling(
            factor=factor,
            original_context_len=original,
            attention_factor=_yarn_attention_factor(rope, factor),
            beta_fast=rope.number("beta_fast", 32.0) or 32.0,
            beta_slow=rope.number("beta_slow", 1.0) or 1.0,
            truncate=rope.boolean("truncate", True),
        )
    raise ModelError(
        f"{fields.path}: RoPE type {kind!r} is not supported; supported: default, linear, llama3, yarn"
    )


def _yarn_attention_factor(rope: Fields, factor: float) -> float:
    if "attention_factor" in rope:
        return rope.number("attention_factor")

    def scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    mscale, mscale_all_dim = rope.number("mscale", 0.0), rope.number("mscale_all_dim", 0.0)
    return scale(mscale) / scale(mscale_all_dim) if mscale and mscale_all_dim else scale(1.0)


def _special_token(settings: Fields, name: str) -> str | None:
    value = settings.value(name)
    if isinstance(value, dict):  # a serialised AddedToken
        value = value.get("content")
    if value is None or isinstance(value, str):
        return value
    raise ModelError(f"{settings.path}: {name} is {value!r:.60}; a token's text is needed")


def _chat_template(folder: Path, settings: Fields) -> str | None:
    path = folder / "chat_template.jinja"
    if path.exists():
        return read_text(path)
    value = settings.value("chat_template")
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    if value is None or isinstance(value, str):
        return value
    raise ModelError(f"{settings.path}: chat_template is {value!r:.60}; a template's text is needed")
