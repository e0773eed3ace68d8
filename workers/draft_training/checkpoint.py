"""Checkpoints of a training run: weights, optimizer and how far it is, in pieces small enough to be moved
about, and written so that one that was cut off is not taken for a whole one."""

import hashlib
import io
import json
import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

MAX_PIECE_BYTES = 15 << 20
_INDEX = "checkpoint.json"


class CheckpointError(Exception):
    """A checkpoint cannot be read; the message names the file and what to do."""


@dataclass(frozen=True)
class _Index:
    """What a checkpoint consists of. Written last."""

    step: int
    pieces: list[str]
    sha256: str


def save_checkpoint(folder: Path, step: int, state: Mapping[str, Any]) -> None:
    """Write tensors and plain values as the checkpoint of `step`; the one before goes once it is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = io.BytesIO()
    torch.save(dict(state), stored)
    content = stored.getvalue()
    pieces = []
    for number, first in enumerate(range(0, len(content), MAX_PIECE_BYTES)):
        name = f"step-{step:07}.{number:02}.bin"
        (folder / name).write_bytes(content[first : first + MAX_PIECE_BYTES])
        pieces.append(name)
    index = _Index(step, pieces, hashlib.sha256(content).hexdigest())
    partial = folder / "checkpoint.partial"
    partial.write_text(json.dumps(asdict(index), indent=2) + "\n")
    partial.replace(folder / _INDEX)
    for old in folder.glob("step-*.bin"):
        if old.name not in pieces:
            old.unlink()


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """Return the last checkpoint's state, on the CPU; None where there is none. Nothing but tensors and plain
    values is unpickled. Raise CheckpointError where pieces are missing or are not those that were written."""
    file = folder / _INDEX
    if not file.exists():
        return None
    try:
        index = _Index(**json.loads(file.read_text()))
        content = b"".join((folder / piece).read_bytes() for piece in index.pieces)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{file}: its pieces cannot be read ({error}); copy them all, or delete {folder}"
        ) from error
    if hashlib.sha256(content).hexdigest() != index.sha256:
        raise CheckpointError(f"{file}: its pieces are not those that were written; copy them all again")
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise CheckpointError(f"{file}: holds no training state ({error}); delete {folder}") from error
    assert isinstance(state, dict), "its hash is right"
    return state
