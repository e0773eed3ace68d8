"""Injected messages are late, lost, doubled and damaged as their seed says; what is not injected passes."""

from collections import deque

import pytest
import zmq

from cache_service.injection import InjectedSocket, MessageInjection

NUM_MESSAGES = 400


class Clock:
    def __init__(self):
        self.now_s = 0.0

    def __call__(self):
        return self.now_s


class FakeSocket:
    def __init__(self):
        self.sent = []
        self.coming = deque()

    def send(self, message):
        self.sent.append(message)

    def recv(self, flags):
        assert flags == zmq.NOBLOCK
        if not self.coming:
            raise zmq.Again
        return self.coming.popleft()


def message(number):
    return f"message {number:06}".encode()


MESSAGES = [message(number) for number in range(NUM_MESSAGES)]


def sent(injection, *, stops_at=NUM_MESSAGES):
    """Return what arrives of MESSAGES, sent 1 ms apart."""
    clock, socket = Clock(), FakeSocket()
    injected = InjectedSocket(injection, clock)
    injected.use(socket)
    for number, each in enumerate(MESSAGES):
        if number == stops_at:
            injected.stop()
        injected.send(each)
        clock.now_s += 0.001
    clock.now_s += 10.0
    with pytest.raises(zmq.Again):
        injected.recv(zmq.NOBLOCK)
    return socket.sent, injected


def heard(injection):
    """Return MESSAGES, which come 1 ms apart, in the order in which they are heard."""
    clock, socket = Clock(), FakeSocket()
    injected = InjectedSocket(injection, clock)
    injected.use(socket)
    found = []

    def listen():
        try:
            while True:
                found.append(injected.recv(zmq.NOBLOCK))
        except zmq.Again:
            pass

    for each in MESSAGES:
        socket.coming.append(each)
        listen()
        clock.now_s += 0.001
    while injected.wait_s < float("inf"):
        clock.now_s += injected.wait_s
        listen()
    return found, injected


BOTH = pytest.mark.parametrize("through", [sent, heard])


@BOTH
def test_without_ratios_all_pass_in_order(through):
    assert through(MessageInjection(1))[0] == MESSAGES


@BOTH
def test_late_ones_are_overtaken_and_come(through):
    found, injected = through(MessageInjection(1, delay_ratio=0.3, max_delay_s=0.01))
    assert sorted(found) == MESSAGES and found != MESSAGES
    assert injected.counts[through.__name__, "late"] == pytest.approx(0.3 * NUM_MESSAGES, rel=0.3)


@BOTH
def test_lost_ones_do_not_come(through):
    found, injected = through(MessageInjection(1, loss_ratio=0.2))
    assert set(found) < set(MESSAGES) and len(set(found)) == len(found)
    assert NUM_MESSAGES - len(found) == injected.counts[through.__name__, "lost"] > 0


@BOTH
def test_doubled_ones_come_twice(through):
    found, injected = through(MessageInjection(1, duplicate_ratio=0.2, max_delay_s=0.01))
    assert set(found) == set(MESSAGES)
    assert len(found) - NUM_MESSAGES == injected.counts[through.__name__, "twice"] > 0


@BOTH
def test_damaged_ones_lack_their_end(through):
    found, injected = through(MessageInjection(1, damage_ratio=0.2))
    damaged = [each for each in found if each not in MESSAGES]
    assert len(found) == NUM_MESSAGES and len(damaged) == injected.counts[through.__name__, "damaged"] > 0
    assert all(message(0).startswith(each[:7]) for each in damaged)


@BOTH
def test_what_happens_is_a_function_of_the_seed(through):
    def ratios(seed):
        return MessageInjection(seed, 0.3, 0.01, 0.1, 0.1, 0.1)

    assert through(ratios(1))[0] == through(ratios(1))[0] != through(ratios(2))[0]


def test_once_stopped_all_pass():
    found, _ = sent(MessageInjection(1, loss_ratio=0.5), stops_at=100)
    assert found[-300:] == MESSAGES[-300:] and len(found) < NUM_MESSAGES


def test_once_stopped_none_passes_a_late_one():
    found, _ = sent(MessageInjection(1, delay_ratio=0.5, max_delay_s=0.2), stops_at=100)
    assert found[-300:] == MESSAGES[-300:] and sorted(found) == MESSAGES


def test_a_new_socket_gets_nothing_that_was_meant_for_the_last():
    clock, last, new = Clock(), FakeSocket(), FakeSocket()
    injected = InjectedSocket(MessageInjection(1, delay_ratio=1.0, max_delay_s=1.0), clock)
    injected.use(last)
    injected.send(b"late")
    injected.use(new)
    clock.now_s = 2.0
    with pytest.raises(zmq.Again):
        injected.recv(zmq.NOBLOCK)
    assert last.sent == new.sent == [] and injected.wait_s == float("inf")
