"""The addresses of remote stores as users write them, and the stores behind them.

    disk:/PATH?gb=SIZE                      `{node}` in the path stands for the node's address
    mooncake:HOST:PORT?segment_gb=SIZE      and, if wanted, protocol=tcp|rdma and devices=NAME,NAME

SIZE is GiB: of the files, or of this node's memory that joins Mooncake's pool (0: other members have it).
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cache_service.disk_store import DiskStore, DiskStoreError
from cache_service.mooncake_library import MooncakeError, MooncakeOptions
from cache_service.mooncake_store import MooncakeStore
from cache_service.remote import RecordLayout, RemoteStore

FORMS = "disk:/PATH?gb=SIZE or mooncake:HOST:PORT?segment_gb=SIZE[&protocol=tcp|rdma][&devices=NAME,...]"
_GIB = 1 << 30
_NODE = "{node}"


class StoreAddressError(ValueError):
    """What was written is no address of a store; the message says what was found and what is allowed."""


class StoreOpenError(Exception):
    """A store cannot be used; the message says why and what to change."""


@dataclass(frozen=True)
class DiskAddress:
    """A folder of the node, for at most so many bytes of files."""

    folder: str
    max_bytes: int


@dataclass(frozen=True)
class MooncakeAddress:
    """A Mooncake master's host:port, and how this node takes part in its pool."""

    master: str
    segment_bytes: int
    protocol: Literal["tcp", "rdma"] = "tcp"
    rdma_devices: str = ""


StoreAddress = DiskAddress | MooncakeAddress


def parse_store_address(text: str) -> StoreAddress:
    """Read an address as a user writes it; raise StoreAddressError."""
    kind, colon, rest = text.partition(":")
    place, _, query = rest.partition("?")
    if not colon or kind not in ("disk", "mooncake"):
        raise StoreAddressError(f"store {text!r} is neither a disk nor Mooncake; write {FORMS}")
    return _disk(text, place, query) if kind == "disk" else _mooncake(text, place, query)


def open_store(address: StoreAddress, layout: RecordLayout, memory: memoryview, node: str) -> RemoteStore:
    """Open the store for pages that lie in `memory`; raise StoreOpenError. May block for many seconds.

    `node` is this node's address.
    """
    try:
        if isinstance(address, DiskAddress):
            folder = Path(address.folder.replace(_NODE, node))
            return DiskStore(folder, layout, address.max_bytes)
        options = MooncakeOptions(node, address.protocol, address.rdma_devices)
        return MooncakeStore(address.master, layout, memory, options, segment_bytes=address.segment_bytes)
    except (DiskStoreError, MooncakeError) as error:
        raise StoreOpenError(str(error)) from error


def _disk(text: str, place: str, query: str) -> DiskAddress:
    options = _options(text, query, ("gb",))
    if not place.startswith("/"):
        raise StoreAddressError(f"store {text!r}: its folder {place!r} is not absolute; write {FORMS}")
    max_bytes = _bytes(text, "gb", options)
    if not max_bytes:
        raise StoreAddressError(f"store {text!r}: gb=0 holds no page; give it a size")
    return DiskAddress(place, max_bytes)


def _mooncake(text: str, place: str, query: str) -> MooncakeAddress:
    options = _options(text, query, ("segment_gb", "protocol", "devices"))
    host, _, port = place.rpartition(":")
    if not host or "/" in place or not port.isdecimal() or not 0 < int(port) < 65_536:
        raise StoreAddressError(f"store {text!r}: {place!r} is no HOST:PORT of a master; write {FORMS}")
    segment_bytes = _bytes(text, "segment_gb", options)
    devices = options.get("devices", "")
    match options.get("protocol", "tcp"):
        case "tcp":
            if devices:
                raise StoreAddressError(f"store {text!r}: devices are RDMA's; add protocol=rdma")
            return MooncakeAddress(place, segment_bytes)
        case "rdma":
            return MooncakeAddress(place, segment_bytes, "rdma", devices)
        case other:
            raise StoreAddressError(f"store {text!r}: protocol is {other!r}; tcp and rdma are allowed")


def _options(text: str, query: str, allowed: tuple[str, ...]) -> dict[str, str]:
    options: dict[str, str] = {}
    for part in query.split("&") if query else ():
        name, equals, value = part.partition("=")
        if name not in allowed or not equals or not value:
            raise StoreAddressError(
                f"store {text!r}: found {part!r} after the `?`; allowed are"
                f" {', '.join(f'{name}=...' for name in allowed)}"
            )
        if name in options:
            raise StoreAddressError(f"store {text!r}: {name} is given twice; give it once")
        options[name] = value
    return options


def _bytes(text: str, name: str, options: dict[str, str]) -> int:
    found = options.get(name)
    if found is None:
        raise StoreAddressError(f"store {text!r} has no {name}; write {FORMS}")
    try:
        size = float(found)
    except ValueError:
        size = math.nan
    if not 0 <= size < math.inf:
        raise StoreAddressError(f"store {text!r}: {name} is {found!r}; a number of GiB is needed, 0 or more")
    return int(size * _GIB)
