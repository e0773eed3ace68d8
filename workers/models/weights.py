"""Fills a Decoder with weights and names them: safetensors, GGUF or seeded dummy weights.

Every rank reads the whole checkpoint once, keeps its own shard and hashes all bytes, so that all ranks arrive
at one digest. Tensors are streamed: beside the shard, at most one tensor's chunk of rows is in memory.
"""

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open

from workers.card import ModelCard, fetch_weights
from workers.card_fields import Fields
from workers.layers.placement import Placement
from workers.models.config import Dtype, ModelConfig, ModelError
from workers.models.decoder import Decoder
from workers.models.gguf import gguf_weights
from workers.models.stored_tensor import Octets, StoredTensor
from workers.parallel import TPGroup

_CHUNK_BYTES = 32 << 20
"""Of float32 rows converted at a time."""
_DUMMY_ROWS = 256
"""Rows of a dummy tensor made from one seed."""
_DRAWN_ON_DEVICE = 1 << 22
"""Dummy tensors of more values are drawn by the device that holds them: one core takes a minute for 8
billion. Smaller ones are the CPU's, so that a tiny model is the same everywhere."""
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
    with _one_thread():
        decoder = Decoder(
            config, dtype=torch_dtype, device=device, group=group, max_context_len=max_context_len
        )
        if load_format == "dummy":
            _fill_dummy(decoder, seed)
            digest = _dummy_digest(config, seed, device)
        else:
            digest = _fill(decoder, card.source, checkpoint_tensors(card))
    return LoadedModel(decoder.eval(), digest, torch_dtype)


def checkpoint_tensors(card: ModelCard) -> Iterator[StoredTensor]:
    """Yield all tensors of the card's files, in file order."""
    if card.is_gguf:
        return gguf_weights(card.source, card.config)
    return _safetensors_weights(_weight_files(card))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep torch to one thread: waking others for thousands of small copies takes 11 s instead of 1.6 s for
    SmolLM2 when the cores are shared."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


class _SafetensorsWeight:
    """One tensor of an open safetensors file, mapped, not copied."""

    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        self.name = name
        self.shape = tuple(tensor.shape)
        self.kind = str(tensor.dtype)
        self._tensor = tensor

    def raw(self) -> Octets:
        octets: Octets = self._tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        return octets

    def rows(self, first: int, last: int) -> torch.Tensor:
        return self._tensor[first:last]


class _DummyWeight:
    """Random values that depend on (seed, name, row), so that every rank count gives the same model.

    Where `device` draws them itself they are those of its kind of device.
    """

    kind = "dummy"

    def __init__(self, name: str, shape: tuple[int, ...], seed: int, device: torch.device) -> None:
        self.name = name
        self.shape = shape
        self._seed = seed
        self._device = device if math.prod(shape) > _DRAWN_ON_DEVICE else torch.device("cpu")

    def raw(self) -> Octets:
        return np.empty(0, np.uint8)

    def rows(self, first: int, last: int) -> torch.Tensor:
        if len(self.shape) == 1:
            if self.name.endswith("norm.weight"):
                return torch.ones(last - first)
            return self._chunk(0, self.shape[0])[first:last] * 0.1
        start = first // _DUMMY_ROWS * _DUMMY_ROWS
        chunks = [
            self._chunk(row, min(_DUMMY_ROWS, self.shape[0] - row)) for row in range(start, last, _DUMMY_ROWS)
        ]
        return torch.cat(chunks)[first - start : last - start]

    def _chunk(self, row: int, num_rows: int) -> torch.Tensor:
        word = hashlib.sha256(f"{self._seed}/{self.name}/{row}".encode()).digest()[:8]
        generator = torch.Generator(self._device).manual_seed(int.from_bytes(word, "little") >> 1)
        shape = (num_rows, *self.shape[1:])
        # Matrices keep the scale of what they multiply.
        scale = self.shape[-1] ** -0.5 if len(shape) > 1 else 1.0
        return torch.empty(shape, device=self._device).normal_(0.0, scale, generator=generator)


def _fill(decoder: Decoder, source: Path, tensors: Iterator[StoredTensor]) -> str:
    placements = decoder.placements()
    missing = set(placements)
    digest = xxhash.xxh3_128()
    for tensor in tensors:
        digest.update(f"{tensor.name} {tensor.kind} {tensor.shape}\n".encode())
        digest.update(tensor.raw().data)
        placement = placements.get(tensor.name)
        if placement is not None:
            _place(placement, tensor, source)
            missing.discard(tensor.name)
        elif not _is_ignored(tensor.name, decoder.config):
            raise ModelError(
                f"{source}: tensor {tensor.name} belongs to no part of this {decoder.config.family}"
            )
    if missing:
        names = ", ".join(sorted(missing)[:5])
        raise ModelError(f"{source}: {len(missing)} tensors are missing, among them {names}")
    return digest.hexdigest()


def _is_ignored(name: str, config: ModelConfig) -> bool:
    """Say whether a tensor is legal but not used: derived tables, and a head that equals the embedding."""
    return name.endswith(_IGNORED_SUFFIXES) or (config.tied_embeddings and name == "lm_head.weight")


def _place(placement: Placement, tensor: StoredTensor, source: Path) -> None:
    if tensor.shape != placement.shape:
        raise ModelError(
            f"{source}: tensor {tensor.name} has shape {tensor.shape}; the configuration needs "
            f"{placement.shape}"
        )
    row_len = tensor.shape[1] if len(tensor.shape) > 1 else 1
    step = max(1, _CHUNK_BYTES // (4 * row_len))
    for run in placement.rows:
        for first in range(0, run.length, step):
            last = min(first + step, run.length)
            rows = tensor.rows(run.source + first, run.source + last)
            target = placement.parameter[run.target + first : run.target + last]
            if placement.columns is None:
                target.copy_(rows)
                continue
            for columns in placement.columns:
                target[:, columns.target : columns.target + columns.length].copy_(
                    rows[:, columns.source : columns.source + columns.length]
                )


def _fill_dummy(decoder: Decoder, seed: int) -> None:
    for name, placement in decoder.placements().items():
        weight = _DummyWeight(name, placement.shape, seed, placement.parameter.device)
        _place(placement, weight, Path("dummy"))


def _dummy_digest(config: ModelConfig, seed: int, device: torch.device) -> str:
    settings = {
        "seed": seed,
        "device": device.type,
        "scaling": type(config.rope_scaling).__name__,
        **asdict(config),
    }
    return xxhash.xxh3_128(msgspec.json.encode(settings, order="sorted")).hexdigest()


def _weight_files(card: ModelCard) -> list[Path]:
    """Return a directory's safetensors files, the sharded index's if there is one."""
    folder = card.source
    if card.hub is not None:
        fetch_weights(card.hub, folder)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        fields = Fields.read(index)
        files = [folder / name for name in sorted(set(fields.part("weight_map").all_strings()))]
        absent = [file.name for file in files if not file.exists()]
        if absent:
            raise ModelError(f"{index}: names {', '.join(absent[:5])}, which {folder} lacks")
        if files:
            return files
    single = folder / "model.safetensors"
    files = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder}: no *.safetensors file; safetensors and .gguf weights are supported")
    return files


def _safetensors_weights(files: list[Path]) -> Iterator[StoredTensor]:
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.offset_keys():
                    yield _SafetensorsWeight(name, file.get_tensor(name))
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{path}: not a whole safetensors file ({error}); is it truncated? Fetch it again"
            ) from error
