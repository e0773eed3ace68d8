"""The Mooncake package: imported late, with the environment it reads at import set; its traps in one place.

Mooncake's own ports (handshake and data) listen on every interface, without authentication, whatever
MC_TCP_BIND_ADDRESS says (0.3.13): it belongs on a trusted network.
"""

import importlib
import os
import socket
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import numpy

PEER_TO_PEER = "P2PHANDSHAKE"
"""As metadata server: peers tell each other where their memory is, no server is needed."""
_ENVIRONMENT = {
    "MC_TCP_ENABLE_CONNECTION_POOL": "true",  # else batches of 256 stall for a second
    "MC_LOG_LEVEL": "ERROR",
    "MC_TRANSFER_TIMEOUT": "5",  # seconds until a hanging read is given up; 30 otherwise
}


class MooncakeError(Exception):
    """Mooncake cannot be used; the message says what was found and what to change."""


@dataclass(frozen=True)
class MooncakeOptions:
    """What Mooncake's two halves have in common. `rdma_devices` is a list with commas; empty: all."""

    node_address: str
    protocol: Literal["tcp", "rdma"] = "tcp"
    rdma_devices: str = ""


def load_engine(options: MooncakeOptions) -> ModuleType:
    """Return `mooncake.engine`; raise MooncakeError where it is not installed."""
    return _load("mooncake.engine", options)


def load_store(options: MooncakeOptions) -> ModuleType:
    """Return `mooncake.store`; raise MooncakeError where it is not installed."""
    return _load("mooncake.store", options)


def probe(endpoint: str, timeout_s: float) -> None:
    """Raise MooncakeError unless somebody listens at host:port: Mooncake itself would block for 90 s."""
    host, separator, port = endpoint.rpartition(":")
    if not separator or not port.isdigit():
        raise MooncakeError(f"Mooncake master {endpoint!r}: expected host:port")
    try:
        socket.create_connection((host, int(port)), timeout_s).close()
    except OSError as error:
        raise MooncakeError(
            f"no Mooncake master at {endpoint}: {error.strerror or error}; start mooncake_master there or"
            " correct the address"
        ) from error


def address_of(memory: memoryview) -> int:
    """Return where a buffer begins in this process's memory; valid while the buffer is mapped."""
    return int(numpy.frombuffer(memory, numpy.uint8).ctypes.data)


def _load(name: str, options: MooncakeOptions) -> ModuleType:
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)  # what the operator has set stays
    os.environ.setdefault("MC_TCP_BIND_ADDRESS", options.node_address)  # what it tells its peers
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MooncakeError(
            f"Mooncake cannot be loaded: {error}; install eyrie[mooncake] (or [cuda]) and the system's"
            " libibverbs1"
        ) from error
