"""Reads the prompts that a user names, and holds some of them out. No torch."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from workers.chat_environment import Message

Conversation = tuple[Message, ...]
"""Ends with a user's message: what is to be answered."""

_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_FIELDS = ("messages", "conversations", "prompt", "text")


class PromptError(Exception):
    """A file of prompts cannot be read; the message names file and line, and what is allowed."""


def read_prompts(files: Iterable[Path]) -> list[Conversation]:
    """Return the conversations of all files, in order, each once.

    A line that begins with `{` is a JSON object with `messages` (role and content), `conversations` (from
    and value), `prompt` or `text`; a line in a .jsonl or .json file must be one. Any other is a prompt.
    Answers behind the last user's message are left out: the model is to write its own.
    """
    found: dict[Conversation, None] = {}
    for file in files:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise PromptError(f"{file}: cannot be read as text ({error})") from error
        num_before = len(found)
        for number, line in enumerate(lines, 1):
            if line.strip():
                found.setdefault(_conversation(line.strip(), file, number))
        if not lines or (len(found) == num_before and num_before == 0):
            raise PromptError(f"{file}: holds no prompts; a line each is needed")
    return list(found)


def hold_out(
    conversations: Sequence[Conversation], num_held_out: int
) -> tuple[list[Conversation], list[Conversation]]:
    """Return what to train on, and about `num_held_out` conversations that begin otherwise.

    Those whose first words have the lowest hashes are held out, whatever else there is.
    """
    by_hash: dict[str, list[Conversation]] = {}
    for conversation in conversations:
        by_hash.setdefault(_digest(conversation), []).append(conversation)
    held: list[Conversation] = []
    for digest in sorted(by_hash):
        if len(held) >= num_held_out:
            break
        held += by_hash[digest]
    chosen = frozenset(map(_digest, held))
    return [conversation for conversation in conversations if _digest(conversation) not in chosen], held[
        :num_held_out
    ]


def without(conversations: Sequence[Conversation], held: Iterable[Conversation]) -> list[Conversation]:
    """Return the conversations that begin otherwise than all of `held`."""
    chosen = frozenset(map(_digest, held))
    return [conversation for conversation in conversations if _digest(conversation) not in chosen]


def _digest(conversation: Conversation) -> str:
    first = next(message for message in conversation if message.role == "user")
    return hashlib.sha256(first.content.encode()).hexdigest()


def _conversation(line: str, file: Path, number: int) -> Conversation:
    if not line.startswith("{") and file.suffix not in (".json", ".jsonl"):
        return (Message("user", line),)
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise PromptError(f"{file}, line {number}: no JSON ({error}); a line is one object") from error
    if not isinstance(record, dict):
        raise PromptError(f"{file}, line {number}: {type(record).__name__}; an object is needed")
    field = next((name for name in _FIELDS if name in record), None)
    if field is None:
        raise PromptError(
            f"{file}, line {number}: has {', '.join(sorted(record)) or 'no fields'}; one of"
            f" {', '.join(_FIELDS)} is needed"
        )
    value = record[field]
    where = f"{file}, line {number}: {field}"
    if isinstance(value, str) and value.strip():
        return (Message("user", value),)
    if not isinstance(value, list):
        raise PromptError(f"{where} is {value!r:.60}; text or a list of messages is needed")
    messages = [_message(entry, where) for entry in value]
    while messages and messages[-1].role != "user":
        messages.pop()
    if not messages:
        raise PromptError(f"{where} has no message of a user")
    return tuple(messages)


def _message(entry: Any, where: str) -> Message:
    if not isinstance(entry, dict):
        raise PromptError(f"{where}: {entry!r:.60} is no message; an object is needed")
    role, content = entry.get("role", entry.get("from")), entry.get("content", entry.get("value"))
    if role not in _ROLES:
        raise PromptError(f"{where}: role is {role!r}; allowed: {', '.join(_ROLES)}")
    if not isinstance(content, str) or not content.strip():
        raise PromptError(f"{where}: content is {content!r:.60}; text is needed")
    return Message(_ROLES[role], content)
