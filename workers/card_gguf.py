"""Reads a .gguf file's metadata into a ModelConfig and a TextCard. Called by `workers.card`. No torch."""

import math
import mmap
import struct

from workers.card_fields import Fields
from workers.card_tokenizer import TextCard, Vocabulary, build_tokenizer_json
from workers.models.config import (
    Dtype,
    Family,
    FrequencyFactors,
    LinearScaling,
    ModelConfig,
    ModelError,
    RopeScaling,
    YarnScaling,
)
from workers.models.gguf_file import SUPPORTED_TYPES, GGUFFile, GGUFTensor

_FAMILIES: dict[str, Family] = {"llama": "llama", "mistral": "mistral", "qwen2": "qwen2", "qwen3": "qwen3"}
_FREQUENCY_FACTORS = "rope_freqs.weight"
_PLAIN_DTYPES: dict[str, Dtype] = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def read_gguf_config(file: GGUFFile) -> ModelConfig:
    """Return the decoder a GGUF file holds. Raise ModelError for missing keys and unsupported kinds."""
    fields = Fields(file.path, file.metadata)
    architecture = fields.need("general.architecture", str)
    if architecture not in _FAMILIES:
        allowed = ", ".join(sorted(_FAMILIES))
        raise ModelError(f"{file.path}: architecture {architecture!r} is not supported; supported: {allowed}")
    if fields.number("split.count", 1) > 1:
        raise ModelError(f"{file.path}: one part of a split file; merge the parts with gguf-split --merge")
    if fields.number(f"{architecture}.expert_count", 0):
        raise ModelError(
            f"{file.path}: a mixture of experts ({architecture}.expert_count); only dense models run"
        )
    hidden_size = fields.integer(f"{architecture}.embedding_length")
    num_heads = fields.integer(f"{architecture}.attention.head_count")
    head_dim = fields.integer(f"{architecture}.attention.key_length", hidden_size // num_heads)
    rotary_dim = fields.integer(f"{architecture}.rope.dimension_count", head_dim)
    if rotary_dim != head_dim:
        raise ModelError(
            f"{file.path}: {architecture}.rope.dimension_count is {rotary_dim} of a head's {head_dim} "
            "dimensions; RoPE over the whole head is supported"
        )
    context_len = fields.integer(f"{architecture}.context_length")
    window = fields.integer(f"{architecture}.attention.sliding_window", 0, minimum=0)
    return ModelConfig(
        family=_FAMILIES[architecture],
        vocab_size=_tensor(file, "token_embd.weight").shape[0],
        hidden_size=hidden_size,
        intermediate_size=fields.integer(f"{architecture}.feed_forward_length"),
        num_layers=fields.integer(f"{architecture}.block_count"),
        num_heads=num_heads,
        num_kv_heads=fields.integer(f"{architecture}.attention.head_count_kv", num_heads),
        head_dim=head_dim,
        rms_norm_eps=fields.number(f"{architecture}.attention.layer_norm_rms_epsilon"),
        rope_theta=fields.number(f"{architecture}.rope.freq_base", 10000.0),
        max_context_len=context_len,
        dtype=_dtype(file),
        rope_scaling=_rope_scaling(file, fields, architecture, context_len),
        tied_embeddings="output.weight" not in file.tensors,
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        output_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_down.bias" in file.tensors,
        qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
        sliding_window=window or None,
    )


def read_gguf_text(file: GGUFFile) -> TextCard:
    """Return the tokenizer, chat template and special tokens a GGUF file holds."""
    fields = Fields(file.path, file.metadata)
    fields.need("tokenizer.ggml.tokens", list)
    tokens = fields.strings("tokenizer.ggml.tokens")
    model = fields.need("tokenizer.ggml.model", str)
    named = {
        name: _token_id(fields, f"tokenizer.ggml.{key}_token_id", len(tokens))
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    spelled = {name: tokens[index] for name, index in named.items() if index is not None}
    is_sentencepiece = model == "llama"
    vocabulary = Vocabulary(
        path=file.path,
        model=model,
        pre=fields.optional("tokenizer.ggml.pre", str) or "default",
        tokens=tokens,
        token_types=fields.integers("tokenizer.ggml.token_type") or [1] * len(tokens),
        merges=fields.strings("tokenizer.ggml.merges") if "tokenizer.ggml.merges" in file.metadata else None,
        scores=fields.floats("tokenizer.ggml.scores"),
        unk_token=spelled.get("unk"),
        bos_token=spelled.get("bos"),
        eos_token=spelled.get("eos"),
        adds_bos=fields.boolean("tokenizer.ggml.add_bos_token", is_sentencepiece),
        adds_eos=fields.boolean("tokenizer.ggml.add_eos_token", False),
        adds_space_prefix=fields.boolean("tokenizer.ggml.add_space_prefix", is_sentencepiece),
    )
    for name, values in (("token_type", vocabulary.token_types), ("scores", vocabulary.scores)):
        if values is not None and len(values) != len(tokens):
            raise ModelError(
                f"{file.path}: tokenizer.ggml.{name} has {len(values)} entries for {len(tokens)} tokens"
            )
    ends = [
        named["eos"],
        *(_token_id(fields, f"tokenizer.ggml.{key}_token_id", len(tokens)) for key in ("eot", "eom")),
    ]
    return TextCard(
        tokenizer_json=build_tokenizer_json(vocabulary),
        chat_template=fields.optional("tokenizer.chat_template", str),
        special_tokens=tuple((f"{name}_token", token) for name, token in spelled.items()),
        bos_token_id=named["bos"],
        eos_token_id=named["eos"],
        end_token_ids=tuple(dict.fromkeys(end for end in ends if end is not None)),
    )


def _token_id(fields: Fields, key: str, vocab_size: int) -> int | None:
    if key not in fields:
        return None
    index = fields.integer(key, minimum=0)
    if index >= vocab_size:
        raise ModelError(f"{fields.path}: {key} is {index}; the vocabulary has {vocab_size} tokens")
    return index


def _dtype(file: GGUFFile) -> Dtype:
    """Return the dtype of the matrices; bfloat16 when any is quantised."""
    unsupported = {t.quantization for t in file.tensors.values()} - set(SUPPORTED_TYPES)
    if unsupported:
        found = ", ".join(sorted(kind.name for kind in unsupported))
        allowed = ", ".join(kind.name for kind in SUPPORTED_TYPES)
        raise ModelError(f"{file.path}: tensors of type {found} are not supported; supported: {allowed}")
    found_types = {t.quantization.name for t in file.tensors.values() if len(t.shape) > 1}
    if len(found_types) == 1:
        return _PLAIN_DTYPES.get(found_types.pop(), "bfloat16")
    return "bfloat16"


def _rope_scaling(file: GGUFFile, fields: Fields, architecture: str, context_len: int) -> RopeScaling | None:
    if _FREQUENCY_FACTORS in file.tensors:
        return FrequencyFactors(_read_floats(file, _tensor(file, _FREQUENCY_FACTORS)))
    prefix = f"{architecture}.rope.scaling"
    kind = fields.optional(f"{prefix}.type", str) or "none"
    if kind == "none":
        return None
    factor = fields.number(f"{prefix}.factor")
    if kind == "linear":
        return LinearScaling(factor)
    if kind == "yarn":
        original = fields.integer(f"{prefix}.original_context_length", context_len)
        paper = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
        return YarnScaling(factor, original, paper * fields.number(f"{prefix}.attn_factor", 1.0))
    raise ModelError(f"{file.path}: {prefix}.type is {kind!r}; none, linear and yarn are supported")


def _tensor(file: GGUFFile, name: str) -> GGUFTensor:
    try:
        return file.tensors[name]
    except KeyError:
        raise ModelError(f"{file.path}: tensor {name} is missing; the file holds no whole model") from None


def _read_floats(file: GGUFFile, tensor: GGUFTensor) -> tuple[float, ...]:
    if tensor.quantization.name != "F32":
        raise ModelError(f"{file.path}: tensor {tensor.name} is {tensor.quantization.name}; F32 is needed")
    with file.path.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return struct.unpack_from(f"<{tensor.num_bytes // 4}f", content, tensor.offset)
