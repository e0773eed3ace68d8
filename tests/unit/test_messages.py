from typing import get_args

import msgspec
import pytest

from cache_service import messages
from cache_service.keys import PageKey
from cache_service.messages import Answer, Call, Reply, Request
from cache_service.page_records import CommitResult, CommitStatus, Entry, Grant, Location
from cache_service.relocation import Changes, Snapshot, Version
from cache_service.relocation_records import (
    AllRemovedRemotely,
    Removed,
    RemovedRemotely,
    Stored,
    StoredRemotely,
)

KEY = PageKey(b"k" * 16)
OTHER = PageKey(b"o" * 16)
REQUESTS = [
    messages.Attach(1, 4_242, 99, 7, "cluster", b"f" * 16, 4_096, 2),
    messages.Detach(),
    messages.GrantSlots(64),
    messages.Commit([Entry(3, 5, KEY, None, 64), Entry(4, 7, OTHER, KEY, 64, 2)]),
    messages.Abort([Grant(1, 3)]),
    messages.Touch([KEY, OTHER]),
    messages.ReportCorrupt(Location(1, 2), "load"),
    messages.Lookup([KEY]),
    messages.Fetch([messages.WantedPage(KEY, None, 64)], "tcp://10.0.0.1:7000", 0.5),
    messages.Fetch([messages.WantedPage(OTHER, KEY, 64, 1)], None, 0.5),
    messages.LeasePages(1, "10.0.0.2", 2**63, b"f" * 16, 4_096, 2, [KEY]),
    messages.ReleasePages([1, 2]),
    messages.AttachStore("disk:/var/eyrie?gb=10"),
    messages.DetachStore(),
    messages.ChangesSince(None),
    messages.ChangesSince(Version(2**64 - 1, 9)),
    messages.Pin([KEY]),
    messages.Unpin([KEY]),
    messages.Clear(),
    messages.Check(),
    messages.Stats(),
]
ANSWERS = [
    messages.Attached("/dev/shm/a.arena", 100, 64, 3, "tcp://10.0.0.1:7001", [Grant(1, 3)], 12),
    messages.Granted([Grant(1, 3)], 12),
    messages.Committed(
        [
            CommitResult(CommitStatus.COMMITTED, Location(3, 6)),
            CommitResult(CommitStatus.NO_PARENT, None),
        ]
    ),
    messages.Found([None, Location(1, 2)]),
    messages.Fetched([messages.FetchResult(messages.FetchStatus.MISSING, None)]),
    messages.Leased(9, "10.0.0.1:12345", [messages.LeasedPage(1, 2, 4_096, [2**64 - 1, 1])]),
    Changes(
        3,
        4,
        [
            Stored(KEY, None, 1, 2),
            Removed(KEY, 1, 2),
            StoredRemotely(KEY),
            RemovedRemotely(KEY),
            AllRemovedRemotely(),
        ],
    ),
    Snapshot(Version(3, 4), [Stored(KEY, OTHER, 1, 2)], KEY + OTHER),
    messages.StatsReply(10, 1, 2, 3, 4, 0, 0, 8_192, [messages.Count("dropped", 2, "load")]),
    messages.Done(3),
    messages.Refused("layout", "the arena holds bundles of 4096 bytes, the worker 8192"),
]


def test_every_request_and_answer_is_here():
    assert {type(request) for request in REQUESTS} == set(get_args(Request))
    assert {type(answer) for answer in ANSWERS} == set(get_args(Answer))


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda request: type(request).__name__)
def test_requests_cross_the_wire(request_):
    call = Call(12, request_)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(call), type=Call) == call


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: type(answer).__name__)
def test_answers_cross_the_wire(answer):
    reply = Reply(12, Version(5, 6), answer)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(reply), type=Reply) == reply


@pytest.mark.parametrize(
    "request_",
    [
        messages.Lookup([PageKey(b"short")]),
        messages.GrantSlots(-1),
        messages.GrantSlots(1 << 40),
        messages.Fetch([], None, 0.0),
        messages.Touch([KEY] * (messages.MAX_ITEMS + 1)),
        messages.Attach(1, 1, 1, 1 << 32, "cluster", b"f" * 16, 4_096, 2),
        messages.Attached("/dev/shm/a.arena", 100, 64, 3, "tcp://10.0.0.1:7001", [Grant(1, 3)], 12),
    ],
    ids=lambda request: type(request).__name__,
)
def test_what_no_server_can_do_is_not_decoded(request_):
    encoded = msgspec.msgpack.encode([1, request_])
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(encoded, type=Call)
