"""The Engine over a cache tier: pages that went to the arena and came back change no token."""

import time
from collections.abc import Callable

import pytest

from tests.unit.engine_plans import PlanLog, generate, tiny_engine
from tests.unit.tier_plans import Gate, TierLog
from tests.unit.tiers import Tier, eventually
from workers.engine.engine import Engine, NoMoverError
from workers.kvcache.moves import MoveInjection
from workers.move_board import MoveStatus

ENQUEUED, DONE = MoveStatus.ENQUEUED, MoveStatus.DONE
PROMPT = list(range(30, 47))  # four whole pages and a token
OTHER = [5, 9, 2, 7, 7, 1]


@pytest.fixture(scope="module")
def expected() -> list[int]:
    return generate(tiny_engine(graphs=False), [PROMPT], 12)[0]


@pytest.fixture(scope="module")
def expected_other() -> list[int]:
    return generate(tiny_engine(graphs=False), [OTHER], 12)[0]


@pytest.fixture
def build(tmp_path) -> Callable[..., tuple[Engine, TierLog, Tier]]:
    """Make an engine that has saved PROMPT's pages and holds none of them."""
    tiers = []

    def build(injection: MoveInjection | None = None, **options):
        engine = tiny_engine(**options)
        tier = Tier(tmp_path, [engine.pool], num_slots=16, injection=injection, num_threads=4)
        tiers.append(tier)
        engine.attach(tier.mover)
        log = TierLog(tier)
        log.open(0, PROMPT)
        log.run(engine, s0=17)
        log.keep(engine, 0)
        log.run(engine)
        return engine, log, tier

    yield build
    for tier in tiers:
        tier.close()


def finish(engine: Engine, log: PlanLog, slot: int, num_tokens: int) -> list[int]:
    """Decode a slot until it has generated that many tokens after its prompt of 17."""
    while len(log.tokens[slot]) < 17 + num_tokens:
        log.run(engine, **{f"s{slot}": len(log.tokens[slot]) - log.num_computed[slot]})
    return log.tokens[slot][17:]


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("num_loaded", [1, 3, 4])
def test_pages_that_come_back_change_no_token(build, expected, graphs, num_loaded) -> None:
    engine, log, tier = build(graphs=graphs)
    log.open(1, PROMPT)
    op = log.load(1, num_loaded)
    log.run(engine)
    assert tier.outcome(op) == [DONE] * num_loaded
    log.use(1, op)
    assert finish(engine, log, 1, 12) == expected
    assert engine.graph_steps["decode", "replay_after_load"] == 0
    assert engine.num_sanitized_steps == sum(engine.graph_steps.values())


def load_behind(gate: Gate, engine: Engine, log: TierLog, tier: Tier):
    """Start a LOAD of PROMPT's four pages that stops half way: it is ENQUEUED and not DONE."""
    gate.opened.clear()
    log.open(1, PROMPT)
    op = log.load(1, 4)
    log.run(engine)
    moves = range(op.first_move, op.first_move + 4)
    eventually(lambda: [tier.board.status(move) for move in moves] == [ENQUEUED] * 4)
    return op


@pytest.mark.parametrize(("graphs", "outcome"), [(True, "replay_after_load"), (False, "eager")])
def test_a_step_comes_after_the_loads_that_it_reads(build, expected, graphs, outcome) -> None:
    gate = Gate()
    engine, log, tier = build(gate.injection, graphs=graphs)
    op = load_behind(gate, engine, log, tier)
    log.use(1, op)
    began_s = time.monotonic()
    gate.open_after(0.1)
    log.run(engine, s1=1)
    assert time.monotonic() - began_s >= 0.1
    assert [tier.board.status(move) for move in range(op.first_move, op.first_move + 4)] == [DONE] * 4
    assert engine.graph_steps["decode", outcome] == 1
    assert finish(engine, log, 1, 12) == expected
    assert engine.graph_steps["decode", "replay_after_load"] == graphs
    assert engine.graph_steps["decode", "replay"] == 11 * graphs


def test_steps_that_read_none_of_the_loading_pages_run_on(build, expected, expected_other) -> None:
    gate = Gate()
    engine, log, tier = build(gate.injection)
    log.open(2, OTHER)
    log.run(engine, s2=6)
    op = load_behind(gate, engine, log, tier)
    for _ in range(4):
        log.run(engine, s2=1)
    assert tier.board.status(op.first_move) is ENQUEUED, "the load has not moved"
    assert engine.graph_steps["decode", "replay"] == 4
    gate.open_after(0.05)
    log.use(1, op)
    log.run(engine, s1=1, s2=1)
    log.run(engine, s2=1, s1=1)
    assert engine.graph_steps["decode", "replay_after_load"] == 1
    while len(log.tokens[2]) < 18:
        log.run(engine, s2=1, s1=1)
    assert log.tokens[2][6:] == expected_other
    assert log.tokens[1][17:] == expected[: len(log.tokens[1]) - 17]


def test_a_prefill_chunk_comes_after_the_loads_it_reads_too(build, expected) -> None:
    gate = Gate()
    engine, log, tier = build(gate.injection)
    gate.opened.clear()
    log.open(1, PROMPT)
    op = log.load(1, 2)
    log.run(engine)
    gate.open_after(0.05)
    eventually(lambda: all(tier.board.status(op.first_move + place) >= ENQUEUED for place in range(2)))
    log.use(1, op)
    log.run(engine, s1=9)
    assert engine.graph_steps["extend", "eager"] == 2
    assert finish(engine, log, 1, 12) == expected


def test_no_step_waits_for_a_save(build, expected) -> None:
    gate = Gate("save")
    engine, log, tier = build(gate.injection)
    log.open(1, PROMPT)
    log.run(engine, s1=17)
    log.complete(1)
    gate.opened.clear()
    tier.store.clear()
    save = log.start_save(1)
    tokens = finish(engine, log, 1, 6)
    assert tier.board.status(save.first_move) is MoveStatus.PENDING
    gate.opened.set()
    log.commit_save(save)
    assert tokens + finish(engine, log, 1, 12)[6:] == expected
    assert engine.graph_steps["decode", "replay_after_load"] == 0


def test_pages_saved_while_steps_run_come_back_right(build, expected) -> None:
    """A SAVE whose copy is under way while other pages of its row are written."""
    gate = Gate("save")
    engine, log, tier = build(gate.injection)
    tier.store.clear()
    log.open(1, PROMPT)
    log.run(engine, s1=17)
    log.complete(1)
    gate.opened.clear()
    save = log.start_save(1)
    for _ in range(5):
        log.run(engine, s1=1)
    gate.opened.set()
    log.commit_save(save)
    log.close(1)
    log.open(2, PROMPT)
    op = log.load(2, 4)
    log.run(engine)
    tier.outcome(op)
    log.use(2, op)
    assert finish(engine, log, 2, 12) == expected


@pytest.mark.parametrize("seed", range(6))
def test_delays_and_reordering_change_no_token(build, expected, seed) -> None:
    injection = MoveInjection(seed, max_delay_s=0.02, reorder_window=5)
    engine, log, tier = build(injection)
    log.open(1, PROMPT)
    op = log.load(1, 4)
    moves = range(op.first_move, op.first_move + 4)
    log.run(engine)
    eventually(lambda: all(tier.board.status(move) >= ENQUEUED for move in moves))
    log.use(1, op)
    assert finish(engine, log, 1, 12) == expected


def test_a_load_that_failed_leaves_its_page_to_be_freed(build, expected) -> None:
    engine, log, tier = build()
    log.open(1, PROMPT)
    tier.store.clear()
    op = log.load(1, 4)
    log.run(engine)
    assert tier.outcome(op) == [MoveStatus.FAILED_STALE] * 4
    log.give_back(op.pages)
    log.run(engine, s1=17)
    assert finish(engine, log, 1, 12) == expected


def test_a_torn_load_is_told_before_the_step_s_output(build) -> None:
    """The epoch moves on within the copy, the bytes do not: rank 0 sees it when the step returns."""
    torn: list[int] = []

    def during(move) -> None:
        if move.kind == "load":
            torn.append(move.number)
            arena = tier.arena
            arena.set_stamp(move.slot, arena.epoch(move.slot) + 2, arena.state(move.slot))

    engine, log, tier = build(MoveInjection(0, during_copy=during))
    log.open(1, PROMPT)
    op = log.load(1, 4)
    log.run(engine)
    eventually(lambda: all(tier.board.status(op.first_move + place) >= ENQUEUED for place in range(4)))
    log.use(1, op)
    log.run(engine, s1=1)
    moves = list(range(op.first_move, op.first_move + 4))
    assert [tier.board.status(move) for move in moves] == [MoveStatus.FAILED_TORN] * 4
    assert sorted(torn) == moves


def test_a_rank_without_a_tier_refuses_to_move_pages(build) -> None:
    engine, log, _ = build()
    engine.attach(None)
    log.open(1, PROMPT)
    log.load(1, 4)
    with pytest.raises(NoMoverError, match="move 5 came to a rank without a cache tier"):
        log.run(engine)


def test_a_mover_is_not_replaced_while_it_moves(build) -> None:
    gate = Gate()
    engine, log, tier = build(gate.injection)
    op = load_behind(gate, engine, log, tier)
    with pytest.raises(AssertionError, match="moves are in flight"):
        engine.attach(None)
    gate.opened.set()
    tier.outcome(op)
    eventually(lambda: tier.mover.num_in_flight == 0)
    engine.attach(None)
