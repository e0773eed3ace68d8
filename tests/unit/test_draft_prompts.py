"""Prompts that a draft is trained on: the forms they come in, what is refused, what is held out."""

import json
from pathlib import Path

import pytest

from workers.chat_environment import Message
from workers.draft_training.prompts import PromptError, hold_out, read_prompts


def test_prompts_are_read_in_every_form(tmp_path: Path) -> None:
    lines = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "c"}]},
        {"prompt": "d", "id": 7},
        {"text": "a"},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    (tmp_path / "p.txt").write_text('plain\n{"prompt": "in json"}\n')
    found = read_prompts([tmp_path / "p.jsonl", tmp_path / "p.txt"])
    assert found == [
        (Message("user", "a"),),
        (Message("system", "s"), Message("user", "c")),
        (Message("user", "d"),),
        (Message("user", "plain"),),
        (Message("user", "in json"),),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no prompts"),
        ("oops", "line 1: no JSON"),
        ("[1]", "line 1: list; an object is needed"),
        ('{"prompt": "a"}\n{"question": "b"}', "line 2: has question; one of messages"),
        ('{"prompt": 5}', "prompt is 5; text or a list"),
        ('{"messages": [{"role": "robot", "content": "b"}]}', "role is 'robot'; allowed: system, user"),
        ('{"messages": [{"role": "user", "content": ""}]}', "content is ''; text is needed"),
        ('{"messages": [{"role": "assistant", "content": "b"}]}', "has no message of a user"),
    ],
)
def test_bad_prompts_are_refused_by_file_and_line(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(content)
    with pytest.raises(PromptError, match=message.replace("[", r"\[")) as caught:
        read_prompts([file])
    assert str(file) in str(caught.value)


def test_held_out_are_whole_beginnings_and_stay_the_same(tmp_path: Path) -> None:
    first = [(Message("user", f"q{place}"),) for place in range(40)]
    longer = [(*begun, Message("assistant", "x"), Message("user", "y")) for begun in first]
    kept, held = hold_out([*first, *longer], 8)
    assert len(held) == 8 and not {c[0] for c in kept} & {c[0] for c in held}
    more = [(Message("user", f"z{place}"),) for place in range(5)]
    assert {c[0] for c in hold_out([*longer, *first, *more], 8)[1]} & {c[0] for c in held}
