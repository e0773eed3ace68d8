import asyncio
import json
import socket
import threading
import time
from contextlib import contextmanager

import pytest
import uvicorn

from cluster.api.bounded_http import BoundedHttpProtocol

OK = b"HTTP/1.1 200 OK\r\n"


class SmallHttpProtocol(BoundedHttpProtocol):
    MAX_HEAD_BYTES = 2000
    HEAD_TIMEOUT_S = 0.6


async def answers_slowly(scope, receive, send):
    while (await receive()).get("more_body"):
        pass
    if scope["path"] == "/slow":
        await asyncio.sleep(0.9)  # no multiple of the head's time
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@contextmanager
def serving():
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(
        uvicorn.Config(
            answers_slowly,
            http=SmallHttpProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
        )
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield listener.getsockname()
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()


@pytest.fixture(scope="module")
def address():
    with serving() as bound:
        yield bound


@pytest.fixture
def connection(address):
    with socket.create_connection(address, timeout=5) as one:
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield one


def read_all(connection):
    """What the server says until it closes; fails when it does not within the socket's timeout."""
    said = b""
    try:
        while piece := connection.recv(65536):
            said += piece
    except ConnectionResetError:
        pass
    return said


def assert_refused(said, status, code):
    head, _, body = said.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), said
    error = json.loads(body)["error"]
    assert error["code"] == code
    return error["message"]


HEAD = b"GET / HTTP/1.1\r\nhost: x\r\n"


def test_many_headers_are_refused_before_they_end(connection):
    connection.sendall(HEAD + b"a: b\r\n" * 400)
    assert "2000" in assert_refused(read_all(connection), 431, "headers_too_large")


def test_one_header_without_an_end_is_refused(connection):
    connection.sendall(HEAD)
    time.sleep(0.05)
    connection.sendall(b"a: ")
    for _ in range(3):
        time.sleep(0.03)
        connection.sendall(b"x" * 900)
    assert_refused(read_all(connection), 431, "headers_too_large")


def test_a_long_path_is_refused(connection):
    connection.sendall(b"GET /" + b"x" * 2500)
    assert_refused(read_all(connection), 431, "headers_too_large")


def test_trailers_without_an_end_close_the_connection(connection):
    connection.sendall(b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n")
    time.sleep(0.05)
    connection.sendall(b"trailer: ")
    for _ in range(3):
        time.sleep(0.03)
        connection.sendall(b"x" * 900)
    assert read_all(connection) == b""


def test_headers_within_the_bound_and_a_body_beyond_it_are_served(connection):
    head = b"POST / HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 200 + b"content-length: 500000\r\n\r\n"
    connection.sendall(head + b"x" * 500_000)
    assert connection.recv(65536).startswith(OK)


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nhost: x\r\n", b"\r\n"])
def test_a_head_that_is_not_whole_in_time_closes_the_connection(connection, sent):
    connection.sendall(sent)
    begin_s = time.monotonic()
    assert "0.6 s" in assert_refused(read_all(connection), 408, "head_timeout")
    assert time.monotonic() - begin_s < 3


def test_a_head_that_drips_gets_no_more_time(connection):
    with pytest.raises(ConnectionError):
        for byte in HEAD + b"a: b\r\n" * 20:
            connection.sendall(bytes([byte]))
            time.sleep(0.02)  # 2.9 s in all


@pytest.mark.parametrize("sent", [b"GET", b"\r\n"])
def test_a_later_head_on_a_kept_connection_has_its_time_too(connection, sent):
    connection.sendall(HEAD + b"\r\n")
    assert connection.recv(65536).startswith(OK)
    time.sleep(0.8)  # idle between requests: uvicorn's keep-alive rules, not the head's time
    connection.sendall(sent)
    assert_refused(read_all(connection), 408, "head_timeout")


def test_answers_longer_than_the_heads_time_are_whole_even_with_the_next_head_begun(connection):
    connection.sendall(b"GET /slow HTTP/1.1\r\nhost: x\r\n\r\n" + b"GET / HT")
    said = connection.recv(65536)
    assert said.startswith(OK) and said.endswith(b"ok")
    time.sleep(0.4)  # longer than the old timer had left, shorter than a head's time
    connection.sendall(b"TP/1.1\r\nhost: x\r\n\r\n")
    assert connection.recv(65536).startswith(OK)
