"""Each mechanism of the engine, switched off, is caught by a check that has its name."""

import pytest
import torch

from tests.unit.engine_plans import PlanLog, tiny_engine
from tests.unit.test_graph_runner import read_while_delayed
from workers.engine.engine import Engine
from workers.engine.mechanisms import ALL_ON, Mechanisms
from workers.kvcache.page_table import PageTableError
from workers.kvcache.sanitizer import SanitizerError
from workers.plan import RelocationVersionError


def decode_with_varying_neighbours(engine: Engine) -> None:
    """Three slots in one bucket of three; slot 1 leaves and comes back, so that pads come and go."""
    log = PlanLog()
    for slot in range(3):
        log.open(slot, [slot + 1] * 6)
    log.run(engine, s0=6, s1=6, s2=6)
    for _ in range(4):
        log.run(engine, s0=1, s1=1, s2=1)
    log.close(1)
    log.run(engine, s2=1, s0=1)
    log.open(1, [7] * 9)
    log.run(engine, s1=9, s0=1)
    log.run(engine, s1=1, s0=1, s2=1)


def prefill_beside_decodes(engine: Engine) -> None:
    """Steps of different rows and tokens in one token bucket."""
    log = PlanLog()
    for slot in range(3):
        log.open(slot, [slot + 1] * 12)
    log.run(engine, s0=12)
    log.run(engine, s0=1, s1=7, s2=2)
    log.run(engine, s0=1, s1=3)
    log.run(engine, s2=5)
    log.run(engine, s0=1, s2=3, s1=1)


def lose_an_operation(engine: Engine) -> None:
    """Run a log from which one rank misses the ops of one plan."""
    log = PlanLog()
    log.open(0, [1, 2, 3, 4])
    log.run(engine, s0=4)
    lost = log.plan(s0=1)
    log.tokens[0].append(5)
    assert lost.ops
    log.run(engine, s0=1)


def reuse_a_page(engine: Engine) -> None:
    """Free pages and own them again."""
    log = PlanLog()
    log.open(0, [1] * 9)
    log.run(engine, s0=9)
    log.close(0)
    log.open(1, [2] * 9)
    log.run(engine, s1=9)


def raised_by(run, mechanisms: Mechanisms) -> str:
    with pytest.raises((SanitizerError, PageTableError, RelocationVersionError)) as caught:
        run(tiny_engine(mechanisms, graph_batch_sizes=(3,), graph_token_sizes=(12,)))
    match caught.value:
        case SanitizerError(check=check):
            return check
        case PageTableError():
            return "page_table"
        case _:
            return "relocation_version"


def test_with_all_mechanisms_on_only_the_lost_operation_is_caught() -> None:
    decode_with_varying_neighbours(tiny_engine(ALL_ON, graph_batch_sizes=(3,)))
    prefill_beside_decodes(tiny_engine(ALL_ON, graph_token_sizes=(12,)))
    reuse_a_page(tiny_engine(ALL_ON))
    assert raised_by(lose_an_operation, ALL_ON) == "relocation_version"


@pytest.mark.parametrize("run", [decode_with_varying_neighbours, prefill_beside_decodes])
def test_without_pad_rows_pads_keep_another_step_s_pages(run) -> None:
    assert raised_by(run, Mechanisms(pads_rows=False)) == "pad_rows"


@pytest.mark.parametrize("run", [decode_with_varying_neighbours, prefill_beside_decodes])
def test_without_row_copies_a_step_reads_another_step_s_rows(run) -> None:
    assert raised_by(run, Mechanisms(copies_rows=False)) == "staged_row"


def test_without_the_version_check_a_lost_operation_reaches_the_page_table() -> None:
    assert raised_by(lose_an_operation, Mechanisms(checks_version=False)) == "page_table"


def test_without_poison_a_free_page_is_not_seen_to_be_free() -> None:
    assert raised_by(reuse_a_page, Mechanisms(poisons_pages=False)) == "free_page_untouched"


def check_that_each_pass_reads_its_own(mechanisms: Mechanisms) -> None:
    found = [tokens[0] for tokens, _ in read_while_delayed(mechanisms, 6)]
    assert found == [1, 2, 3, 4, 5, 6], f"staged_inputs: passes read {found}"


def test_without_the_staging_ring_a_pass_reads_a_later_step_s_inputs() -> None:
    check_that_each_pass_reads_its_own(ALL_ON)
    with pytest.raises(AssertionError, match=r"staged_inputs: passes read \[6, 6, 6, 6, 6, 6\]"):
        check_that_each_pass_reads_its_own(Mechanisms(rings_staging=False))


def test_poison_that_is_read_is_seen_in_the_logits() -> None:
    engine, log = tiny_engine(), PlanLog()
    log.open(0, [1, 2, 3])
    log.run(engine, s0=3)
    # The pool's bytes change behind the engine's back: a page is lost under a running request.
    engine._pool.data[log.pages[0][0]] = 0xFF
    with pytest.raises(SanitizerError, match="finite_logits"):
        log.run(engine, s0=1)
    assert not torch.is_inference_mode_enabled()
