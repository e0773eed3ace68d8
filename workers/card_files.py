"""Finds the weight files of a model directory. No torch: cards check early that they are there."""

from pathlib import Path

from workers.card_fields import Fields
from workers.models.config import ModelError

PICKLED_WEIGHTS = "pytorch_model.bin"


def safetensors_files(folder: Path) -> list[Path]:
    """Return a directory's safetensors files, those of the index if there is one; none: an empty list.

    Raise ModelError where the index names files that are not there.
    """
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
    return [single] if single.exists() else sorted(folder.glob("*.safetensors"))


def draft_files(folder: Path) -> list[Path]:
    """Return a draft's weight files: safetensors, or the one pickled file that older drafts come as; none: an
    empty list."""
    pickled = folder / PICKLED_WEIGHTS
    return safetensors_files(folder) or ([pickled] if pickled.exists() else [])
