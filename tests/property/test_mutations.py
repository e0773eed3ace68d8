"""Safety mechanisms, switched off alone in a whole replica, are missed by a named check.

The switches are constructor arguments that no configuration reaches. Here Scheduler and Engine are the real
ones; test_mutations_*.py beside this file pin down each part by itself, and what takes a delay, a lost
operation or a cache tier to show. docs/invariants.md says which test is for which invariant.
"""

from dataclasses import fields, replace
from random import Random

import pytest

from tests.harness import Harness, tiny_config, write_tiny_model
from workers.engine.mechanisms import ALL_ON, Mechanisms
from workers.kvcache.page_pool import Safety
from workers.kvcache.page_table import PageTableError
from workers.kvcache.sanitizer import SanitizerError
from workers.plan import FreePages, RelocationVersionError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


def drive(model, *, safety=None, mechanisms=ALL_ON):
    """Serve requests with shared prefixes in a pool too small for them, some of them aborted, in buckets."""
    random = Random(5)
    config = tiny_config(model, num_pages=20, max_running_requests=6, graph_batch_sizes=(3, 6))
    with Harness(config, safety=safety, mechanisms=mechanisms) as harness:
        for number in range(24):
            prompt = [7] * 9 + [number + 3] * random.randrange(1, 20)
            harness.submit(str(number), prompt, max_tokens=random.randrange(1, 40), ignore_eos=True)
            if number % 5 == 4:
                harness.abort(str(number - 2))
            harness.step()
        harness.run()
        harness.idle_pages()
        return harness.scheduler.stats, harness.cache.stats(), harness.engine.graph_steps


def test_with_all_mechanisms_on_nothing_fires(model):
    requests, pages, steps = drive(model)
    assert requests.num_preemptions > 0
    assert requests.num_cached_tokens > 0
    assert requests.num_finished["abort"] > 0
    assert pages.num_evictions > 0
    assert steps["decode", "replay"] > 0


# How a whole replica notices, by the switch of Safety (bookkeeping) or Mechanisms (engine).
NOTICED_BY = {
    "leases": r"page \d+ of the tree has \d leases, \d locks",
    "generations": r"generation_rises: .* page \d+",
    "reservations": r"slot \d has no page for position \d+",
    "pads_rows": r"pad_rows: .* expected tokens on the dummy page",
    "copies_rows": r"staged_row: slot \d, page \d+",
    "poisons_pages": r"free_page_untouched: .* expected the poison of a free page",
}


@pytest.mark.parametrize("switch", NOTICED_BY)
def test_a_mechanism_switched_off_is_noticed(switch, model):
    is_bookkeeping = switch in {field.name for field in fields(Safety)}
    safety = Safety(**{switch: False}) if is_bookkeeping else Safety()
    mechanisms = ALL_ON if is_bookkeeping else replace(ALL_ON, **{switch: False})
    with pytest.raises((AssertionError, SanitizerError, PageTableError), match=NOTICED_BY[switch]):
        drive(model, safety=safety, mechanisms=mechanisms)


def lose_an_operation(model, *, safety, mechanisms):
    """Drop the first FreePages on its way to the engine, then need the page again."""
    config = tiny_config(model, num_pages=6, prefix_caching=False)
    with Harness(config, safety=safety, mechanisms=mechanisms) as harness:
        for name in ("first", "second"):
            harness.submit(name, [5] * 16, max_tokens=4, ignore_eos=True)
            harness.run()
            harness.step(lost=FreePages)
            harness.idle_pages()


def test_a_lost_operation_is_caught_by_the_engine_before_anything_runs(model):
    with pytest.raises(RelocationVersionError) as caught:
        lose_an_operation(model, safety=Safety(), mechanisms=ALL_ON)
    assert caught.traceback[-1].path.name == "engine.py"


def test_without_the_engine_s_version_check_the_scheduler_s_catches_it(model):
    with pytest.raises(RelocationVersionError) as caught:
        lose_an_operation(model, safety=Safety(), mechanisms=Mechanisms(checks_version=False))
    assert caught.traceback[-1].path.name == "scheduler.py"


def test_without_both_version_checks_the_sanitizer_catches_it_when_the_page_is_reused(model):
    with pytest.raises(SanitizerError, match=r"own_free: .* expected free, found complete"):
        lose_an_operation(model, safety=Safety(versions=False), mechanisms=Mechanisms(checks_version=False))
