"""The shapes that the GPU's benchmarks and storms run, and WorkerConfig's options on their command lines."""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from tests.harness import write_tiny_model
from workers.config import WorkerConfig

LLAMA_8B = {
    "vocab_size": 128_256,
    "hidden_size": 4_096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 8_192,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
LLAMA_70B_SLICE = LLAMA_8B | {
    "hidden_size": 8_192,
    "intermediate_size": 28_672,
    "num_hidden_layers": 32,
    "num_attention_heads": 64,
}
"""Of Llama-3-70B's 80 layers as many as fit one card of 80 GB with the KV of 256 requests."""
SMOL_135M = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1_536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8_192,
    "rope_theta": 100_000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
SMALL = {
    "vocab_size": 4_096,
    "hidden_size": 512,
    "intermediate_size": 1_024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 8_192,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
"""For tools that slow the card down a hundredfold."""
TINY = {"vocab_size": 2_048, "max_position_embeddings": 8_192}
"""For rehearsals without a GPU: whatever is left out of write_tiny_model's shape."""
SHAPES: dict[str, dict[str, Any]] = {
    "llama8b": LLAMA_8B,
    "llama70b": LLAMA_70B_SLICE,
    "smol135m": SMOL_135M,
    "small": SMALL,
    "tiny": TINY,
}


def shape_config(folder: Path, shape: str, options: dict[str, Any]) -> WorkerConfig:
    """Return the options of a model with random weights, whose description is written to `folder`; of any
    other that the service knows where no shape has its name."""
    if shape not in SHAPES:
        return WorkerConfig(model=shape, **options)
    model = write_tiny_model(folder / shape, **SHAPES[shape])
    return WorkerConfig(model=str(model), load_format="dummy", **options)


def worker_options(texts: dict[str, str | None]) -> dict[str, Any]:
    """Return WorkerConfig's options from the command line's texts; those not given are left out.

    Raise ValueError for what it does not allow.
    """
    found = {}
    types = {field.name: field.type for field in dataclasses.fields(WorkerConfig)}
    for name in option_names():
        if (text := texts.get(name)) is None:
            continue
        value: object = text
        with contextlib.suppress(json.JSONDecodeError):
            value = json.loads(text)
        try:
            found[name] = TypeAdapter(types[name]).validate_python(value)
        except ValidationError as error:
            raise ValueError(f"{name}: found {text}; {error.errors()[0]['msg']}") from error
    return found


def option_names() -> list[str]:
    """WorkerConfig's options that a command line may give: all but what the benchmark itself decides."""
    decided = ("model", "load_format", "device", "dtype", "tp_size")
    return [field.name for field in dataclasses.fields(WorkerConfig) if field.name not in decided]
