"""`--checked`: an index into another request's page is caught before a pass reads or writes it."""

from dataclasses import replace

import msgspec
import pytest

from tests.unit.engine_plans import PlanLog, generate, tiny_engine
from tests.unit.fake_copies import FakeCuda
from tests.unit.test_engine_device_moves import start_load
from tests.unit.tier_plans import TierLog
from tests.unit.tiers import Tier
from workers.engine.mechanisms import ALL_ON
from workers.kvcache.move_queue import MoveOfNoPageError
from workers.kvcache.sanitizer import SanitizerError
from workers.plan import CompletePages, LoadPages, SavePages, SetRow

PROMPT, OTHER = list(range(30, 47)), [5, 9, 2, 7, 7, 1]


def two_requests(device: str = "cpu"):
    """An engine in checked mode with slot 0 on PROMPT and slot 1 on OTHER, each after its prefill."""
    engine = tiny_engine(kv_sanitizer=False, checked=True, graphs=False, device=device)
    log = PlanLog()
    log.open(0, PROMPT)
    log.open(1, OTHER)
    log.run(engine, s0=17, s1=6)
    return engine, log


def test_checked_steps_are_as_others_and_are_counted() -> None:
    engine = tiny_engine(kv_sanitizer=False, checked=True)
    assert generate(engine, [PROMPT, OTHER], 12) == generate(
        tiny_engine(kv_sanitizer=False), [PROMPT, OTHER], 12
    )
    assert engine.num_sanitized_steps == sum(engine.graph_steps.values())
    assert not engine.pool.is_poisoned(engine.num_pages), "bytes are nobody's in this mode"


def test_a_planted_index_is_caught_where_a_row_reads() -> None:
    engine, log = two_requests()
    engine._table.rows[1, 0] = log.pages[0][2]
    with pytest.raises(SanitizerError, match=rf"staged_row: slot 1, page {log.pages[1][0]}"):
        log.run(engine, s0=1, s1=1)


def test_a_planted_index_is_caught_where_a_row_writes() -> None:
    engine, log = two_requests()
    engine._table.rows[1, 1] = log.pages[0][4]
    with pytest.raises(SanitizerError, match=r"(staged_row|write_location): slot 1"):
        log.run(engine, s1=1)


def test_an_op_that_names_another_s_page_is_caught_by_its_owner() -> None:
    engine, log = two_requests()
    page = log.pages[0][4]
    log.ops.append(SetRow(1, 1, [page], [log.generations[page]], []))
    with pytest.raises(SanitizerError, match=r"write_owner: slot 0"):
        log.run(engine, s0=1)


def test_a_page_that_was_freed_is_caught() -> None:
    engine, log = two_requests()
    log.give_back(log.pages[0][:1])
    with pytest.raises(SanitizerError, match=r"freed_page_in_row: slot 0"):
        log.run(engine, s1=1)


def test_a_page_that_is_another_by_now_is_caught_by_its_generation() -> None:
    engine, log = two_requests()
    page = log.pages[0][2]
    log.ops.append(SetRow(1, 0, [page], [log.generations[page] + 1], []))
    with pytest.raises(SanitizerError, match=r"generation: slot 1"):
        log.run(engine, s1=1)


def run_moves(tmp_path, change, kind) -> None:
    """Save a prompt's pages and load them again, with one op of the log changed on its way."""
    engine = tiny_engine(kv_sanitizer=False, checked=True)
    with Tier(tmp_path, [engine.pool], num_slots=16) as tier:
        engine.attach(tier.mover)
        log = TierLog(tier)
        log.open(1, OTHER)
        log.open(0, PROMPT)
        log.run(engine, s0=17, s1=6)

        def altered(op):
            return change(op, log) if isinstance(op, kind) else op

        run = log.plan

        def plan(**lens):
            made = run(**lens)
            return msgspec.structs.replace(made, ops=[altered(op) for op in made.ops])

        log.plan = plan  # type: ignore[method-assign]
        log.keep(engine, 0)
        log.open(2, PROMPT)
        op = log.load(2, 4)
        log.run(engine)
        tier.outcome(op)
        log.use(2, op)
        log.run(engine, s1=1, s2=1)


def named(op, page):
    return msgspec.structs.replace(op, pages=[page, *op.pages[1:]])


@pytest.mark.parametrize(
    ("kind", "page", "check"),
    [
        (SavePages, "another's", "save_complete"),
        (LoadPages, "another's", "load_untouched"),
        (CompletePages, "another's", "complete_written"),
        (SavePages, -3, "page_in_pool"),
        (LoadPages, -3, "page_in_pool"),
        (LoadPages, 41, "page_in_pool"),
        (SavePages, 0, "save_complete"),
    ],
)
def test_a_move_of_a_page_that_is_not_its_own_is_caught(tmp_path, kind, page, check) -> None:
    def change(op, log):
        return named(op, log.pages[1][1] if page == "another's" else page)

    with pytest.raises(SanitizerError, match=rf"{check}: "):
        run_moves(tmp_path, change, kind)
    run_moves(tmp_path, lambda op, log: op, kind)


def test_without_the_mode_a_page_outside_the_pool_reaches_no_copy_either(tmp_path) -> None:
    engine = tiny_engine(kv_sanitizer=False)
    with Tier(tmp_path, [engine.pool], num_slots=16) as tier:
        engine.attach(tier.mover)
        log = TierLog(tier)
        log.open(0, PROMPT)
        log.run(engine, s0=17)
        log.complete(0)
        op = log.start_save(0)
        log.ops[-1] = named(op, 41)
        with pytest.raises(MoveOfNoPageError, match=r"page 41; allowed are 1 \.\. 40"):
            log.run(engine)


def test_a_step_that_does_not_wait_for_a_load_is_caught_by_its_order(tmp_path) -> None:
    mechanisms = replace(ALL_ON, waits_for_loads=False)
    engine, cuda = tiny_engine(mechanisms, kv_sanitizer=False, checked=True), FakeCuda()
    with Tier(tmp_path, [engine.pool], num_slots=16, make=cuda) as tier:
        engine.attach(tier.mover)
        log = TierLog(tier)
        log.open(0, PROMPT)
        log.run(engine, s0=17)
        log.keep(engine, 0)
        log.run(engine)
        cuda.streams.flows.clear()
        start_load(engine, log, tier)
        with pytest.raises(SanitizerError, match=r"page_loaded: slot 1"):
            log.run(engine, s1=1)
        cuda.streams.flows.set()
