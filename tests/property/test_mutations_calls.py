"""The breaker of a worker's calls (I10): without it each call waits for a server that does not answer."""

import threading

import pytest

from cache_service import messages
from cache_service.server_connection import CallFailure, Patience
from tests.unit.cache_nodes import TIMEOUT_S, new_client, serving

CALL_S = 0.02
MAX_FAILURES = 3
PAUSE_S = 600.0
"""Longer than the test: no probe goes out."""


def ask_a_silent_server(folder, max_failures: int) -> None:
    patience = Patience(max_failures=max_failures, retry_s=PAUSE_S, max_retry_s=PAUSE_S)
    slow, go_on = threading.Event(), threading.Event()
    with serving(folder) as server:
        client = new_client(server.core.endpoint, patience=patience)
        server.before_turn = lambda: slow.set() or go_on.wait(TIMEOUT_S)
        try:
            assert slow.wait(TIMEOUT_S)
            answers = [client.connection.ask_and_wait(messages.Stats(), CALL_S) for _ in range(12)]
        finally:
            server.before_turn = None
            go_on.set()
            client.close()
    assert all(isinstance(answer, CallFailure) for answer in answers)
    num_waited = sum(answer.reason == "timeout" for answer in answers)
    assert num_waited <= MAX_FAILURES, f"breaker: {num_waited} calls waited for a server that is silent"


def test_an_open_breaker_lets_no_call_wait_and_without_it_each_waits(tmp_path):
    ask_a_silent_server(tmp_path, MAX_FAILURES)
    with pytest.raises(AssertionError, match="breaker: 12 calls waited for a server that is silent"):
        ask_a_silent_server(tmp_path, max_failures=1_000)
