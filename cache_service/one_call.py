"""One call to a CacheServer from a process that has not attached: the command line, a health check."""

import time

import msgspec
import zmq

from cache_service.connection_loss import why_lost
from cache_service.gate import open_client_socket
from cache_service.messages import Answer, Call, Refused, Reply, Request

_CALL_ID = 1


class CallError(Exception):
    """The server did not do it; the message says why."""


def call_once(endpoint: str, cluster_secret: bytes, request: Request, timeout_s: float) -> Answer:
    """Connect, ask, and return the answer; raise CallError for a refusal and where none comes in time."""
    payload = exchange(endpoint, cluster_secret, request, timeout_s)
    try:
        answer = msgspec.msgpack.decode(payload, type=Reply).answer
    except msgspec.MsgspecError as error:
        raise other_protocol(endpoint, error) from None
    if isinstance(answer, Refused):
        raise refused(answer)
    return answer


def exchange(endpoint: str, cluster_secret: bytes, request: Request, timeout_s: float) -> bytes:
    """Connect, ask, and return the Reply as it came; raise CallError where none comes in time."""
    end_s = time.monotonic() + timeout_s
    with zmq.Context() as context:
        socket = open_client_socket(context, zmq.DEALER, cluster_secret)
        monitor = socket.get_monitor_socket(zmq.Event.ALL)
        poller = zmq.Poller()
        poller.register(socket, zmq.POLLIN)
        poller.register(monitor, zmq.POLLIN)
        try:
            socket.connect(endpoint)
            socket.send(msgspec.msgpack.encode(Call(_CALL_ID, request)))
            while (left_s := end_s - time.monotonic()) > 0:
                ready = dict(poller.poll(max(1, int(left_s * 1000))))
                if socket in ready:
                    return socket.recv()
                why = why_lost(monitor)
                if why is not None:
                    raise CallError(f"no answer from the cache server at {endpoint}: {why}")
            raise CallError(f"the cache server at {endpoint} did not answer within {timeout_s:g} s")
        except zmq.ZMQError as error:
            raise CallError(f"cannot connect to {endpoint!r}: {error.strerror}") from None
        finally:
            socket.disable_monitor()
            monitor.close(linger=0)
            socket.close(linger=0)


def other_protocol(endpoint: str, error: msgspec.MsgspecError) -> CallError:
    """Return what to raise where a Reply cannot be decoded."""
    return CallError(f"the cache server at {endpoint} speaks another protocol: {error}")


def refused(refusal: Refused) -> CallError:
    """Return what to raise for a refusal."""
    return CallError(f"the cache server refused: {refusal.reason}")
