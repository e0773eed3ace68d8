"""Publisher and Subscriber over real sockets; what the wire can do to them is tests/property's."""

import contextlib
import time

import pytest
import zmq

from cache_service.curve import curve_keys, new_cluster_secret
from cache_service.gate import BindError, Gate
from cache_service.keys import PageKey
from cache_service.publisher import Publisher
from cache_service.relocation import RelocationLog
from cache_service.relocation_records import Removed, Stored
from cache_service.subscriber import Subscriber
from tests.unit.relocation_index import RelocationIndex
from tests.unit.relocation_owner import RelocationOwner, wait_until

SECRET = new_cluster_secret()


def entry(number: int) -> Stored:
    return Stored(PageKey(number.to_bytes(16, "big")), None, number, 2)


@pytest.fixture
def owner():
    owner = RelocationOwner(SECRET, incarnation=1)
    yield owner
    owner.close()


@contextlib.contextmanager
def subscribed(owner: RelocationOwner, secret: bytes = SECRET):
    index = RelocationIndex()
    subscriber = Subscriber(owner.publisher.endpoint, secret, index, owner.resync)
    subscriber.start()
    try:
        yield subscriber, index
    finally:
        subscriber.close()


def has_all(subscriber: Subscriber, owner: RelocationOwner) -> bool:
    return wait_until(lambda: subscriber.follower.applied == owner.log.version)


def hears_broadcasts(subscriber: Subscriber, owner: RelocationOwner) -> bool:
    """Its connection is up: heartbeats come though nobody asks."""
    num_questions = owner.num_questions
    return wait_until(
        lambda: (
            (subscriber.follower.silence_s(time.monotonic()) or 1) < 0.02
            and owner.num_questions > 0
            and owner.num_questions == num_questions
            and subscriber.follower.lag == 0
        )
    )


def test_eight_subscribers_hear_every_change_without_asking(owner):
    owner.change(*[entry(number) for number in range(10)])
    with contextlib.ExitStack() as stack:
        pairs = [stack.enter_context(subscribed(owner)) for _ in range(8)]
        for subscriber, _ in pairs:
            assert has_all(subscriber, owner)
            assert wait_until(lambda s=subscriber: s.follower.silence_s(time.monotonic()) < 0.03)
        num_questions = owner.num_questions
        for number in range(10, 200):
            owner.change(entry(number), Removed(entry(number - 10).key, number - 10, 2))
        for subscriber, index in pairs:
            assert has_all(subscriber, owner)
            assert index.entries() == owner.stored
            assert index.get(entry(199).key) == entry(199)
            assert subscriber.follower.lag == 0
        assert owner.num_questions <= num_questions + 8  # a late connection may have missed the first


def test_changes_that_are_ready_together_go_in_one_message(owner):
    with subscribed(owner) as (subscriber, _):
        assert has_all(subscriber, owner)
        num_messages = owner.publisher.num_messages
        owner.broadcasts.clear()
        for number in range(50):
            owner.change(entry(number))
        owner.broadcasts.set()
        assert has_all(subscriber, owner)
        assert owner.publisher.num_messages - num_messages < 10  # heartbeats among them


def test_late_subscriber_takes_a_snapshot_when_the_log_has_forgotten(owner):
    for number in range(300):
        owner.change(entry(number))
    with subscribed(owner) as (subscriber, index):
        assert has_all(subscriber, owner)
        assert index.entries() == owner.stored
        assert subscriber.follower.stats.num_snapshots == 1


def test_missed_changes_are_noticed_by_a_heartbeat_and_asked_for(owner):
    with subscribed(owner) as (subscriber, index):
        assert has_all(subscriber, owner)
        assert hears_broadcasts(subscriber, owner)
        with owner.lock:
            owner.log.append(entry(1))
            owner.stored[entry(1).key] = entry(1)
            owner.publisher._sent = owner.log.version  # the message is lost
        assert wait_until(lambda: len(index) == 1)
        assert subscriber.follower.stats.num_gaps == 0
        assert subscriber.follower.stats.num_snapshots == 1  # of the beginning


def test_a_reply_ahead_of_the_broadcasts_shows_the_lag_and_brings_a_resync(owner):
    with subscribed(owner) as (subscriber, index):
        assert has_all(subscriber, owner)
        owner.broadcasts.clear()
        owner.answers = False
        version = owner.change(entry(1), entry(2))
        subscriber.saw(version)
        assert wait_until(lambda: subscriber.follower.lag == 2)
        assert wait_until(lambda: subscriber.num_failed_resyncs >= 2)
        owner.answers = True
        assert wait_until(lambda: subscriber.follower.lag == 0)
        assert len(index) == 2


def test_a_restarted_owner_is_told_from_its_former_self():
    owner = RelocationOwner(SECRET, incarnation=1)
    owner.change(entry(1), entry(2), entry(3))
    owners = [owner]
    index = RelocationIndex()
    subscriber = Subscriber(
        owner.publisher.endpoint, SECRET, index, lambda version: owners[-1].resync(version)
    )
    subscriber.start()
    with contextlib.closing(subscriber):
        assert has_all(subscriber, owner)
        owner.close()
        heir = RelocationOwner(SECRET, incarnation=2, port=owner.port)
        owners.append(heir)
        heir.change(entry(7))
        assert wait_until(lambda: index.entries() == heir.stored)
        assert subscriber.follower.stats.num_restarts == 1
        heir.close()
        moved = RelocationOwner(SECRET, incarnation=3)
        owners.append(moved)
        subscriber.redirect(moved.publisher.endpoint)
        moved.change(entry(8))
        assert wait_until(lambda: index.entries() == moved.stored)
        moved.change(entry(9))
        assert wait_until(lambda: index.entries() == moved.stored)
        moved.close()


def test_silence_of_the_owner_is_visible(owner):
    with subscribed(owner) as (subscriber, _):
        assert has_all(subscriber, owner)
        owner.broadcasts.clear()
        assert wait_until(lambda: subscriber.follower.silence_s(time.monotonic()) > 0.3)
        owner.broadcasts.set()
        assert wait_until(lambda: subscriber.follower.silence_s(time.monotonic()) < 0.1)


def test_another_cluster_hears_nothing(owner):
    owner.answers = False
    owner.change(entry(1))
    with subscribed(owner, secret=new_cluster_secret()) as (subscriber, _):
        assert not wait_until(lambda: subscriber.follower.silence_s(time.monotonic()) is not None, 0.5)


def test_a_client_key_of_another_cluster_is_refused(owner):
    """It knows the server's public key, as anybody may, and is turned away for its own."""
    with zmq.Context() as context, context.socket(zmq.SUB) as socket:
        socket.linger = 0
        socket.curve_serverkey = curve_keys(SECRET, "server").public
        socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
        socket.subscribe(b"")
        socket.connect(owner.publisher.endpoint)
        assert wait_until(lambda: owner.gate.num_refused > 0)
        assert not socket.poll(200)


@pytest.mark.parametrize("host", ["0.0.0.0", "*", "::"])
def test_every_interface_is_refused(host):
    with (
        contextlib.closing(Gate(SECRET)) as gate,
        pytest.raises(BindError, match="every interface; give this node's own address"),
    ):
        Publisher(gate, host, RelocationLog(1), now_s=0.0)


def test_a_taken_port_is_named(owner):
    with contextlib.closing(Gate(SECRET)) as gate, pytest.raises(BindError, match=f"127.0.0.1:{owner.port}"):
        Publisher(gate, "127.0.0.1", RelocationLog(1), now_s=0.0, port=owner.port)
