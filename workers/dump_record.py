"""CrashDump: what a rank leaves in a file when it fails, for `eyrie debug dump` to read.

Written by workers.crash_dump in the step loop's thread. It has neither prompts nor tokens. No torch.
"""

from pathlib import Path

import msgspec

FORMAT_VERSION = 1


class DumpError(ValueError):
    """A file that is no crash dump of this version; the message says what it is."""


class DumpedOp(msgspec.Struct, frozen=True):
    """An op of a plan: its kind and fields, keys in hex, tokens left out."""

    kind: str
    fields: dict[str, object]


class DumpedPlan(msgspec.Struct, frozen=True):
    """A plan of the log: its rows by slot, start and length, and its ops."""

    step: int
    version: str
    mode: str
    slots: list[int]
    starts: list[int]
    lens: list[int]
    sampled: list[int]
    ops: list[DumpedOp]


class DumpedMove(msgspec.Struct, frozen=True):
    """A SAVE or LOAD of the plans above, and what it had come to on each rank."""

    number: int
    kind: str
    page: int
    slot: int
    statuses: list[str]


class DumpedPage(msgspec.Struct, frozen=True):
    """A page of the decider's pool that is not free."""

    page: int
    state: str
    generation: int
    num_leases: int


class CrashDump(msgspec.Struct, frozen=True):
    """All that a rank knows without asking its device, which may be what has failed."""

    format_version: int
    written_at: str
    """UTC."""
    replica: str
    rank: int
    incarnation: int
    step: int | None
    """The last plan's."""
    relocation_version: str
    error: str
    traceback: str
    versions: dict[str, str]
    config: dict[str, object]
    completed_steps: list[int]
    """By rank."""
    graph_steps: dict[str, int]
    """By `mode outcome`."""
    eager_steps: dict[str, int]
    """By `mode reason`."""
    plans: list[DumpedPlan]
    """The last ones, oldest first; the last may be what failed."""
    moves: list[DumpedMove]
    rows: dict[str, list[int]]
    """This rank's page table: pages by slot."""
    pages: list[DumpedPage]
    """Of rank 0."""


def read_dump(path: Path) -> CrashDump:
    """Read a dump. Raises DumpError, or OSError where the file cannot be read."""
    octets = path.read_bytes()
    try:
        head = msgspec.json.decode(octets, type=dict[str, msgspec.Raw])
        version = msgspec.json.decode(head["format_version"])
    except (msgspec.DecodeError, KeyError) as error:
        raise DumpError(f"{path} is no crash dump of Eyrie: {error}") from error
    if version != FORMAT_VERSION:
        raise DumpError(
            f"{path} is a crash dump of format {version}; this version reads {FORMAT_VERSION}: read it with"
            " the Eyrie that wrote it"
        )
    try:
        return msgspec.json.decode(octets, type=CrashDump)
    except msgspec.ValidationError as error:
        raise DumpError(f"{path} is damaged: {error}") from error
