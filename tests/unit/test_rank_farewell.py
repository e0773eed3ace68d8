"""Rank 0 leaves its group last: the others may still be in collectives that end with it."""

import secrets
import threading
import time

import pytest

from tests.harness import tiny_config, write_tiny_model
from tests.unit.tensor_parallel_group import on_ranks
from workers.parallel import TPGroup, listen
from workers.protocol import ReplicaId
from workers.rank import Rank, RankSpec

HOST = "127.0.0.1"
LATE_S = 0.4


@pytest.fixture
def journal(tmp_path):
    """Run two ranks with a draft until rank 0 is stopped, the second being slow to end; say what happened."""
    config = tiny_config(write_tiny_model(tmp_path / "tiny"), tp_size=2, draft="random-eagle3", num_pages=64)
    listener = listen(HOST)
    port, secret, said = listener.getsockname()[1], secrets.token_bytes(32), []
    ranks = {}
    are_up = threading.Barrier(3)

    def run(number):
        spec = RankSpec(config, ReplicaId("replica-0"), number, 7, HOST, HOST, port, 1)
        rank = ranks[number] = Rank(spec, secret, listener=listener if number == 0 else None)
        loop_run, close = rank._loop.run, rank._group.close

        def run_late():
            loop_run()
            if number:
                time.sleep(LATE_S)

        def tell():
            said.append(number)
            close()

        rank._loop.run, rank._group.close = run_late, tell
        are_up.wait(60)
        rank.run()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    are_up.wait(60)
    ranks[0].stop()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return said


def test_rank_0_leaves_last(journal):
    assert journal == [1, 0]


def test_without_the_farewell_it_would_not(monkeypatch, request):
    monkeypatch.setattr(TPGroup, "see_off", lambda self, timeout_s: True)
    assert request.getfixturevalue("journal") == [0, 1]


def test_a_rank_that_does_not_leave_is_waited_for_no_longer_than_said():
    stays = threading.Event()

    def work(group):
        if group.rank:
            stays.wait(30)
            return None
        begin_s = time.monotonic()
        found = group.see_off(0.2)
        stays.set()
        return found, time.monotonic() - begin_s

    (found, took_s), _ = on_ranks(2, work)
    assert not found and 0.2 <= took_s < 5.0


def test_a_lost_rank_and_a_group_of_one_are_not_waited_for():
    begin_s = time.monotonic()

    def work(group):
        if group.rank:
            group.close()
        return group.see_off(30.0)

    assert on_ranks(2, work) == [True, True]
    assert on_ranks(1, work) == [True]
    assert time.monotonic() - begin_s < 20.0


def test_a_rank_that_fails_ends_its_collectives_before_it_waits_for_copies(tmp_path):
    """On a device copies come behind the steps, one of which may wait for a rank that is gone."""
    config = tiny_config(write_tiny_model(tmp_path / "tiny"), num_pages=64)
    rank = Rank(RankSpec(config, ReplicaId("replica-0"), 0, 7, HOST, HOST, 0, 1), secrets.token_bytes(32))
    journal = []

    class Pages:
        def close(self):
            journal.append("pages")

    def fail():
        raise ValueError("a step failed")

    rank._host_pages, rank._loop.run = Pages(), fail
    rank._group.abort = lambda: journal.append("abort")
    with pytest.raises(ValueError, match="a step failed"):
        rank.run()
    assert journal[:2] == ["abort", "pages"]
