"""Peers and the wire to them: which connections are kept, and which arena the wire is for."""

import threading
from types import SimpleNamespace

import pytest

from cache_service.arena_safety import ArenaSafety
from cache_service.inbox import Inbox
from cache_service.peers import IDLE_S, MAX_PEERS, Peers
from cache_service.remote import RecordLayout
from cache_service.wire import Wire
from tests.unit.cache_nodes import SECRET, TIMEOUT_S, eventually

ACCESS = SimpleNamespace(
    layout=RecordLayout(b"f" * 16, 4096, 1),
    arena=SimpleNamespace(safety=ArenaSafety(), pages=lambda: memoryview(bytearray(8))),
)


class FakeTransfer:
    """Registers memory once it may; the address says whose it is."""

    segment = "here"

    def __init__(self, address: int) -> None:
        self.may_register = threading.Event()
        self.is_closed = False
        self._address = address

    def register(self, memory: memoryview) -> int:
        assert self.may_register.wait(TIMEOUT_S)
        return self._address

    def forget(self, segment: str) -> None:
        pass

    def close(self, timeout_s: float) -> bool:
        self.is_closed = True
        return True


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def peers():
    peers = Peers(SimpleNamespace(transfer=FakeTransfer(1)), "10.0.0.1", SECRET, clock=Clock())
    peers.begin(ACCESS)
    yield peers
    assert peers.end()


def test_a_peer_that_nobody_asks_is_closed_and_one_that_is_asked_stays(peers):
    idle, used = peers.find("tcp://10.0.0.2:1"), peers.find("tcp://10.0.0.3:1")
    peers._clock.now_s += IDLE_S - 1
    used.used_s = peers._clock()
    peers.tick(peers._clock())
    assert peers.states().total() == 2
    peers._clock.now_s += 1
    peers.tick(peers._clock())
    assert peers.states().total() == 1 and peers.find("tcp://10.0.0.3:1") is used
    eventually(lambda: idle.has_ended)
    assert peers.find("tcp://10.0.0.2:1") is not idle


def test_beyond_so_many_peers_the_one_unused_for_longest_makes_room(peers):
    found = []
    for number in range(MAX_PEERS):
        peers._clock.now_s += 1
        found.append(peers.find(f"tcp://10.0.1.{number}:1"))
    found[0].used_s = peers._clock()
    assert peers.find("tcp://10.0.0.2:1") is not None
    assert peers.states().total() == MAX_PEERS
    assert peers.find("tcp://10.0.1.0:1") is found[0]
    eventually(lambda: found[1].has_ended)


def test_the_address_of_an_arena_that_is_gone_is_not_taken_for_its_heir_s():
    inbox, made = Inbox(), [FakeTransfer(address) for address in (1, 2)]
    transfers = iter(made)
    wire = Wire(lambda: next(transfers), inbox)
    wire.begin(ACCESS)
    assert wire.end() is False, "its registration is under way"
    wire.begin(ACCESS)
    made[0].may_register.set()
    eventually(lambda: inbox._tasks)
    inbox.run()
    assert wire.transfer is None
    made[1].may_register.set()
    eventually(lambda: inbox.run() or wire.transfer)
    assert wire.address == 2
    wire.close()
    inbox.close()


def test_a_transfer_that_opens_when_its_arena_is_gone_is_closed_and_not_used_for_the_next():
    inbox, may_open = Inbox(), threading.Event()
    first, late, last = (FakeTransfer(address) for address in (1, 2, 3))
    transfers = iter([first, late, last])

    def open_transfer() -> FakeTransfer:
        transfer = next(transfers)
        assert transfer is not late or may_open.wait(TIMEOUT_S)
        transfer.may_register.set()
        return transfer

    wire = Wire(open_transfer, inbox)
    wire.begin(ACCESS)
    assert wire.end() and first.is_closed
    wire.begin(ACCESS)
    assert wire.end() is False, "what is being opened will have the memory"
    wire.begin(ACCESS)
    eventually(lambda: inbox.run() or wire.transfer is last)
    may_open.set()
    eventually(lambda: inbox.run() or late.is_closed)
    assert wire.transfer is last and wire.address == 3
    wire.close()
    inbox.close()
