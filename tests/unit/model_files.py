"""Small model files for the tests of cards and weights: directories and GGUF files with random weights."""

import json
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import quantize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

Q = GGMLQuantizationType

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
    "eos_token_id": 2,
}
TEXTS = [
    "It was the best of times, it was the worst of times, in 1859.",
    "Call me Ishmael. Some years ago, never mind how long precisely, I thought I'd sail.",
    "All happy families are alike; each unhappy family is unhappy in its own way: 12345!",
    "naïve café, Zürich, Привет мир, こんにちは",
]


def byte_level_tokenizer(vocab_size: int = 300, pre_tokenizer=None) -> Tokenizer:
    """Train a byte-level BPE on a few sentences; ids 0-2 are <unk>, <s>, </s>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    return tokenizer


def write_directory(folder: Path, **changes) -> Path:
    """Write config.json, tokenizer.json and their companions, no weights. A change to None drops a key."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {key: value for key, value in (CONFIG | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    byte_level_tokenizer().save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": "{{ messages }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def stored(rng: np.random.Generator, rows: int, columns: int, kind: GGMLQuantizationType) -> np.ndarray:
    """Return random [rows, columns] as `kind` stores them. K-quants, which the gguf package cannot write, are
    random blocks with sane scales."""
    if kind in (Q.Q4_K, Q.Q6_K):
        block_len, block_bytes = GGML_QUANT_SIZES[kind]
        blocks = rng.integers(0, 256, (rows * columns // block_len, block_bytes), dtype=np.uint8)
        scale = rng.uniform(0.0005, 0.001, (len(blocks), 1)).astype(np.float16).view(np.uint8)
        if kind == Q.Q4_K:  # d and dmin are the first two halves
            blocks[:, 0:2] = blocks[:, 2:4] = scale
        else:  # d is the last half
            blocks[:, -2:] = scale
        return blocks.reshape(rows, -1)
    return quantize(rng.normal(0, columns**-0.5, (rows, columns)).astype(np.float32), kind)


class GGUFModel:
    """A random model as a GGUF file of any supported architecture; `kinds` are dealt out to its matrices."""

    hidden, intermediate, heads, kv_heads, vocab = 256, 512, 4, 2, 300

    def __init__(self, path: Path, architecture: str, kinds: list[GGMLQuantizationType]) -> None:
        self.path = path
        self.architecture = architecture
        self.kinds = kinds
        self.tokenizer = byte_level_tokenizer(self.vocab)
        self.num_layers = 2
        self.head_dim = 128 if architecture == "qwen3" else 64  # transformers takes qwen3's for granted
        self._dealt = 0
        self._rng = np.random.default_rng(7)

    def write(
        self, *, tied: bool = False, skip: str = "", extra=None, tokens=None, pre: str = "gpt-2"
    ) -> Path:
        """Write the file, leaving out the tensor or metadata key `skip`; `extra` may add to the writer."""
        self._dealt = 0
        self._rng = np.random.default_rng(7)
        writer = GGUFWriter(self.path, self.architecture)
        name = self.architecture
        values = {
            f"{name}.block_count": self.num_layers,
            f"{name}.context_length": 128,
            f"{name}.embedding_length": self.hidden,
            f"{name}.feed_forward_length": self.intermediate,
            f"{name}.attention.head_count": self.heads,
            f"{name}.attention.head_count_kv": self.kv_heads,
            f"{name}.attention.key_length": self.head_dim,
        }
        writer.add_string("general.name", "random")
        for key, value in values.items():
            if key != skip:
                writer.add_uint32(key, value)
        writer.add_float32(f"{name}.attention.layer_norm_rms_epsilon", 1e-5)
        writer.add_float32(f"{name}.rope.freq_base", 10000.0)
        if tokens is None:
            self._write_tokenizer(writer, pre)
        else:
            tokens(writer)
        for tensor, array, kind in self._tensors(tied):
            if tensor != skip:
                writer.add_tensor(tensor, array, raw_dtype=kind)
        if extra is not None:
            extra(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return self.path

    def _write_tokenizer(self, writer: GGUFWriter, pre: str) -> None:
        description = json.loads(self.tokenizer.to_str())["model"]
        tokens = sorted(description["vocab"], key=description["vocab"].get)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
        writer.add_token_merges([" ".join(merge) for merge in description["merges"]])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_chat_template("{{ messages }}")

    def _tensors(self, tied: bool):
        heads, kv_heads = self.heads * self.head_dim, self.kv_heads * self.head_dim
        yield self._matrix("token_embd.weight", self.vocab, self.hidden)
        for layer in range(self.num_layers):
            block = f"blk.{layer}"
            yield self._vector(f"{block}.attn_norm.weight", self.hidden)
            yield self._vector(f"{block}.ffn_norm.weight", self.hidden)
            yield self._matrix(f"{block}.attn_q.weight", heads, self.hidden)
            yield self._matrix(f"{block}.attn_k.weight", kv_heads, self.hidden)
            yield self._matrix(f"{block}.attn_v.weight", kv_heads, self.hidden)
            yield self._matrix(f"{block}.attn_output.weight", self.hidden, heads)
            yield self._matrix(f"{block}.ffn_gate.weight", self.intermediate, self.hidden)
            yield self._matrix(f"{block}.ffn_up.weight", self.intermediate, self.hidden)
            yield self._matrix(f"{block}.ffn_down.weight", self.hidden, self.intermediate)
            if self.architecture == "qwen2":
                yield self._vector(f"{block}.attn_q.bias", heads)
                yield self._vector(f"{block}.attn_k.bias", kv_heads)
                yield self._vector(f"{block}.attn_v.bias", kv_heads)
            if self.architecture == "qwen3":
                yield self._vector(f"{block}.attn_q_norm.weight", self.head_dim)
                yield self._vector(f"{block}.attn_k_norm.weight", self.head_dim)
        yield self._vector("output_norm.weight", self.hidden)
        if not tied:
            yield self._matrix("output.weight", self.vocab, self.hidden)

    def _matrix(self, name: str, rows: int, columns: int):
        kind = self.kinds[self._dealt % len(self.kinds)]
        self._dealt += 1
        return name, stored(self._rng, rows, columns, kind), kind

    def _vector(self, name: str, size: int):
        return name, self._rng.normal(0.5, 0.3, size).astype(np.float32), Q.F32
