"""What rounds of the storm came to, and the file that keeps it between runs."""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any


@dataclasses.dataclass
class Round:
    """What one round came to, as it stands in the progress."""

    number: int
    seed: int
    options: dict[str, Any]
    num_requests: int = 0
    finished: dict[str, int] = dataclasses.field(default_factory=dict)
    num_tokens: int = 0
    seconds: float = 0.0
    num_steps: int = 0
    evicting_steps_ratio: float = 0.0
    """Steps since the last of which the pool has evicted."""
    num_evictions: int = 0
    num_preemptions: int = 0
    num_loaded_pages: int = 0
    num_saved_pages: int = 0
    failed_moves: dict[str, int] = dataclasses.field(default_factory=dict)
    outcomes: dict[str, int] = dataclasses.field(default_factory=dict)
    """Steps by mode and outcome."""
    num_sanitized_steps: int = 0
    accept_lens: dict[str, int] = dataclasses.field(default_factory=dict)
    """With a draft: how often a verified row got so many tokens."""
    num_compared: int = 0
    num_compared_tokens: int = 0
    num_ties: int = 0
    num_deep_ties: int = 0
    largest_tie: float = 0.0
    violations: list[str] = dataclasses.field(default_factory=list)
    diagnoses: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """Of each wrong token: how it came to be, and what both ranks say when they are asked again."""


def totals(rounds: list[Round]) -> dict[str, Any]:
    """Sum up what the rounds came to."""
    num_steps = sum(one.num_steps for one in rounds)
    outcomes: dict[str, int] = {}
    for one in rounds:
        for name, count in one.outcomes.items():
            outcomes[name] = outcomes.get(name, 0) + count
    summed = [
        field.name
        for field in dataclasses.fields(Round)
        if field.name.startswith("num_") and field.name != "num_steps"
    ]
    return {
        "num_rounds": len(rounds),
        "num_steps": num_steps,
        "minutes": round(sum(one.seconds for one in rounds) / 60, 2),
        **{name: sum(getattr(one, name) for one in rounds) for name in summed},
        "largest_tie": max((one.largest_tie for one in rounds), default=0.0),
        "evicting_steps_ratio": round(
            sum(one.evicting_steps_ratio * one.num_steps for one in rounds) / max(num_steps, 1), 3
        ),
        "outcomes": outcomes,
        "accept_len": mean_accept_len(rounds),
        "num_violations": sum(len(one.violations) for one in rounds),
    }


def mean_accept_len(rounds: list[Round]) -> float | None:
    """Return the mean number of tokens that a verified row got; None: there was none."""
    counts: Counter[int] = Counter()
    for one in rounds:
        counts.update({int(length): count for length, count in one.accept_lens.items()})
    if not counts:
        return None
    return round(sum(length * count for length, count in counts.items()) / counts.total(), 4)


def read_progress(path: Path | None) -> list[Round]:
    if path is None or not path.exists():
        return []
    return [Round(**one) for one in json.loads(path.read_text())["rounds"]]


def write_progress(path: Path | None, rounds: list[Round], about: dict[str, Any]) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(
        {"about": about, "totals": totals(rounds), "rounds": [dataclasses.asdict(one) for one in rounds]},
        indent=1,
    )
    partial = path.with_suffix(".partial")
    partial.write_text(text + "\n")
    partial.replace(path)
