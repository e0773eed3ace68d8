"""Seeded faults of moves: the same for a seed on any machine, and no wrong byte whatever they do."""

from functools import partial

import torch

from tests.unit.tiers import Tier, boards, eventually, keys, pool
from workers.kvcache.arena_part import MappedArena
from workers.kvcache.moves import Move, MoveInjection
from workers.move_board import MoveStatus

DONE, IO, CORRUPT = MoveStatus.DONE, MoveStatus.FAILED_IO, MoveStatus.FAILED_CORRUPT
NUM_PAGES = 24


def move(number: int, kind: str = "load") -> Move:
    return Move(number, kind, 1, 0, 2, keys(1)[0])


def test_a_fault_is_a_function_of_seed_rank_and_move() -> None:
    def faults(seed: int, part: int):
        injection = MoveInjection(seed, max_delay_s=0.5, failure_ratio=0.3, corruption_ratio=0.3)
        return [injection.fault(move(number, "save"), part) for number in range(1, 40)]

    assert faults(1, 0) == faults(1, 0)
    assert len({repr(faults(seed, part)) for seed in range(3) for part in range(2)}) == 6
    assert all(0 <= fault.delay_s <= 0.5 and 0 <= fault.copy_delay_s <= 0.5 for fault in faults(1, 0))
    assert (
        {fault.fails for fault in faults(1, 0)} == {fault.corrupts for fault in faults(1, 0)} == {True, False}
    )


def test_loads_are_never_what_corrupts() -> None:
    injection = MoveInjection(1, corruption_ratio=1.0)
    assert [injection.fault(move(1, kind), 0).corrupts for kind in ("save", "load")] == [True, False]


def test_reordering_stays_within_its_window() -> None:
    injection = MoveInjection(1, reorder_window=4)
    order = sorted(range(1, 101), key=lambda number: (injection.place(move(number), 0), number))
    assert order != sorted(order)
    assert all(abs(place - number) <= 4 for place, number in enumerate(order, start=1))


def round_trip(folder, injection: MoveInjection, num_threads: int = 2):
    """Save a pool's pages, commit what came through, load them elsewhere; what became of each."""
    source, target = pool(0, NUM_PAGES), pool(1, NUM_PAGES)
    untouched = target.data.clone()
    pages, names = list(range(1, NUM_PAGES + 1)), keys(NUM_PAGES)
    (board,) = boards(1)
    options = {"injection": injection, "num_threads": num_threads}
    with Tier(folder, [source], num_slots=NUM_PAGES, board=board, **options) as tier:
        grants = tier.grant(NUM_PAGES)
        saved = tier.run(tier.save_op(pages, grants, names))
        kept = [place for place, status in enumerate(saved) if status is DONE]
        locations = [tier.commit([grants[place]], [names[place]])[0] for place in kept]
        tier.mover.close()
        loader = type(tier.mover)(
            target, partial(MappedArena, tier.arena, tier.leases[0]), 0, board, injection=injection
        )
        op = tier.load_op([pages[place] for place in kept], locations, [names[place] for place in kept])
        loader.start(op)
        loaded = tier.outcome(op)
        eventually(lambda: loader.num_in_flight == 0)
        loader.close()
        for place in range(NUM_PAGES):
            status = loaded[kept.index(place)] if place in kept else None
            expected = source.data if status is DONE else untouched
            assert torch.equal(target.data[place + 1], expected[place + 1]), (place, status)
        assert not tier.arena.leases.any()
        assert ("load", MoveStatus.FAILED_TORN) not in +loader.stats.counts
        tier.store.check()
        return saved, loaded


def test_whatever_is_injected_pages_are_right_or_untouched(tmp_path) -> None:
    outcomes = []
    for seed in range(12):
        injection = MoveInjection(
            seed, max_delay_s=0.001, failure_ratio=0.15, corruption_ratio=0.2, reorder_window=8
        )
        outcomes.append(round_trip(tmp_path, injection))
        if seed < 3:
            again = round_trip(tmp_path, injection, num_threads=1)
            assert again == outcomes[-1], "faults depend on which thread is faster"
    saved = {status for outcome, _ in outcomes for status in outcome}
    loaded = {status for _, outcome in outcomes for status in outcome}
    assert (saved, loaded) == ({DONE, IO}, {DONE, IO, CORRUPT})


def test_moves_end_out_of_order(tmp_path) -> None:
    ended: list[int] = []
    injection = MoveInjection(3, reorder_window=6, during_copy=lambda each: ended.append(each.number))
    with Tier(
        tmp_path, [pool(0, NUM_PAGES)], num_slots=NUM_PAGES, injection=injection, num_threads=1
    ) as tier:
        tier.save(list(range(1, NUM_PAGES + 1)), keys(NUM_PAGES))
    assert sorted(ended) == list(range(1, NUM_PAGES + 1)) != ended
