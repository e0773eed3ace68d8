"""Fields: typed access to the key-value metadata of a model file. Used by the card's readers. No torch."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Self, TypeVar

from workers.models.config import ModelError

T = TypeVar("T")


class Fields:
    """Metadata of one file. A missing or mistyped key is a ModelError naming file, key and what is needed."""

    def __init__(self, path: Path, values: Mapping[str, object]) -> None:
        self.path = path
        self._values = values

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a JSON object."""
        try:
            values = json.loads(read_text(path))
        except json.JSONDecodeError as error:
            raise ModelError(f"{path}: not JSON: {error}") from None
        if not isinstance(values, dict):
            raise ModelError(f"{path}: holds a {type(values).__name__}; a JSON object is needed")
        return cls(path, values)

    @classmethod
    def read_optional(cls, path: Path) -> Self:
        """Read a JSON object; a file that does not exist is an empty one."""
        return cls.read(path) if path.exists() else cls(path, {})

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None

    def value(self, key: str) -> object:
        """Return the raw value, None if absent."""
        return self._values.get(key)

    def optional(self, key: str, kind: type[T]) -> T | None:
        """Return a value of `kind`, or None if absent."""
        value = self._values.get(key)
        if value is None or isinstance(value, kind):
            return value
        raise ModelError(f"{self.path}: {key} is {value!r:.60}; a {kind.__name__} is needed")

    def need(self, key: str, kind: type[T]) -> T:
        """Return a value of `kind` that must be there."""
        value = self.optional(key, kind)
        if value is None:
            raise ModelError(f"{self.path}: {key} is missing; a {kind.__name__} is needed")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a number; without a default it must be there."""
        value = self._values.get(key)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int | float):
            found = "missing" if value is None else f"{value!r:.60}"
            raise ModelError(f"{self.path}: {key} is {found}; a number is needed")
        return float(value)

    def integer(self, key: str, default: int | None = None, *, minimum: int = 1) -> int:
        """Return a whole number of at least `minimum`; without a default it must be there."""
        value = self.number(key, default)
        if not value.is_integer() or value < minimum:
            raise ModelError(
                f"{self.path}: {key} is {value:g}; a whole number of at least {minimum} is needed"
            )
        return int(value)

    def boolean(self, key: str, default: bool) -> bool:
        """Return true or false."""
        value = self.optional(key, bool)
        return default if value is None else value

    def token_ids(self, key: str) -> list[int]:
        """Return a token id or a list of them as a list; empty if absent."""
        value = self._values.get(key)
        values = value if isinstance(value, list) else [] if value is None else [value]
        ids = [v for v in values if isinstance(v, int) and not isinstance(v, bool) and v >= 0]
        if len(ids) != len(values):
            raise ModelError(f"{self.path}: {key} is {value!r:.60}; a token id or a list of them is needed")
        return ids

    def strings(self, key: str) -> list[str]:
        """Return a list's strings; empty if absent."""
        return [value for value in self.optional(key, list) or [] if isinstance(value, str)]

    def integers(self, key: str) -> list[int] | None:
        """Return a list of whole numbers, or None if absent."""
        values = self.optional(key, list)
        return None if values is None else [int(value) for value in values]

    def floats(self, key: str) -> list[float] | None:
        """Return a list of numbers, or None if absent."""
        values = self.optional(key, list)
        return None if values is None else [float(value) for value in values]

    def part(self, key: str) -> "Fields":
        """Return a nested object; empty if absent."""
        return Fields(self.path, self.optional(key, dict) or {})

    def all_strings(self) -> list[str]:
        """Return every value that is a string."""
        return [value for value in self._values.values() if isinstance(value, str)]


def read_text(path: Path) -> str:
    """Return a UTF-8 file's text, or raise ModelError naming it."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ModelError(
            f"{path}: missing; a model directory holds config.json, tokenizer.json and *.safetensors"
        ) from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ModelError(f"{path}: not UTF-8 text (byte {error.start})") from None
