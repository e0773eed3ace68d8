"""A cache client without any manners: one call at a time, in the name of any process."""

import msgspec
import zmq

from cache_service import messages
from cache_service.gate import open_client_socket
from cache_service.identity import cluster_id_of
from cache_service.messages import Call, Reply
from cache_service.page_records import Entry
from cache_service.processes import ProcessId
from tests.unit.arenas import FINGERPRINT, fill, key
from tests.unit.cache_nodes import BUNDLE_BYTES, SECRET, TIMEOUT_S


class RawClient:
    """Speaks for any process, one call at a time."""

    def __init__(self, server, process=None):
        self.process = process or ProcessId.current()
        self.context = zmq.Context()
        self.socket = open_client_socket(self.context, zmq.DEALER, SECRET)
        self.socket.connect(server.core.endpoint)
        self.num_calls = 0
        self.version = None

    def ask(self, request):
        self.num_calls += 1
        self.socket.send(msgspec.msgpack.encode(Call(self.num_calls, request)))
        return self.receive(self.num_calls)

    def receive(self, call_id):
        while True:
            assert self.socket.poll(TIMEOUT_S * 1000)
            reply = msgspec.msgpack.decode(self.socket.recv(), type=Reply)
            is_keepalive = reply.call_id == messages.UNANSWERED and reply.answer == messages.Done()
            if not is_keepalive:
                break
        assert reply.call_id == call_id
        self.version = reply.version
        return reply.answer

    def attach(self, group=7, **changes):
        fields = {
            "protocol_version": messages.PROTOCOL_VERSION,
            "pid": self.process.pid,
            "start_ticks": self.process.start_ticks,
            "group": group,
            "cluster_id": cluster_id_of(SECRET),
            "fingerprint": FINGERPRINT,
            "bundle_bytes": BUNDLE_BYTES,
            "num_ranks": 1,
        }
        return self.ask(messages.Attach(**fields | changes))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.socket.close(linger=0)
        self.context.term()


def commit_chain(server, raw, names):
    """Write pages through the server's own mapping; return the commit's results."""
    parent, entries, grants = None, [], []
    while len(grants) < len(names):  # the arena may be at its prefault still
        grants += raw.ask(messages.GrantSlots(len(names) - len(grants))).grants
    for grant, name in zip(grants, names, strict=True):
        fill(server.core._arena.arena, grant.slot, key(name))
        entries.append(Entry(grant.slot, grant.epoch, key(name), parent, 16))
        parent = key(name)
    return raw.ask(messages.Commit(entries)).results
