"""Builds a target's draft and fills it: from EAGLE and MTP checkpoints, with random weights, or with none.

As with targets, every rank reads the draft's tensors once, keeps its share and hashes all bytes.
"""

import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch
import xxhash

from workers.card import fetch_weights
from workers.card_files import PICKLED_WEIGHTS, draft_files
from workers.draft_card import DraftCard, check_tensors, read_tensor_names
from workers.draft_layouts import DraftKind, own_name
from workers.models.config import ModelError
from workers.models.decoder import Decoder
from workers.models.draft import DraftModel
from workers.models.draft_parts import DraftPlan
from workers.models.eagle_draft import Eagle3Draft, EagleDraft, MTPDraft
from workers.models.filling import (
    TorchWeight,
    check_complete,
    fill_dummy,
    one_thread,
    place,
    safetensors_weights,
)
from workers.models.self_draft import SelfDraft
from workers.parallel import TPGroup

_IGNORED_SUFFIX = "rotary_emb.inv_freq"
_TO_TARGET, _IN_DRAFT = "d2t", "t2d"
"""EAGLE-3's tables: what to add to a draft id to get its target id, and whether a target id has one."""
PublishedDraft = EagleDraft | Eagle3Draft | MTPDraft
_MODELS: Mapping[DraftKind, Callable[[DraftPlan], PublishedDraft]] = MappingProxyType(
    {"eagle": EagleDraft, "eagle3": Eagle3Draft, "mtp": MTPDraft}
)


@dataclass(frozen=True)
class LoadedDraft:
    """A filled draft. `weights_digest`: xxh3-128 (hex) over all its weight bytes, equal on every rank."""

    model: DraftModel
    weights_digest: str


def load_draft(
    card: DraftCard,
    decoder: Decoder,
    *,
    group: TPGroup,
    device: torch.device,
    dtype: torch.dtype,
    load_format: Literal["auto", "dummy"] = "auto",
    seed: int = 0,
) -> LoadedDraft:
    """Build this rank's shard of the card's draft beside the loaded `decoder` and fill it.

    Group, device and dtype are the decoder's. Cards without files get seeded random weights, as all do with
    `load_format` dummy. Raise ModelError for missing, unknown or misshapen tensors, for tables that name
    no token, and for files that are cut short or hold more than tensors.
    """
    assert group is decoder.group, "a draft shares its target's ranks"
    if card.kind == "self":
        return LoadedDraft(SelfDraft(decoder), _digest_of_settings(card, device, 0))
    with one_thread():
        if card.source is None or load_format == "dummy":
            return _dummy_draft(card, decoder, device, dtype, seed)
        checkpoint = _Checkpoint(card, card.source)
        plan = DraftPlan(card, decoder, frozenset(checkpoint.own_names.values()), dtype, device)
        model = _MODELS[card.kind](plan)
        digest = _fill(model, checkpoint, card.source, card)
        model.ends.share_copies()
    return LoadedDraft(model, digest)


def _dummy_draft(
    card: DraftCard, decoder: Decoder, device: torch.device, dtype: torch.dtype, seed: int
) -> LoadedDraft:
    model = _MODELS[card.kind](DraftPlan(card, decoder, frozenset(), dtype, device))
    # names of their own: the target's random head would be the draft's as well
    fill_dummy({f"draft.{name}": placement for name, placement in model.placements().items()}, seed)
    if isinstance(model, Eagle3Draft) and card.draft_vocab_size < card.config.vocab_size:
        # strided, so that a test's tokens are among them wherever they lie
        ids = torch.arange(card.draft_vocab_size) * card.config.vocab_size // card.draft_vocab_size
        model.target_id_table = ids.to(device)
    return LoadedDraft(model, _digest_of_settings(card, device, seed))


def _digest_of_settings(card: DraftCard, device: torch.device, seed: int) -> str:
    return xxhash.xxh3_128(f"{card.digest()}/{device.type}/{seed}".encode()).hexdigest()


class _Checkpoint:
    """The draft's tensors in its files, and what they are called here; others' are not read."""

    def __init__(self, card: DraftCard, folder: Path) -> None:
        self._files = _files(card, folder)
        self._pickled = _read_pickle(self._files[0]) if self._files[0].name == PICKLED_WEIGHTS else None
        published = (
            [name for file in self._files for name in read_tensor_names(file)]
            if self._pickled is None
            else list(self._pickled)
        )
        check_tensors(card, published)
        found = {name: own_name(name, card.mtp_layout, card.target_num_layers) for name in published}
        self.own_names = {name: own for name, own in found.items() if own is not None}

    def tensors(self) -> Iterator[TorchWeight]:
        """Yield the draft's tensors, in file order."""
        if self._pickled is None:
            yield from safetensors_weights(self._files, self.own_names)
        else:
            for name in self.own_names:
                yield TorchWeight(name, self._pickled[name])


def _files(card: DraftCard, folder: Path) -> list[Path]:
    """Return the weight files of a draft's folder, fetched if they are a hub draft's."""
    if card.hub is not None:
        fetch_weights(card.hub, folder)
        if not draft_files(folder):
            fetch_weights(card.hub, folder, [PICKLED_WEIGHTS])
    files = draft_files(folder)
    if not files:
        raise ModelError(f"{folder}: no weights; *.safetensors or {PICKLED_WEIGHTS} is needed")
    return files


def _read_pickle(file: Path) -> dict[str, torch.Tensor]:
    """Return a pickled state dict; nothing but tensors is unpickled."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{file}: cannot be read as tensors alone ({reason}); is it truncated, or does it hold more? "
            "Save it as model.safetensors"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise ModelError(f"{file}: holds {type(content).__name__}; tensors by name are needed")
    return {str(name): tensor for name, tensor in content.items()}


def _fill(model: PublishedDraft, checkpoint: _Checkpoint, source: Path, card: DraftCard) -> str:
    placements = model.placements()
    missing = set(placements)
    tables: dict[str, torch.Tensor] = {}
    digest = xxhash.xxh3_128()
    for weight in checkpoint.tensors():
        own = checkpoint.own_names[weight.name]
        digest.update(f"{weight.name} {weight.kind} {weight.shape}\n".encode())
        digest.update(weight.raw().data)
        if own in placements:
            place(placements[own], weight, source)
            missing.discard(own)
        elif own in (_TO_TARGET, _IN_DRAFT) and isinstance(model, Eagle3Draft):
            tables[own] = weight.tensor.clone()
        elif not own.endswith(_IGNORED_SUFFIX):
            raise ModelError(f"{source}: tensor {weight.name} belongs to no part of this {card.kind} draft")
    check_complete(missing, source)
    if isinstance(model, Eagle3Draft) and _TO_TARGET in tables:
        ids = _target_ids(tables, source, card)
        model.target_id_table = ids.to(placements["norm.weight"].parameter.device)
    return digest.hexdigest()


def _target_ids(tables: Mapping[str, torch.Tensor], source: Path, card: DraftCard) -> torch.Tensor:
    """Return the target id of each draft id, [draft vocabulary] int64, of a draft's tables."""
    offsets, vocab_size = tables[_TO_TARGET], card.config.vocab_size
    if tuple(offsets.shape) != (card.draft_vocab_size,) or offsets.is_floating_point():
        raise ModelError(
            f"{source}: tensor d2t is {offsets.dtype} {tuple(offsets.shape)}; whole numbers "
            f"({card.draft_vocab_size},) are needed"
        )
    ids = offsets.long() + torch.arange(card.draft_vocab_size)
    known = np.unique(ids.numpy())
    if len(known) != len(ids) or known[0] < 0 or known[-1] >= vocab_size:
        raise ModelError(
            f"{source}: tensor d2t leads from {len(ids)} draft ids to {len(known)} target ids of "
            f"{known[0]} to {known[-1]}; each needs its own below {vocab_size}"
        )
    marks = tables.get(_IN_DRAFT)
    if marks is not None and not np.array_equal(np.flatnonzero(marks.numpy()), known):
        raise ModelError(f"{source}: tensor t2d marks other target ids than those d2t leads to")
    return ids
