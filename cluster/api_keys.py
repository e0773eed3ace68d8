"""API keys in files, one a line. The CLI checks them before anything starts, the API process uses them."""

from collections.abc import Sequence
from pathlib import Path

MIN_KEY_CHARACTERS = 8


class ApiKeysError(Exception):
    """API keys cannot be used; the message says why, and shows no key."""


def read_api_keys(file: Path, option: str = "api_keys_file") -> tuple[str, ...]:
    """Return the keys of a file: a line each, empty lines and those that begin with # left out.

    Raise ApiKeysError, which names the file by its `option`.
    """
    try:
        mode = file.stat().st_mode
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ApiKeysError(f"{option} {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ApiKeysError(f"{option} {file}: not UTF-8 text") from None
    if mode & 0o077:
        raise ApiKeysError(f"{option} {file}: mode {mode & 0o777:o} lets others in; chmod 600 it")
    keys = tuple(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
    check_api_keys(keys, f"{option} {file}")
    return keys


def check_api_keys(keys: Sequence[str], source: str) -> None:
    """Raise ApiKeysError for keys too short or unfit for a header."""
    for place, key in enumerate(keys, start=1):
        if len(key) < MIN_KEY_CHARACTERS:
            raise ApiKeysError(
                f"{source}: key {place} has {len(key)} characters; at least {MIN_KEY_CHARACTERS} are needed"
            )
        if not key.isascii() or not key.isprintable() or " " in key:
            raise ApiKeysError(f"{source}: key {place} holds more than printable ASCII without spaces")
