"""What crosses the boundary of a CacheServer: msgspec records, one protocol version, msgpack on the wire.

A client sends Calls over a DEALER, the server answers each with a Reply that repeats its relocation version.
Whoever reads or writes the arena attaches first; a peer's CacheServer and a router need not.
"""

from enum import IntEnum
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from cache_service.breaker import BreakerState
from cache_service.keys import KEY_BYTES, PageKey
from cache_service.page_records import CommitResult, Entry, Grant, Location
from cache_service.relocation import Changes, Snapshot, Version

PROTOCOL_VERSION = 1
MAX_ITEMS = 65_536
"""In one call, of whatever it lists."""
UNANSWERED = 0
"""As `call_id`: the caller wants no reply."""

Key = Annotated[PageKey, Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
Keys = Annotated[list[Key], Meta(max_length=MAX_ITEMS)]


class Attach(msgspec.Struct, frozen=True, array_like=True, tag="attach"):
    """A process of this node asks for its reader row, first thing of a connection, and again after a restart.

    `group` is a number that the ranks of a TP group have chosen: they share their grants under it.
    """

    protocol_version: int
    pid: int
    start_ticks: int
    group: Annotated[int, Meta(ge=1, lt=1 << 32)]
    cluster_id: str
    fingerprint: bytes
    bundle_bytes: int
    num_ranks: int


class Attached(msgspec.Struct, frozen=True, array_like=True, tag="attached"):
    """Where the arena is, which lease row is the caller's, and where relocations are broadcast.

    The reply's version names the arena's incarnation, as its header does.
    """

    arena_path: str
    num_slots: int
    num_readers: int
    reader_row: int
    broadcasts: str
    """The publisher's endpoint."""
    grants: list[Grant]
    """All that the group may write: an answer that gave some may have been lost."""
    max_grants: int
    """Slots that it may hold in advance; fewer, the more groups there are."""


class Detach(msgspec.Struct, frozen=True, array_like=True, tag="detach"):
    """The process holds no lease, writes no slot and goes; answered by Done. Its grants end."""


class GrantSlots(msgspec.Struct, frozen=True, array_like=True, tag="grant"):
    """Ask for slots to write, for the caller's group; answered by Granted."""

    num_slots: Annotated[int, Meta(ge=0, le=MAX_ITEMS)]


class Granted(msgspec.Struct, frozen=True, array_like=True, tag="granted"):
    """Slots to write, fewer than asked where no more can be evicted; `max_grants` as in Attached."""

    grants: list[Grant]
    max_grants: int


class Commit(msgspec.Struct, frozen=True, array_like=True, tag="commit"):
    """Make written slots readable, parents before children; answered by Committed."""

    entries: Annotated[list[Entry], Meta(max_length=MAX_ITEMS)]


class Committed(msgspec.Struct, frozen=True, array_like=True, tag="committed"):
    """One result an entry, in order."""

    results: list[CommitResult]


class Abort(msgspec.Struct, frozen=True, array_like=True, tag="abort"):
    """Give grants back unused; answered by Done."""

    grants: Annotated[list[Grant], Meta(max_length=MAX_ITEMS)]


class Touch(msgspec.Struct, frozen=True, array_like=True, tag="touch"):
    """Count a use of pages, given with all that they continue, parents first; answered by Done."""

    keys: Keys


class ReportCorrupt(msgspec.Struct, frozen=True, array_like=True, tag="corrupt"):
    """A page's bytes do not match its checksum: drop it with all that continue it; answered by Done."""

    location: Location
    reason: Literal["load", "fetch"]
    """What its reader was doing. After a peer's FETCH the server looks at the bytes itself."""


class Lookup(msgspec.Struct, frozen=True, array_like=True, tag="lookup"):
    """Ask where pages are, without a lease; answered by Found."""

    keys: Keys


class Found(msgspec.Struct, frozen=True, array_like=True, tag="found"):
    """One location a key, in order; None: not here."""

    locations: list[Location | None]


class WantedPage(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A page to be brought into this node's arena, and what its slot's header will say."""

    key: Key
    parent: Key | None
    length: Annotated[int, Meta(ge=0, lt=1 << 32)]
    tenant: Annotated[int, Meta(ge=0, lt=1 << 31)] = 0


class Fetch(msgspec.Struct, frozen=True, array_like=True, tag="fetch"):
    """Bring pages here, parents before children; answered by Fetched within `timeout_s`."""

    pages: Annotated[list[WantedPage], Meta(max_length=MAX_ITEMS)]
    peer: str | None
    """Endpoint of the CacheServer that has them; None: the remote store."""
    timeout_s: Annotated[float, Meta(gt=0)]


class FetchStatus(IntEnum):
    """What became of a page to be fetched."""

    FETCHED = 0
    PRESENT = 1
    """It was here already."""
    MISSING = 2
    """Its source does not have it, or has it in another format or layout."""
    CORRUPT = 3
    """What arrived does not match its checksum."""
    NO_SLOT = 4
    """The arena is full of pages that cannot go, or as many as may be are on their way."""
    TIMED_OUT = 5
    FAILED = 6
    """There is no such source, it cannot be reached, or it broke off."""


class FetchResult(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The answer to one page; `location` is where it can be read now, if it can."""

    status: FetchStatus
    location: Location | None


class Fetched(msgspec.Struct, frozen=True, array_like=True, tag="fetched"):
    """One result a page, in order."""

    results: list[FetchResult]


class LeasePages(msgspec.Struct, frozen=True, array_like=True, tag="lease"):
    """A peer's CacheServer is about to read pages over the wire; answered by Leased.

    The lease ends with ReleasePages, or once `reader`'s incarnation is fenced and its connection closed (I7).
    """

    protocol_version: int
    reader: str
    """The peer's node address."""
    incarnation: int
    fingerprint: bytes
    bundle_bytes: int
    num_ranks: int
    keys: Keys


class LeasedPage(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Where a leased page lies, and what its bytes must be."""

    slot: int
    epoch: int
    address: int
    """Of the slot's first byte, as Transfer.register counts."""
    checksums: list[int]
    """`bundle_checksum` of each rank's bundle."""


class Leased(msgspec.Struct, frozen=True, array_like=True, tag="leased"):
    """One page a key, in order, from the first on; none: the first is missing. `lease_id` releases all."""

    lease_id: int
    segment: str
    """What Transfer.read calls the owner's memory."""
    pages: list[LeasedPage]


class ReleasePages(msgspec.Struct, frozen=True, array_like=True, tag="release"):
    """No read of these leases is under way any more; answered by Done."""

    lease_ids: Annotated[list[int], Meta(max_length=MAX_ITEMS)]


class AttachStore(msgspec.Struct, frozen=True, array_like=True, tag="attach_store"):
    """Put pages into a remote store from now on, and fetch from it; answered by Done, or Refused.

    `store` is written as `--store` is. An attached one is detached first, and after a refusal attached again.
    """

    store: str


class DetachStore(msgspec.Struct, frozen=True, array_like=True, tag="detach_store"):
    """Use no remote store any more; what is under way ends as failed. Answered by Done."""


class ChangesSince(msgspec.Struct, frozen=True, array_like=True, tag="changes_since"):
    """Ask for all relocations after a version; answered by Changes or Snapshot."""

    version: Version | None


class Pin(msgspec.Struct, frozen=True, array_like=True, tag="pin"):
    """Keep pages, with all that they continue, from eviction; answered by Done, or Refused over budget."""

    keys: Keys


class Unpin(msgspec.Struct, frozen=True, array_like=True, tag="unpin"):
    """Take one pin of each page back; answered by Done."""

    keys: Keys


class Clear(msgspec.Struct, frozen=True, array_like=True, tag="clear"):
    """Remove every page; answered by Done."""


class Check(msgspec.Struct, frozen=True, array_like=True, tag="check"):
    """Prove that index, headers and counts agree; answered by Done, or Refused with what was found."""


class Stats(msgspec.Struct, frozen=True, array_like=True, tag="stats"):
    """Ask for figures; answered by StatsReply."""


class Count(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A counter since the server's start, by reason where it has any."""

    name: str
    value: int
    reason: str = ""


class StatsReply(msgspec.Struct, frozen=True, array_like=True, tag="stats_reply"):
    """Slots by state (they sum up to `num_slots`), and counters."""

    num_slots: int
    num_unusable: int
    """Not prefaulted yet."""
    num_free: int
    num_writing: int
    num_ready: int
    num_draining: int
    """Dropped, and still leased."""
    num_pinned: int
    slot_bytes: int
    counts: list[Count]
    num_leased: int = 0
    """Slots that some process holds."""
    oldest_lease_s: float = 0.0
    """The longest that a slot has been seen held without a break."""
    num_readers: int = 0
    """Processes that have a lease row."""
    broadcasts: str = ""
    """The publisher's endpoint."""
    store: str = ""
    """The remote store in use, if there is one."""
    num_known_remote: int = 0
    """Pages that it is known to have."""
    num_put_waiting: int = 0
    """Pages that wait to be put into it."""
    num_fetches: int = 0
    """Calls that wait for pages."""
    num_lingering: int = 0
    """Slots that a failed transfer may write still."""
    num_lent: int = 0
    """Pages that peers read, each counted once a lease."""
    oldest_lent_s: float = 0.0
    """The age of the oldest of these leases."""
    num_peers: int = 0
    """Peers that pages are fetched from."""
    num_peers_avoided: int = 0
    """Those of them that have failed and are left alone for a while."""
    relocations: int = 0
    """The counter of the arena's relocation version."""
    put_breaker: BreakerState | None = None
    """Of the store in use, as is the next."""
    get_breaker: BreakerState | None = None
    why_no_store: str = ""
    """Why the store that was wanted is not in use."""


class Done(msgspec.Struct, frozen=True, array_like=True, tag="done"):
    """It is done; `count` says to how many."""

    count: int = 0


RefusalCode = Literal[
    "protocol_version", "layout", "cluster", "no_reader_row", "not_attached", "pin_budget", "check_failed",
    "undecodable", "arena_size", "arena_owned", "no_transfer", "store", "fenced", "busy", "process",
    "arena_file",
]  # fmt: skip


class Refused(msgspec.Struct, frozen=True, array_like=True, tag="refused"):
    """The server will not do it; the reason says what was found, what is allowed and what to change."""

    code: RefusalCode
    reason: str


Request = (
    Attach
    | Detach
    | GrantSlots
    | Commit
    | Abort
    | Touch
    | ReportCorrupt
    | Lookup
    | Fetch
    | LeasePages
    | ReleasePages
    | AttachStore
    | DetachStore
    | ChangesSince
    | Pin
    | Unpin
    | Clear
    | Check
    | Stats
)
Answer = (
    Attached
    | Granted
    | Committed
    | Found
    | Fetched
    | Leased
    | Changes
    | Snapshot
    | StatsReply
    | Done
    | Refused
)


class Call(msgspec.Struct, frozen=True, array_like=True):
    """One request; `call_id` is the caller's own, and comes back in the reply."""

    call_id: int
    request: Request


class Reply(msgspec.Struct, frozen=True, array_like=True):
    """The answer to one call, given at `version` of the server's relocations.

    A message that cannot be decoded is refused under `UNANSWERED`: nobody knows its id.
    """

    call_id: int
    version: Version
    answer: Answer
