"""The sockets over which rank 0 sends plans: how a group's ranks connect them, and whole reads."""

import hmac
import secrets
import socket
import struct

from torch._C._distributed_c10d import TCPStore

_HELLO = struct.Struct("<I32s")
_TOKEN_BYTES = 32


def lead(store: TCPStore, size: int, host: str, timeout_s: float) -> list[socket.socket]:
    """Accept one plan link per follower; each proves with a token from the store that it belongs here."""
    token = secrets.token_bytes(_TOKEN_BYTES)
    links: dict[int, socket.socket] = {}
    with socket.create_server((host, 0), backlog=size) as server:
        server.settimeout(timeout_s)
        store.set("plan_token", token.hex())
        store.set("plan_port", str(server.getsockname()[1]))
        while len(links) < size - 1:
            link, _ = server.accept()
            link.settimeout(timeout_s)
            rank, shown = _HELLO.unpack(receive(link, _HELLO.size))
            if not hmac.compare_digest(shown, token) or not 0 < rank < size or rank in links:
                link.close()
                continue
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            links[rank] = link
    return [links[rank] for rank in sorted(links)]


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
