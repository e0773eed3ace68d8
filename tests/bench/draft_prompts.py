"""Writes the prompts of the shipped draft: `python tests/bench/draft_prompts.py OUT`.

OUT/prompts.jsonl is to train on (draft_training.json says how), OUT/held_out_prompts.jsonl for evaluation and
benchmarks; the latter is kept beside this file. Both are people's sides of chitchat-dataset's conversations
(MIT, held_out_prompts.LICENSE); what else the draft learns from, the model writes itself.
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chitchat_dataset

NUM_HELD_OUT = 128
_MAX_TURNS = 5
"""Prompts are a conversation's first turn, first three and first five."""
_MIN_CHARS, _MAX_CHARS = 20, 1200
"""Of a first turn that is held out: others begin like many, and of a whole prompt."""

Prompt = list[dict[str, str]]


def main() -> None:
    """Write both files."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    conversations = dict(sorted(chitchat_dataset.Dataset().items()))
    by_hash = sorted(conversations, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    held: list[Prompt] = []
    held_names = set()
    for place, name in enumerate(by_hash):
        prompts = list(_turns(conversations[name]))
        if len(held) == NUM_HELD_OUT:
            break
        if prompts and len(prompts[0][0]["content"]) >= _MIN_CHARS:
            chosen = prompts[place % len(prompts)]
            held_names.add(name)
            if chosen not in held:
                held.append(chosen)
    begun = {prompt[0]["content"] for prompt in held}
    kept = [
        prompt
        for name, conversation in conversations.items()
        if name not in held_names
        for prompt in _prompts(conversation)
        if prompt[0]["content"] not in begun
    ]
    _write(folder / "held_out_prompts.jsonl", held)
    _write(folder / "prompts.jsonl", kept)
    print(f"{len(kept)} prompts to train on, {len(held)} held out")


def _prompts(conversation: dict[str, Any]) -> Iterator[Prompt]:
    """Yield the conversation's beginnings, and the topic that the two were given."""
    yield from _turns(conversation)
    topic = (conversation.get("prompt") or "").strip()
    if topic:
        yield [{"role": "user", "content": topic}]


def _turns(conversation: dict[str, Any]) -> Iterator[Prompt]:
    """Yield the beginnings that end with a turn of whoever began."""
    turns: Prompt = []
    for place, messages in enumerate(conversation["messages"][:_MAX_TURNS]):
        text = " ".join(message["text"].strip() for message in messages).strip()
        if not text or sum(len(turn["content"]) for turn in turns) + len(text) > _MAX_CHARS:
            break
        turns.append({"role": "assistant" if place % 2 else "user", "content": text})
        if place % 2 == 0:
            yield list(turns)


def _write(file: Path, prompts: list[Prompt]) -> None:
    unique = dict.fromkeys(json.dumps({"messages": prompt}, ensure_ascii=False) for prompt in prompts)
    file.write_text("".join(f"{line}\n" for line in unique), encoding="utf-8")


if __name__ == "__main__":
    main()
