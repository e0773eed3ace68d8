"""Gate: who may connect to this process: one zmq context, its ZAP check, sockets of both ends.

Owned by the thread that serves its sockets; that thread must poll `admissions` and call `admit`, or no
client ever gets in.
"""

import logging

import zmq
from zmq.utils import z85

from cache_service.curve import curve_keys

logger = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 256 << 20
HEARTBEAT_MS = 1_000
HEARTBEAT_TIMEOUT_MS = 5_000
_ZAP_ENDPOINT = "inproc://zeromq.zap.01"
_ZAP_DOMAIN = b"eyrie"
_EVERY_INTERFACE = ("*", "0.0.0.0", "::", "[::]", "")


class BindError(Exception):
    """A socket cannot be bound there; the message says where, why and what to change."""


class Gate:
    """Opens CURVE server sockets that only holders of the cluster secret can talk to."""

    def __init__(self, cluster_secret: bytes) -> None:
        self._keys = curve_keys(cluster_secret, "server")
        self._client_key = z85.decode(curve_keys(cluster_secret, "client").public)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.admissions: zmq.Socket[bytes] = self._context.socket(zmq.REP)
        """Readable when a client waits for `admit`."""
        self.admissions.linger = 0
        self.admissions.bind(_ZAP_ENDPOINT)
        self.num_refused = 0
        """Clients with an unknown key."""

    def open_socket(self, socket_type: int) -> zmq.Socket[bytes]:
        """Return a server socket that is not bound yet; its caller closes it, before the gate."""
        socket = self._context.socket(socket_type)
        socket.linger = 0
        socket.maxmsgsize = MAX_MESSAGE_BYTES
        socket.heartbeat_ivl = HEARTBEAT_MS
        socket.heartbeat_timeout = HEARTBEAT_TIMEOUT_MS
        socket.curve_server = True
        socket.curve_secretkey = self._keys.secret
        socket.zap_domain = _ZAP_DOMAIN
        return socket

    def admit(self) -> None:
        """Answer all waiting clients (RFC 27): their CURVE key must come from the cluster secret."""
        while True:
            try:
                frames = self.admissions.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            version, request_id, _, address, _, mechanism, *credentials = frames
            if mechanism == b"CURVE" and credentials == [self._client_key]:
                status, text = b"200", b"OK"
            else:
                status, text = b"400", b"unknown client key"
                self.num_refused += 1
                logger.warning("refused a client with an unknown key", extra={"address": address.decode()})
            self.admissions.send_multipart([version, request_id, status, text, b"eyrie", b""])

    def close(self) -> None:
        """Release the context, once all its sockets are closed."""
        self.admissions.close(linger=0)
        self._context.term()


def bind(socket: zmq.Socket[bytes], host: str, port: int | None = None) -> str:
    """Bind to one address of this node, any free port where `port` is None; return the endpoint."""
    if host in _EVERY_INTERFACE:
        raise BindError(f"cannot bind to {host!r}: that is every interface; give this node's own address")
    try:
        if port is None:
            port = socket.bind_to_random_port(f"tcp://{host}")
        else:
            socket.bind(f"tcp://{host}:{port}")
    except zmq.ZMQError as error:
        raise BindError(
            f"cannot bind to {host}:{port or 'any port'}: {error.strerror}; "
            "the address must be one of this node's and the port free"
        ) from error
    return f"tcp://{host}:{port}"


def open_client_socket(
    context: zmq.Context[zmq.Socket[bytes]], socket_type: int, cluster_secret: bytes
) -> zmq.Socket[bytes]:
    """Return a socket of `context`, not connected yet, that a Gate with the same secret admits."""
    keys = curve_keys(cluster_secret, "client")
    socket = context.socket(socket_type)
    socket.linger = 0
    socket.maxmsgsize = MAX_MESSAGE_BYTES
    socket.heartbeat_ivl = HEARTBEAT_MS
    socket.heartbeat_timeout = HEARTBEAT_TIMEOUT_MS
    socket.curve_serverkey = curve_keys(cluster_secret, "server").public
    socket.curve_publickey = keys.public
    socket.curve_secretkey = keys.secret
    return socket
