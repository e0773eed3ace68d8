"""The sockets over which rank 0 sends plans: how a group's ranks connect them, and whole reads."""

import contextlib
import hmac
import secrets
import select
import socket
import struct
import time

from torch._C._distributed_c10d import TCPStore

_HELLO = struct.Struct("<I32s")
_TOKEN_BYTES = 32
_HELLO_TIMEOUT_S = 5.0
"""A follower says who it is as soon as it is connected."""


def lead(store: TCPStore, size: int, host: str, timeout_s: float) -> list[socket.socket]:
    """Accept one plan link per follower; each proves with a token from the store that it belongs here, and
    who does not, or says nothing, is hung up on. Raises TimeoutError once `timeout_s` has gone in all."""
    end_s = time.monotonic() + timeout_s
    token = secrets.token_bytes(_TOKEN_BYTES)
    links: dict[int, socket.socket] = {}
    with socket.create_server((host, 0), backlog=128) as server:
        store.set("plan_token", token.hex())
        store.set("plan_port", str(server.getsockname()[1]))
        while len(links) < size - 1:
            server.settimeout(_left_s(end_s))
            link, _ = server.accept()
            rank = _told_rank(link, token)
            if rank is None or not 0 < rank < size or rank in links:
                link.close()
                continue
            link.settimeout(timeout_s)
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            links[rank] = link
    return [links[rank] for rank in sorted(links)]


def _told_rank(link: socket.socket, token: bytes) -> int | None:
    """Return the rank at the other end; None where it is nobody's."""
    end_s, hello = time.monotonic() + _HELLO_TIMEOUT_S, b""
    try:
        while len(hello) < _HELLO.size:
            link.settimeout(_left_s(end_s))
            more = link.recv(_HELLO.size - len(hello))
            if not more:
                return None
            hello += more
    except OSError:
        return None
    rank, shown = _HELLO.unpack(hello)
    return int(rank) if hmac.compare_digest(shown, token) else None


def _left_s(end_s: float) -> float:
    """Return the seconds until then. Raises TimeoutError behind it."""
    left_s = end_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError
    return left_s


def follow(store: TCPStore, rank: int, host: str, timeout_s: float) -> socket.socket:
    """Connect to rank 0, which is leading. Raises OSError."""
    token = bytes.fromhex(store.get("plan_token").decode())
    link = socket.create_connection((host, int(store.get("plan_port"))), timeout=timeout_s)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    link.sendall(_HELLO.pack(rank, token))
    return link


def receive(link: socket.socket, num_bytes: int) -> bytes:
    """Return exactly so many bytes. Raises ConnectionError where the peer has closed its end, OSError."""
    octets = bytearray(num_bytes)
    view = memoryview(octets)
    while view:
        received = link.recv_into(view)
        if received == 0:
            raise ConnectionError("the peer closed its connection")
        view = view[received:]
    return bytes(octets)


def can_read(link: socket.socket, timeout_s: float = 0.0) -> bool:
    """Tell whether a link can be read, be it to its end; wait for it at most so long."""
    poll = select.poll()  # select() itself takes no descriptors from 1,024 on
    poll.register(link, select.POLLIN)
    return bool(poll.poll(1000 * timeout_s))


def has_hung_up(link: socket.socket) -> bool:
    """Tell whether the peer takes no more part, whatever of it is still to be read."""
    poll = select.poll()
    poll.register(link, select.POLLRDHUP)
    return bool(poll.poll(0))


def hang_up(links: list[socket.socket]) -> None:
    """Let peers see at once that this rank takes no more part; the links are still to be closed."""
    for link in links:
        with contextlib.suppress(OSError):  # the peer was first
            link.shutdown(socket.SHUT_RDWR)
