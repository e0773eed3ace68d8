"""GraphGuard: how a step runs, and the count of why."""

import pytest

from workers.engine.graph_guard import Decision, GraphGuard, default_batch_sizes


def test_decode_replays_in_the_smallest_bucket_that_holds_it() -> None:
    guard = GraphGuard([8, 1, 4], enabled=True, supported=True)
    assert [guard.decide("decode", rows).bucket for rows in (1, 2, 4, 5, 8)] == [1, 4, 4, 8, 8]
    assert guard.steps == {("decode", "replay"): 5}
    assert not guard.eager_steps


@pytest.mark.parametrize(
    ("mode", "num_rows", "reason"),
    [("decode", 9, "no_bucket"), ("mixed", 2, "mixed"), ("extend", 1, "unsupported")],
)
def test_other_steps_run_eager_for_a_reason(mode: str, num_rows: int, reason: str) -> None:
    guard = GraphGuard([1, 8], enabled=True, supported=True)
    assert guard.decide(mode, num_rows) == Decision(None, reason)
    assert guard.steps == {(mode, "eager"): 1}
    assert guard.eager_steps == {(mode, reason): 1}


@pytest.mark.parametrize("mode", ["decode", "mixed", "extend"])
def test_graphs_switched_off_say_so_for_every_mode(mode: str) -> None:
    assert GraphGuard([8], enabled=False, supported=True).decide(mode, 1).reason == "disabled"


def test_a_device_without_graphs_says_so() -> None:
    assert GraphGuard([8], enabled=True, supported=False).decide("decode", 1).reason == "unsupported"


def test_a_bucket_whose_capture_failed_is_not_replaced_by_a_larger_one() -> None:
    guard = GraphGuard([2, 4], enabled=True, supported=True)
    guard.mark_failed(2)
    assert guard.decide("decode", 1) == Decision(None, "capture_failed")
    assert guard.decide("decode", 3) == Decision(4, None)


@pytest.mark.parametrize("max_rows", [1, 2, 3, 9, 32, 256, 4096])
def test_default_buckets_waste_at_most_a_fifth_of_a_step(max_rows: int) -> None:
    sizes = default_batch_sizes(max_rows)
    assert sizes == tuple(sorted(set(sizes)))
    assert sizes[-1] == max_rows
    for below, size in zip((0, *sizes), sizes, strict=False):
        assert (size - below - 1) / size <= 0.2


def test_a_load_that_is_waited_for_changes_the_count_and_nothing_else() -> None:
    guard = GraphGuard([4], enabled=True, supported=True)
    assert guard.decide("decode", 3, after_load=True) == guard.decide("decode", 3) == Decision(4, None)
    assert guard.decide("decode", 9, after_load=True) == Decision(None, "no_bucket")
    assert guard.decide("extend", 1, after_load=True) == Decision(None, "unsupported")
    assert guard.steps == {
        ("decode", "replay_after_load"): 1,
        ("decode", "replay"): 1,
        ("decode", "eager"): 1,
        ("extend", "eager"): 1,
    }
