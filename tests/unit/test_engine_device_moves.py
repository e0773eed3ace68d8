"""The Engine over a mover whose device copies by itself, as late as it may: no token changes."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.arena_host import ArenaHost
from tests.tier_answers import NUM_SLOTS, answers
from tests.unit.engine_plans import generate, tiny_engine
from tests.unit.fake_copies import FakeCuda
from tests.unit.test_engine_loads import PROMPT, finish
from tests.unit.tier_plans import TierLog
from tests.unit.tiers import Tier, eventually
from workers.engine.engine import Engine
from workers.engine.mechanisms import ALL_ON, Mechanisms
from workers.kvcache.moves import MoveInjection
from workers.kvcache.sanitizer import SanitizerError
from workers.move_board import MoveStatus

ENQUEUED, DONE = MoveStatus.ENQUEUED, MoveStatus.DONE


@pytest.fixture(scope="module")
def expected() -> list[int]:
    return generate(tiny_engine(graphs=False), [PROMPT], 12)[0]


@pytest.fixture
def build(tmp_path) -> Callable[..., tuple[Engine, TierLog, Tier, FakeCuda]]:
    """Make an engine that has saved PROMPT's pages and holds none of them."""
    tiers = []

    def build(mechanisms: Mechanisms = ALL_ON, injection: MoveInjection | None = None, **options):
        engine, cuda = tiny_engine(mechanisms, **options), FakeCuda()
        tier = Tier(
            tmp_path, [engine.pool], num_slots=16, make=cuda, mechanisms=mechanisms, injection=injection
        )
        tiers.append((tier, cuda))
        engine.attach(tier.mover)
        log = TierLog(tier)
        log.open(0, PROMPT)
        log.run(engine, s0=17)
        log.keep(engine, 0)
        log.run(engine)
        return engine, log, tier, cuda

    yield build
    for tier, cuda in tiers:
        cuda.streams.flows.set()
        tier.close()


def start_load(engine: Engine, log: TierLog, tier: Tier):
    """Start a LOAD of PROMPT's four pages and wait until it is enqueued."""
    log.open(1, PROMPT)
    op = log.load(1, 4)
    log.run(engine)
    moves = range(op.first_move, op.first_move + 4)
    eventually(lambda: all(tier.board.status(move) >= ENQUEUED for move in moves))
    log.use(1, op)
    return op


@pytest.mark.parametrize(("graphs", "outcome"), [(True, "replay_after_load"), (False, "eager")])
def test_a_step_comes_after_copies_that_its_device_has_yet_to_do(build, expected, graphs, outcome) -> None:
    engine, log, tier, cuda = build(graphs=graphs)
    cuda.streams.flows.clear()
    op = start_load(engine, log, tier)
    moves = range(op.first_move, op.first_move + 4)
    assert [tier.board.status(move) for move in moves] == [ENQUEUED] * 4, "nothing is copied yet"
    log.run(engine, s1=1)
    assert engine.graph_steps["decode", outcome] == 1
    assert tier.mover.stats.num_waits == {"stream": 1, "host": 0}
    cuda.streams.flows.set()
    assert finish(engine, log, 1, 12) == expected
    assert tier.outcome(op) == [DONE] * 4


def test_a_step_that_does_not_wait_is_seen(build) -> None:
    engine, log, tier, cuda = build(replace(ALL_ON, waits_for_loads=False))
    cuda.streams.flows.clear()
    start_load(engine, log, tier)
    with pytest.raises(SanitizerError, match=r"page_loaded: slot 1, .* a LOAD that is done, found ENQUEUED"):
        log.run(engine, s1=1)


def test_a_page_that_is_freed_while_it_is_copied_is_seen(build) -> None:
    engine, log, tier, cuda = build()
    cuda.streams.flows.clear()
    log.open(1, PROMPT)
    op = log.load(1, 4)
    log.run(engine)
    eventually(lambda: tier.board.status(op.first_move + 3) is ENQUEUED)
    log.give_back(op.pages)
    with pytest.raises(SanitizerError, match=r"free_load: .* expected move \d+ over, found ENQUEUED"):
        log.run(engine)


@pytest.mark.parametrize("seed", range(4))
def test_delays_and_reordering_change_no_token(build, expected, seed) -> None:
    engine, log, tier, _ = build(injection=MoveInjection(seed, max_delay_s=0.01, reorder_window=5))
    start_load(engine, log, tier)
    assert finish(engine, log, 1, 12) == expected


@pytest.mark.parametrize("delay_s", [0.0, 0.003])
def test_a_small_pool_over_a_device_s_tier_answers_as_without_one(tmp_path, delay_s) -> None:
    alone, _ = answers(tmp_path / "alone", None)
    with ArenaHost(NUM_SLOTS, make=FakeCuda(delay_s=delay_s)) as host:
        found, harness = answers(tmp_path / "tiered", host)
    assert found == alone
    assert harness.tier.stats.num_loaded_pages > 100
    assert delay_s == 0 or harness.scheduler.stats.num_unproven_rows > 0, "every verdict came in time"
