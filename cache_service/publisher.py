"""Publisher: broadcasts an owner's relocations as they become ready. Called by the owner's one thread.

Delivery is not promised: a subscriber too slow to read loses messages, notices and asks.
"""

import msgspec
import zmq

from cache_service.gate import BindError, Gate, bind
from cache_service.relocation import Changes, RelocationLog

HEARTBEAT_S = 0.25
SEND_QUEUE_MESSAGES = 1_000
"""A subscriber so many behind misses the next, and resyncs."""
MAX_CHANGES_PER_MESSAGE = 4_096


class Publisher:
    """`gate` admits the subscribers; its thread is this object's thread too.

    `port` None takes any free one: a restarted owner then tells its new endpoint by other means.
    """

    def __init__(
        self,
        gate: Gate,
        host: str,
        log: RelocationLog,
        *,
        now_s: float,
        port: int | None = None,
        heartbeat_s: float = HEARTBEAT_S,
    ) -> None:
        self._log = log
        self._heartbeat_s = heartbeat_s
        self._sent = log.version
        self._sent_s = now_s
        self._encoder = msgspec.msgpack.Encoder()
        self._socket = gate.open_socket(zmq.PUB)
        self._socket.sndhwm = SEND_QUEUE_MESSAGES
        try:
            self.endpoint = bind(self._socket, host, port)
        except BindError:
            self._socket.close()
            raise
        self.num_messages = 0

    def flush(self, now_s: float) -> int:
        """Send all changes since the last call in one message; return how many there were.

        Without changes, a heartbeat goes out when due. Call it after each batch of work and at least every
        `heartbeat_s`.
        """
        changes = self._log.changes_since(self._sent)
        if changes is None:  # more than the log keeps: the gap sends the subscribers to a snapshot
            changes = Changes(self._log.version.incarnation, self._log.version.counter, [])
        elif not changes.changes and now_s - self._sent_s < self._heartbeat_s:
            return 0
        for start in range(0, max(len(changes.changes), 1), MAX_CHANGES_PER_MESSAGE):
            part = changes.changes[start : start + MAX_CHANGES_PER_MESSAGE]
            self._socket.send(
                self._encoder.encode(Changes(changes.incarnation, changes.first_counter + start, part))
            )
            self.num_messages += 1
        self._sent = self._log.version
        self._sent_s = now_s
        return len(changes.changes)

    def close(self) -> None:
        """Give the port back; what is queued is not waited for."""
        self._socket.close(linger=0)
