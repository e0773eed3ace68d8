"""Fills a Decoder with weights and names them: safetensors, GGUF or seeded dummy weights.

Every rank reads the whole checkpoint once, keeps its own shard and hashes all bytes, so that all ranks arrive
at one digest.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import msgspec
import torch
import xxhash

from workers.card import ModelCard, fetch_weights
from workers.card_files import safetensors_files
from workers.draft_layouts import is_mtp_tensor
from workers.models.config import Dtype, ModelConfig, ModelError
from workers.models.decoder import Decoder
from workers.models.filling import check_complete, fill_dummy, one_thread, place, safetensors_weights
from workers.models.gguf import gguf_weights
from workers.models.stored_tensor import StoredTensor
from workers.parallel import TPGroup

_IGNORED_SUFFIXES = ("rotary_emb.inv_freq", "rope_freqs.weight")
_DTYPES: dict[Dtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class LoadedModel:
    """A filled decoder. `weights_digest`: xxh3-128 (hex) over all weight bytes, equal on every rank."""

    decoder: Decoder
    weights_digest: str
    dtype: torch.dtype


def load_model(
    card: ModelCard,
    *,
    group: TPGroup,
    device: torch.device,
    dtype: Literal["auto"] | Dtype = "auto",
    load_format: Literal["auto", "dummy"] = "auto",
    seed: int = 0,
    max_context_len: int | None = None,
) -> LoadedModel:
    """Build this rank's shard of the card's model and fill it.

    `max_context_len` bounds the RoPE table (None: the model's). Raise ModelError for missing, unknown or
    misshapen tensors and for files that are cut short.
    """
    config = card.config
    torch_dtype = _DTYPES[config.dtype if dtype == "auto" else dtype]
    with one_thread():
        decoder = Decoder(
            config, dtype=torch_dtype, device=device, group=group, max_context_len=max_context_len
        )
        if load_format == "dummy":
            fill_dummy(decoder.placements(), seed)
            digest = _dummy_digest(config, seed, device)
        else:
            digest = _fill(decoder, card.source, checkpoint_tensors(card))
    return LoadedModel(decoder.eval(), digest, torch_dtype)


def checkpoint_tensors(card: ModelCard) -> Iterator[StoredTensor]:
    """Yield all tensors of the card's files, in file order."""
    if card.is_gguf:
        return gguf_weights(card.source, card.config)
    return safetensors_weights(_weight_files(card))


def _fill(decoder: Decoder, source: Path, tensors: Iterator[StoredTensor]) -> str:
    placements = decoder.placements()
    missing = set(placements)
    digest = xxhash.xxh3_128()
    for tensor in tensors:
        digest.update(f"{tensor.name} {tensor.kind} {tensor.shape}\n".encode())
        digest.update(tensor.raw().data)
        placement = placements.get(tensor.name)
        if placement is not None:
            place(placement, tensor, source)
            missing.discard(tensor.name)
        elif not _is_ignored(tensor.name, decoder.config):
            raise ModelError(
                f"{source}: tensor {tensor.name} belongs to no part of this {decoder.config.family}"
            )
    check_complete(missing, source)
    return digest.hexdigest()


def _is_ignored(name: str, config: ModelConfig) -> bool:
    """Say whether a tensor is legal but not used: derived tables, a head that equals the embedding, and
    layers that draft."""
    return (
        name.endswith(_IGNORED_SUFFIXES)
        or (config.tied_embeddings and name == "lm_head.weight")
        or (config.num_mtp_layers > 0 and is_mtp_tensor(name, config.num_layers))
    )


def _dummy_digest(config: ModelConfig, seed: int, device: torch.device) -> str:
    settings = {
        "seed": seed,
        "device": device.type,
        "scaling": type(config.rope_scaling).__name__,
        **asdict(config),
    }
    return xxhash.xxh3_128(msgspec.json.encode(settings, order="sorted")).hexdigest()


def _weight_files(card: ModelCard) -> list[Path]:
    if card.hub is not None:
        fetch_weights(card.hub, card.source)
    files = safetensors_files(card.source)
    if not files:
        raise ModelError(f"{card.source}: no *.safetensors file; safetensors and .gguf weights are supported")
    return files
