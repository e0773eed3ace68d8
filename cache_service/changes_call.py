"""One question to a CacheServer for what a subscriber has missed, from a process that has not attached.

The answer is decoded record by record: at once, a snapshot of 50,000 pages holds the interpreter for 7 ms,
and with it the event loop of the API process that asks.
"""

from collections.abc import Sequence
from typing import TypeVar

import msgspec

from cache_service.messages import ChangesSince, Refused
from cache_service.one_call import exchange, other_protocol, refused
from cache_service.relocation import Changes, Snapshot, Version
from cache_service.relocation_records import Change, Stored

Record = TypeVar("Record")


class _Snapshot(msgspec.Struct, frozen=True, array_like=True, tag="snapshot"):
    """As Snapshot, its records still undecoded. The other two likewise."""

    version: Version
    stored: list[msgspec.Raw]
    remote: bytes


class _Changes(msgspec.Struct, frozen=True, array_like=True, tag="changes"):
    incarnation: int
    first_counter: int
    changes: list[msgspec.Raw]


class _Reply(msgspec.Struct, frozen=True, array_like=True):
    call_id: int
    version: Version
    answer: _Snapshot | _Changes | Refused


_REPLY = msgspec.msgpack.Decoder(_Reply)
_STORED: msgspec.msgpack.Decoder[Stored] = msgspec.msgpack.Decoder(Stored)
_CHANGE: msgspec.msgpack.Decoder[Change] = msgspec.msgpack.Decoder(Change)


def changes_since(
    endpoint: str, cluster_secret: bytes, version: Version | None, timeout_s: float
) -> Changes | Snapshot:
    """Return all relocations after `version`, or all that is stored; raise CallError."""
    payload = exchange(endpoint, cluster_secret, ChangesSince(version), timeout_s)
    try:
        return _decoded(payload)
    except msgspec.MsgspecError as error:
        raise other_protocol(endpoint, error) from None


def _decoded(payload: bytes) -> Changes | Snapshot:
    answer = _REPLY.decode(payload).answer
    match answer:
        case _Snapshot():
            return Snapshot(answer.version, _each(_STORED, answer.stored), answer.remote)
        case _Changes():
            return Changes(answer.incarnation, answer.first_counter, _each(_CHANGE, answer.changes))
        case Refused():
            raise refused(answer)


def _each(decoder: msgspec.msgpack.Decoder[Record], raws: Sequence[msgspec.Raw]) -> list[Record]:
    return [decoder.decode(raw) for raw in raws]  # between two of them, other threads get their turn
