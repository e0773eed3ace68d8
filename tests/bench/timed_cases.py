"""What bench_kernels measures: each kernel's inputs, arms, result in float64, and the bytes it moves."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional

from workers.layers.norm import RMSNorm
from workers.layers.rotary import rotate
from workers.models.config import ModelConfig
from workers.triton_kernels.layer_kernels import TritonKernels

CUDA = torch.device("cuda")
DTYPE = torch.bfloat16
PAGE_SIZE = 16
NUM_PAGES = 2048

LLAMA_8B = ModelConfig(
    family="llama",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    rope_theta=500_000.0,
    max_context_len=8192,
    dtype="bfloat16",
)
SMOL_135M = ModelConfig(
    family="llama",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    rms_norm_eps=1e-5,
    rope_theta=100_000.0,
    max_context_len=8192,
    dtype="bfloat16",
    tied_embeddings=True,
)
LLAMA_8B_HALF = replace(LLAMA_8B, num_heads=16, num_kv_heads=4, intermediate_size=7_168, vocab_size=64_128)
"""What each of two ranks computes"""
MODELS = {"llama8b": LLAMA_8B, "llama8b_half": LLAMA_8B_HALF, "smol135m": SMOL_135M}


@dataclass(frozen=True)
class TimedCase:
    """`arms` by name: "ours", "torch" and others; each takes a set of inputs and returns one tensor."""

    name: str
    num_bytes: int
    """Read and written by one call, each byte once."""
    inputs: Callable[[int], dict[str, Any]]
    """By seed; inputs that a call changes are its own."""
    arms: dict[str, Callable[..., torch.Tensor]]
    exact: Callable[..., torch.Tensor]
    """float64"""
    is_index: bool = False
    """The result is equal or wrong."""
    checked: dict[str, Callable[..., torch.Tensor]] | None = None
    """Arms as they are checked, where a result has to be looked for."""


def randn(*shape, seed, dtype=DTYPE, scale=1.0):
    generator = torch.Generator(CUDA).manual_seed(seed)
    return (torch.randn(*shape, generator=generator, device=CUDA, dtype=torch.float32) * scale).to(dtype)


def projections(config):
    """Return (name, in_features, out_features) of a layer's products, and of the head."""
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    return (
        ("qkv", config.hidden_size, heads),
        ("output", config.num_heads * config.head_dim, config.hidden_size),
        ("gate_up", config.hidden_size, 2 * config.intermediate_size),
        ("down", config.intermediate_size, config.hidden_size),
        ("head", config.hidden_size, config.vocab_size),
    )


def timed_cases(config: ModelConfig, rows: int, kernels: TritonKernels):
    """Yield every kernel in the model's shapes at `rows` tokens."""
    for name, depth, width in projections(config):
        yield _product(name, depth, width, rows, kernels)
    yield _gated(config, rows, kernels)
    yield from _norms(config, rows, kernels)
    yield _activation(config, rows, kernels)
    yield _rotation(config, rows, kernels)
    yield _write(config, rows, kernels, rotates=False)
    yield _write(config, rows, kernels, rotates=True)
    yield _greedy(config, rows, kernels)


def double_product(x, weight):
    """Return x W^T in float64, some rows of W at a time."""
    return torch.cat([x.double() @ part.double().T for part in weight.split(16384)], dim=1)


def _product_of(kernels, weight):
    """Return x W^T as a Linear computes it: by ours, or where there is none of ours by torch."""
    return kernels.matmul(weight, None) or (lambda x: functional.linear(x, weight))


def _product(name, depth, width, rows, kernels):
    def inputs(seed):
        weight = randn(width, depth, seed=seed + 1000, scale=depth**-0.5)
        return {
            "x": randn(rows, depth, seed=seed),
            "weight": weight,
            "product": _product_of(kernels, weight),
        }

    return TimedCase(
        name=name,
        num_bytes=2 * (depth * width + rows * (depth + width)),
        inputs=inputs,
        arms={
            "ours": lambda x, weight, product: product(x),
            "torch": lambda x, weight, product: functional.linear(x, weight),
        },
        exact=lambda x, weight, product: double_product(x, weight),
    )


def _gated(config, rows, kernels):
    depth, width = config.hidden_size, config.intermediate_size

    def inputs(seed):
        weight = randn(2 * width, depth, seed=seed + 1000, scale=depth**-0.5)
        return {
            "x": randn(rows, depth, seed=seed),
            "weight": weight,
            "product": _product_of(kernels, weight),
            "gated": kernels.gated_matmul(weight, None),
        }

    def exact(x, weight, product, gated):
        gate, up = double_product(x, weight).chunk(2, dim=-1)
        return functional.silu(gate) * up

    return TimedCase(
        name="gated",
        num_bytes=2 * (2 * depth * width + rows * (depth + width)),
        inputs=inputs,
        arms={
            "ours": lambda x, weight, product, gated: gated(x),
            "two_of_ours": lambda x, weight, product, gated: kernels.silu_mul(product(x)),
            "torch_and_ours": lambda x, weight, product, gated: kernels.silu_mul(
                functional.linear(x, weight)
            ),
            "torch": lambda x, weight, product, gated: _torch_silu_mul(functional.linear(x, weight)),
        },
        exact=exact,
    )


def _norms(config, rows, kernels):
    size, eps = config.hidden_size, config.rms_norm_eps
    layer = RMSNorm(size, eps, dtype=DTYPE, device=CUDA)
    layer.weight.copy_(randn(size, seed=1))

    def exact(x, delta=None):
        wide = (x if delta is None else x + delta).double()
        return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * layer.weight.double()

    yield TimedCase(
        name="rms_norm",
        num_bytes=2 * (2 * rows * size + size),
        inputs=lambda seed: {"x": randn(rows, size, seed=seed)},
        arms={"ours": lambda x: kernels.rms_norm(x, layer.weight, eps), "torch": layer},
        exact=exact,
    )
    yield TimedCase(
        name="add_rms_norm",
        num_bytes=2 * (4 * rows * size + size),
        inputs=lambda seed: {
            "x": randn(rows, size, seed=seed),
            "delta": randn(rows, size, seed=seed + 1000),
        },
        arms={
            "ours": lambda x, delta: kernels.add_rms_norm(x, delta, layer.weight, eps)[1],
            "torch": lambda x, delta: layer.add(x, delta)[1],
        },
        exact=exact,
    )


def _torch_silu_mul(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


def _activation(config, rows, kernels):
    size = config.intermediate_size
    return TimedCase(
        name="silu_mul",
        num_bytes=2 * 3 * rows * size,
        inputs=lambda seed: {"gate_up": randn(rows, 2 * size, seed=seed)},
        arms={"ours": kernels.silu_mul, "torch": _torch_silu_mul},
        exact=lambda gate_up: _torch_silu_mul(gate_up.double()),
    )


def _angles(config, rows, seed):
    angle = randn(rows, config.head_dim // 2, seed=seed, dtype=torch.float32)
    table = torch.cat([angle.cos(), angle.sin()], dim=-1).to(DTYPE)
    return table.unsqueeze(1).chunk(2, dim=-1)


def _rotation(config, rows, kernels):
    heads, dim = config.num_heads + config.num_kv_heads, config.head_dim
    all_heads = heads + config.num_kv_heads

    def inputs(seed):
        cos, sin = _angles(config, rows, seed)
        return {"qkv": randn(rows, all_heads, dim, seed=seed), "cos": cos, "sin": sin}

    return TimedCase(
        name="rotate",
        num_bytes=2 * rows * dim * (2 * heads + 1),
        inputs=inputs,
        arms={
            "ours": lambda qkv, cos, sin: kernels.rotate_(qkv[:, :heads], cos, sin),
            "torch": lambda qkv, cos, sin: rotate(qkv[:, :heads], cos, sin),
        },
        exact=lambda qkv, cos, sin: rotate(qkv[:, :heads].double(), cos.double(), sin.double()),
    )


def _write(config, rows, kernels, *, rotates):
    """The result is what was written: K and V, and the rotated q."""
    q_heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    pools = torch.zeros(NUM_PAGES, 2, PAGE_SIZE, kv_heads, dim, dtype=DTYPE, device=CUDA).unbind(1)

    def inputs(seed):
        cos, sin = _angles(config, rows, seed)
        order = torch.randperm(
            NUM_PAGES * PAGE_SIZE, generator=torch.Generator(CUDA).manual_seed(seed), device=CUDA
        )
        qkv = randn(rows, q_heads + 2 * kv_heads, dim, seed=seed)
        return {"qkv": qkv, "cos": cos, "sin": sin, "locations": order[:rows].clone()}

    def parts(qkv):
        return qkv.split([q_heads, kv_heads, kv_heads], dim=1)

    def torch_write(k, v, locations):
        pages, offsets = locations // PAGE_SIZE, locations % PAGE_SIZE
        pools[0][pages, offsets] = k
        pools[1][pages, offsets] = v

    def at_once(qkv, cos, sin, locations):
        q, k, v = parts(qkv)
        kernels.rotate_and_write_kv(q, k, v, cos, sin, locations, *pools)
        return q

    def one_by_one(qkv, cos, sin, locations):
        rotated = kernels.rotate_(qkv[:, : q_heads + kv_heads], cos, sin)
        kernels.write_kv(rotated[:, q_heads:], qkv[:, q_heads + kv_heads :], locations, *pools)
        return rotated[:, :q_heads]

    def by_torch(qkv, cos, sin, locations):
        rotated = rotate(qkv[:, : q_heads + kv_heads], cos, sin)
        torch_write(rotated[:, q_heads:], qkv[:, q_heads + kv_heads :], locations)
        return rotated[:, :q_heads]

    def ours_write(qkv, cos, sin, locations):
        _, k, v = parts(qkv)
        kernels.write_kv(k, v, locations, *pools)
        return pools[0]

    def only_write(qkv, cos, sin, locations):
        _, k, v = parts(qkv)
        torch_write(k, v, locations)
        return pools[0]

    def written(arm):
        def result(qkv, cos, sin, locations):
            """Poison the places, write, and return what is there."""
            for pool in pools:
                pool.view(torch.int16).fill_(-1)
            q = arm(qkv, cos, sin, locations)
            pages, offsets = locations // PAGE_SIZE, locations % PAGE_SIZE
            found = torch.cat([pool[pages, offsets] for pool in pools], dim=1)
            return torch.cat([q, found], dim=1) if rotates else found

        return result

    def exact(qkv, cos, sin, locations):
        q, k, v = parts(qkv.double())
        if not rotates:
            return torch.cat([k, v], dim=1)
        angles = cos.double(), sin.double()
        return torch.cat([rotate(q, *angles), rotate(k, *angles), v], dim=1)

    arms = (
        {"ours": at_once, "two_of_ours": one_by_one, "torch": by_torch}
        if rotates
        else {"ours": ours_write, "torch": only_write}
    )
    moved = 4 * kv_heads + (2 * q_heads + 1 if rotates else 0)
    return TimedCase(
        name="rotate_and_write_kv" if rotates else "write_kv",
        num_bytes=2 * rows * dim * moved + 8 * rows,
        inputs=inputs,
        arms=arms,
        exact=exact,
        checked={name: written(arm) for name, arm in arms.items()},
    )


def _greedy(config, rows, kernels):
    return TimedCase(
        name="greedy_tokens",
        num_bytes=rows * (2 * config.vocab_size + 8),
        inputs=lambda seed: {"logits": randn(rows, config.vocab_size, seed=seed)},
        arms={"ours": kernels.greedy_tokens, "torch": lambda logits: logits.argmax(dim=-1)},
        exact=lambda logits: logits.double().argmax(dim=-1),
        is_index=True,
    )
