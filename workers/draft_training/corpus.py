"""Corpus: answered prompts as tokens, in files of a run's folder that are written once each. No torch."""

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

TokenArray = npt.NDArray[np.int64]
HELD_OUT = "held-out"


class CorpusError(Exception):
    """A file of the corpus cannot be read; the message names it."""


@dataclass(frozen=True)
class Sample:
    """A prompt and its answer, [tokens]; the answer begins at `prompt_len`."""

    token_ids: TokenArray
    prompt_len: int

    @property
    def answer_len(self) -> int:
        """Tokens that the model has written."""
        return len(self.token_ids) - self.prompt_len


def write_shard(file: Path, sequences: Sequence[Sample]) -> None:
    """Write a file whole or not at all."""
    stored = io.BytesIO()
    tokens = np.concatenate([s.token_ids for s in sequences]) if sequences else np.empty(0, np.int64)
    narrow = tokens.astype(np.uint16 if tokens.max(initial=0) < 1 << 16 else np.uint32)
    np.savez_compressed(
        stored,
        token_ids=narrow,
        lens=np.array([len(s.token_ids) for s in sequences], dtype=np.int64),
        prompt_lens=np.array([s.prompt_len for s in sequences], dtype=np.int64),
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_bytes(stored.getvalue())
    partial.replace(file)


def read_shard(file: Path) -> list[Sample]:
    """Return a file's sequences. Raise CorpusError where it is none."""
    try:
        with np.load(file) as stored:
            tokens = stored["token_ids"].astype(np.int64)
            lens, prompt_lens = stored["lens"], stored["prompt_lens"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise CorpusError(f"{file}: no answers of a training run ({error}); delete it") from error
    ends = np.cumsum(lens)
    return [
        Sample(tokens[end - length : end], int(prompt_len))
        for end, length, prompt_len in zip(ends, lens, prompt_lens, strict=True)
    ]


def shard_file(folder: Path, index: int) -> Path:
    """Name the file of a shard."""
    return folder / f"answers-{index:05}.npz"


def held_out_file(folder: Path) -> Path:
    """Name the file of the answers that are held out."""
    return folder / f"{HELD_OUT}.npz"


def read_corpus(folder: Path) -> list[Sample]:
    """Return the sequences of all shards, in order."""
    return [s for file in sorted(folder.glob("answers-*.npz")) for s in read_shard(file)]
