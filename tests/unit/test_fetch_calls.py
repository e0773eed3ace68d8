"""A client's FETCHes against a server in a thread: numbered, never blocking, each answered once."""

import threading

import pytest

from cache_service.fetch_calls import ANSWER_S
from cache_service.messages import FetchStatus, WantedPage
from cache_service.server_connection import CallFailure
from tests.unit.arenas import key
from tests.unit.cache_nodes import TIMEOUT_S, eventually, new_client, serving, store_chain

NOBODY = "tcp://127.0.0.1:1"


@pytest.fixture
def server(tmp_path):
    with serving(tmp_path) as server:
        yield server


@pytest.fixture
def client(server):
    client = new_client(server.core.endpoint)
    yield client
    client.close()


def wanted(*names, parent=None):
    pages = []
    for name in names:
        pages.append(WantedPage(key(name), parent, 16))
        parent = key(name)
    return pages


def take_all(client, count=1):
    answers = []
    eventually(lambda: answers.extend(client.take_fetched()) or len(answers) >= count)
    return answers


def test_each_fetch_has_a_number_and_a_result_for_each_page(server, client):
    _, locations = store_chain(client, "ab")
    first = client.fetch(wanted("a", "b"), None, 1.0)
    second = client.fetch(wanted("x"), NOBODY, 1.0)
    answers = {answer.number: answer for answer in take_all(client, 2)}
    assert answers.keys() == {first, second}
    results = answers[first].outcome
    assert [result.status for result in results] == [FetchStatus.PRESENT] * 2
    assert [result.location for result in results] == locations
    assert [result.location for result in answers[second].outcome] == [None]
    assert client.take_fetched() == []
    assert all(0 < answer.seconds < TIMEOUT_S for answer in answers.values())


def test_a_server_that_does_not_answer_is_a_failure_in_time(server, client):
    stuck, go_on = threading.Event(), threading.Event()
    server.before_turn = lambda: stuck.set() or go_on.wait(TIMEOUT_S)
    assert stuck.wait(TIMEOUT_S)
    number = client.fetch(wanted("a", "b"), None, 0.05)
    assert client.take_fetched() == []
    (answer,) = take_all(client)
    assert answer.number == number and answer.outcome == CallFailure("timeout")
    assert answer.seconds >= 0.05 + ANSWER_S
    server.before_turn = None
    go_on.set()
    eventually(lambda: client.connection.breaker.state == "closed")
    number = client.fetch(wanted("c"), None, 1.0)
    (answer,) = take_all(client)
    assert answer.number == number, "what came too late is nobody's answer"
    assert [result.status for result in answer.outcome] == [FetchStatus.FAILED]


def test_a_closed_client_fetches_nothing(server):
    client = new_client(server.core.endpoint)
    client.close()
    client.fetch(wanted("a"), None, 1.0)
    (answer,) = client.take_fetched()
    assert answer.outcome == CallFailure("closed")
