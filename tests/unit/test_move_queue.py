"""MoveQueue: which moves a thread is given together."""

import threading

from cache_service.keys import PageKey
from tests.unit.tiers import keys
from workers.kvcache.move_queue import MoveQueue
from workers.kvcache.moves import MoveInjection
from workers.move_board import MoveBoard, MoveStatus
from workers.plan import LoadPages, SavePages

NUM_PAGES = 20


def queue(injection: MoveInjection | None = None) -> MoveQueue:
    return MoveQueue(MoveBoard.private(), NUM_PAGES, 4_096, 0, injection)


def fields(first: int, count: int) -> tuple[int, list[int], list[int], list[int], list[PageKey]]:
    places = list(range(count))
    return first, [1 + place for place in places], places, [2] * count, keys(count)


def numbers(run) -> list[int]:
    return [started.move.number for started in run]


def test_a_run_is_of_loads_while_there_are_any_and_never_longer_than_wanted() -> None:
    moves = queue()
    moves.add(SavePages(*fields(1, 4)))
    assert numbers(moves.next_run(3)) == [1, 2, 3]
    moves.add(LoadPages(*fields(5, 4)))
    assert numbers(moves.next_run(3)) == [5, 6, 7]
    assert numbers(moves.next_run(3)) == [8]
    assert numbers(moves.next_run(3)) == [4]


def test_waiting_for_a_run_ends_with_a_move_or_with_the_queue() -> None:
    moves, runs = queue(), []

    def take() -> None:
        while run := moves.next_run(2):
            runs.append(numbers(run))

    thread = threading.Thread(target=take)
    thread.start()
    moves.add(SavePages(*fields(1, 1)))
    moves.close()
    thread.join(20)
    assert not thread.is_alive() and runs == [[1]]


def test_the_moves_of_a_run_end_together_and_share_their_time() -> None:
    moves = queue()
    moves.add(LoadPages(*fields(1, 3)))
    run = [started.move for started in moves.next_run(3)]
    for move in run:
        moves.verified(move)
        assert moves.status(move.number) is MoveStatus.ENQUEUED
    assert moves.loading_pages() == [1, 2, 3]
    statuses = [MoveStatus.DONE, MoveStatus.FAILED_CORRUPT, MoveStatus.DONE]
    moves.end_all(run, statuses, 0.6)
    assert [moves.status(move.number) for move in run] == statuses
    assert moves.loading_pages() == [] and moves.num_in_flight == 0
    assert abs(moves.stats.seconds["load"] - 0.6) < 1e-9
