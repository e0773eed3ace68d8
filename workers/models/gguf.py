"""Reads weights from a GGUF file: Hugging Face names, dequantised by rows, q and k in the halves layout.

Called by `workers.models.weights` while a worker starts.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from workers.models.config import ModelConfig, ModelError
from workers.models.gguf_file import GGUFTensor, read_gguf
from workers.models.stored_tensor import Octets, StoredTensor

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_PERMUTED = ("attn_q", "attn_k")
_ROPE_FACTORS = "rope_freqs.weight"
_PIECE_LEN = 1 << 18
"""Values dequantised at a time."""


class GGUFWeight:
    """One tensor of a mapped file."""

    def __init__(self, tensor: GGUFTensor, name: str, content: Octets, head_dim: int | None) -> None:
        self.name = name
        self.shape = tensor.shape
        self.kind = tensor.quantization.name
        self._quantization = tensor.quantization
        self._head_dim = head_dim
        """Of a tensor whose rows llama.cpp interleaved for its RoPE; None for the others."""
        self._octets = content[tensor.offset : tensor.offset + tensor.num_bytes]

    def raw(self) -> Octets:
        """Return the bytes as stored."""
        return self._octets

    def rows(self, first: int, last: int) -> torch.Tensor:
        """Return rows [first, last) in float32."""
        if self._head_dim is None:
            return self._stored_rows(first, last)
        # Stored row 2 * d + s of a head is row s * head_dim / 2 + d of the halves layout; heads come whole
        #   stored  0  1  2  3  4  5        halves  0  2  4 | 1  3  5
        dim = self._head_dim
        start, end = first // dim * dim, -(-last // dim) * dim
        stored = self._stored_rows(start, end)
        halves = stored.view(-1, dim // 2, 2, *stored.shape[1:]).transpose(1, 2).reshape(stored.shape)
        return halves[first - start : last - start]

    def _stored_rows(self, first: int, last: int) -> torch.Tensor:
        if len(self.shape) == 1:  # its entries are rows here; it is small
            return torch.from_numpy(_dequantized(self._octets, self._quantization))[first:last]
        row_bytes = self._octets.size // self.shape[0]
        values = _dequantized(self._octets[first * row_bytes : last * row_bytes], self._quantization)
        return torch.from_numpy(values).view(-1, *self.shape[1:])


def gguf_weights(path: Path, config: ModelConfig) -> Iterator[StoredTensor]:
    """Yield the tensors of a GGUF file in file order. Raise ModelError for a name no decoder has."""
    file = read_gguf(path)
    content = np.asarray(np.memmap(path, mode="r", dtype=np.uint8))  # slices of a plain array are cheap
    for tensor in sorted(file.tensors.values(), key=lambda tensor: tensor.offset):
        permuted = config.family in ("llama", "mistral") and tensor.name.split(".")[-2] in _PERMUTED
        yield GGUFWeight(tensor, _name(path, tensor.name), content, config.head_dim if permuted else None)


def _name(path: Path, name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    if name == _ROPE_FACTORS:
        return name
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _IN_LAYER:
        return f"model.layers.{parts[1]}.{_IN_LAYER[parts[2]]}.{parts[3]}"
    raise ModelError(f"{path}: tensor {name} belongs to no supported decoder")


def _dequantized(octets: Octets, quantization: GGMLQuantizationType) -> npt.NDArray[np.float32]:
    """Return all values of whole blocks, flat. Pieces that fit a cache take half the package's own time."""
    block_len, block_bytes = GGML_QUANT_SIZES[quantization]
    values = np.empty(octets.size // block_bytes * block_len, np.float32)
    blocks_per_piece = _PIECE_LEN // block_len
    for block in range(0, octets.size // block_bytes, blocks_per_piece):
        piece = octets[block * block_bytes : (block + blocks_per_piece) * block_bytes]
        floats = dequantize(piece.reshape(1, -1), quantization).reshape(-1)
        values[block * block_len : block * block_len + floats.size] = floats
    return values
