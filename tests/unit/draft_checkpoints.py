"""Small random drafts for the tiny target of `draft_models`, written as they are published."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.unit.model_files import CONFIG, write_directory

HIDDEN, INNER, VOCAB, NUM_LAYERS = 32, 48, 300, 4
KV_SIZE = 16
DRAFT_VOCAB = 60
Weights = dict[str, torch.Tensor]


def layer_shapes(prefix: str, input_size: int = HIDDEN) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}post_attention_layernorm.weight": (HIDDEN,),
        f"{prefix}self_attn.q_proj.weight": (HIDDEN, input_size),
        f"{prefix}self_attn.k_proj.weight": (KV_SIZE, input_size),
        f"{prefix}self_attn.v_proj.weight": (KV_SIZE, input_size),
        f"{prefix}self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        f"{prefix}mlp.gate_proj.weight": (INNER, HIDDEN),
        f"{prefix}mlp.up_proj.weight": (INNER, HIDDEN),
        f"{prefix}mlp.down_proj.weight": (HIDDEN, INNER),
    }


def filled(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> Weights:
    """Return random float32 weights; norms are near 1, so that leaving one out shows."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        weights[name] = values * shape[-1] ** -0.5 if len(shape) > 1 else 1 + 0.3 * values
    return weights


def eagle_weights(num_layers: int = 1, *, bias: bool = True, seed: int = 0) -> Weights:
    """EAGLE-1's: no input_layernorm in layer 0."""
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (HIDDEN, 2 * HIDDEN)}
    if bias:
        shapes["fc.bias"] = (HIDDEN,)
    for layer in range(num_layers):
        shapes |= layer_shapes(f"layers.{layer}.")
        if layer > 0:
            shapes[f"layers.{layer}.input_layernorm.weight"] = (HIDDEN,)
    return filled(shapes, seed)


def eagle3_weights(layer: str = "midlayer.", prefix: str = "", seed: int = 0) -> Weights:
    """EAGLE-3's, with its tables; SafeAILab and SpecForge call the layer `midlayer`, others `layers.0`."""
    shapes = {
        f"{prefix}fc.weight": (HIDDEN, 3 * HIDDEN),
        f"{prefix}norm.weight": (HIDDEN,),
        "lm_head.weight": (DRAFT_VOCAB, HIDDEN),
        f"{prefix}{layer}hidden_norm.weight": (HIDDEN,),
        f"{prefix}{layer}input_layernorm.weight": (HIDDEN,),
        **layer_shapes(f"{prefix}{layer}", 2 * HIDDEN),
    }
    return filled(shapes, seed) | tables()


def tables() -> Weights:
    """d2t and t2d of DRAFT_VOCAB random target ids in order."""
    generator = torch.Generator().manual_seed(11)
    ids = torch.randperm(VOCAB, generator=generator)[:DRAFT_VOCAB].sort().values
    marks = torch.zeros(VOCAB, dtype=torch.bool)
    marks[ids] = True
    return {"d2t": ids - torch.arange(DRAFT_VOCAB), "t2d": marks}


def mtp_weights(layout: str = "deepseek", seed: int = 0) -> Weights:
    """The MTP layer of a target of NUM_LAYERS layers."""
    if layout == "mimo":
        prefix = "model.mtp_layers.0."
        names = ("token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm")
    else:
        prefix = f"model.layers.{NUM_LAYERS}."
        names = ("enorm", "hnorm", "eh_proj", "shared_head.norm")
    embedding_norm, feature_norm, projection, norm = names
    shapes = {
        f"{prefix}{embedding_norm}.weight": (HIDDEN,),
        f"{prefix}{feature_norm}.weight": (HIDDEN,),
        f"{prefix}{projection}.weight": (HIDDEN, 2 * HIDDEN),
        f"{prefix}{norm}.weight": (HIDDEN,),
        f"{prefix}input_layernorm.weight": (HIDDEN,),
        **layer_shapes(prefix),
    }
    if layout == "mimo":
        for name, size in (("q", HIDDEN), ("k", KV_SIZE), ("v", KV_SIZE)):
            shapes[f"{prefix}self_attn.{name}_proj.bias"] = (size,)
    return filled(shapes, seed)


def target_weights(*, biased: bool = False, seed: int = 1) -> Weights:
    """The tiny target's own tensors."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "lm_head.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for layer in range(NUM_LAYERS):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}input_layernorm.weight": (HIDDEN,), **layer_shapes(prefix)}
        for name, size in (("q", HIDDEN), ("k", KV_SIZE), ("v", KV_SIZE)) if biased else ():
            shapes[f"{prefix}self_attn.{name}_proj.bias"] = (size,)
    return filled(shapes, seed)


def write_draft(folder: Path, weights: Weights, *, pickled: bool = False, **changes) -> Path:
    """Write a draft's directory: config.json and the weights, no tokenizer. A change to None drops a key."""
    folder.mkdir(parents=True, exist_ok=True)
    config = CONFIG | {"num_hidden_layers": 1, "torch_dtype": "float32"} | changes
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    if pickled:
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file(weights, folder / "model.safetensors")
    return folder


def write_target_with_mtp(folder: Path, layout: str = "deepseek") -> Path:
    """Write a target whose checkpoint holds an MTP layer as well."""
    architecture = "MiMoForCausalLM" if layout == "mimo" else "LlamaForCausalLM"
    write_directory(
        folder,
        architectures=[architecture],
        num_hidden_layers=NUM_LAYERS,
        torch_dtype="float32",
        num_nextn_predict_layers=1,
    )
    weights = target_weights(biased=layout == "mimo") | mtp_weights(layout)
    save_file(weights, folder / "model.safetensors")
    return folder
