"""Why a client's zmq connection is of no use any more. Its socket is then replaced: what was meant for a dead
server does not reach its heir.
"""

import zmq
from zmq.utils.monitor import recv_monitor_message

NO_RECONNECT_MS = 3_600_000
"""`reconnect_ivl` of sockets that are replaced; -1 makes libzmq hang at exit after a failed handshake."""

_LOST_EVENTS = {
    zmq.Event.DISCONNECTED: "the other side disconnected",
    zmq.Event.CLOSED: "nobody listens there",
    zmq.Event.HANDSHAKE_FAILED_AUTH: "the other side does not know this cluster's secret",
    zmq.Event.HANDSHAKE_FAILED_PROTOCOL: "the other side does not speak CURVE",
    zmq.Event.HANDSHAKE_FAILED_NO_DETAIL: "the other side ended, or holds not the same cluster secret",
}


def why_lost(monitor: zmq.Socket[bytes]) -> str | None:
    """Read what a socket's monitor has to tell; say why the connection is lost, if it is."""
    while monitor.poll(0):
        why = _LOST_EVENTS.get(zmq.Event(recv_monitor_message(monitor)["event"]))
        if why is not None:
            return why
    return None
