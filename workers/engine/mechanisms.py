"""Mechanisms: the engine's safety mechanisms, each of which a mutation test switches off. Always all on.

No configuration reaches these: only the tests that prove that a check fires when a mechanism is missing.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mechanisms:
    """What keeps a step's inputs its own. See design.md: I3, I5, I7 - I9 and the KV sanitizer."""

    pads_rows: bool = True
    """Rows beyond the plan's point at the dummy page; else they keep what their staging set had."""
    copies_rows: bool = True
    """Page rows are copied to the static inputs on each step; else those of the first step stay."""
    rings_staging: bool = True
    """Staging sets are a ring, each reused only after its copy; else one set, reused at once."""
    checks_version: bool = True
    """A plan whose relocation version is not the engine's own is refused."""
    clones_outputs: bool = True
    """Logits of a replay are a copy; else they stand where the next replay writes its own (I9)."""
    poisons_pages: bool = True
    """The sanitizer fills freed pages with NaN."""
    waits_for_loads: bool = True
    """A step comes after the LOADs in flight of the pages that it reads (I5)."""
    verifies_loads: bool = True
    """A LOAD holds its bytes against their checksum before it copies them (I7)."""
    fences_moves: bool = True
    """A device's copies come after what its compute stream was given before them (I6)."""
    enqueues_before_waits: bool = True
    """A LOAD is told of, and waited for, once its copy and the mark behind it are enqueued (I5)."""
    leases_whole_copies: bool = True
    """A LOAD's slot is leased until the device has copied it, not only until that is enqueued (I7)."""


ALL_ON = Mechanisms()
