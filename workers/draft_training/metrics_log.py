"""MetricsLog: a run's losses and evaluations, a JSON line each, in step order. No torch."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Record:
    """One line. `loss` and `rates` (by the draft's place) are means since the line before; an evaluation has
    an accept length, and rates of its own."""

    step: int
    loss: float | None
    rates: list[float]
    accept_length: float | None = None
    tokens_per_s: float | None = None


class MetricsLog:
    """Lines up to `step` of an earlier part of the run are kept, later ones were lost with their weights."""

    def __init__(self, file: Path, step: int) -> None:
        self._file = file
        kept = [record for record in read_records(file) if record.step <= step] if step else []
        self.records = kept
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f"{json.dumps(asdict(record))}\n" for record in kept))

    def add(self, record: Record) -> None:
        """Append a line."""
        self.records.append(record)
        with self._file.open("a") as opened:
            opened.write(f"{json.dumps(asdict(record))}\n")


def read_records(file: Path) -> list[Record]:
    """Return the lines of a file; none where there is none. A last line that was cut off is left out."""
    if not file.exists():
        return []
    found = []
    for line in file.read_text().splitlines():
        try:
            found.append(Record(**json.loads(line)))
        except (ValueError, TypeError):
            break
    return found
