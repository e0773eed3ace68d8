"""GraphGuard: how a step runs, and the count of why."""

import pytest

from workers.engine.graph_guard import Bucket, Decision, GraphGuard, default_batch_sizes, default_token_sizes


def test_decode_replays_in_the_smallest_bucket_that_holds_it() -> None:
    guard = GraphGuard([8, 1, 4], enabled=True, supported=True)
    found = [guard.decide("decode", rows, rows).bucket for rows in (1, 2, 4, 5, 8)]
    assert found == [Bucket("decode", size) for size in (1, 4, 4, 8, 8)]
    assert guard.steps == {("decode", "replay"): 5}
    assert not guard.eager_steps


@pytest.mark.parametrize(
    ("mode", "num_rows", "reason"),
    [("decode", 9, "no_bucket"), ("mixed", 2, "mixed"), ("extend", 1, "unsupported")],
)
def test_other_steps_run_eager_for_a_reason(mode: str, num_rows: int, reason: str) -> None:
    guard = GraphGuard([1, 8], enabled=True, supported=True)
    assert guard.decide(mode, num_rows, 9) == Decision(None, reason)
    assert guard.steps == {(mode, "eager"): 1}
    assert guard.eager_steps == {(mode, reason): 1}


@pytest.mark.parametrize("mode", ["decode", "mixed", "extend"])
def test_graphs_switched_off_say_so_for_every_mode(mode: str) -> None:
    assert GraphGuard([8], enabled=False, supported=True).decide(mode, 1, 1).reason == "disabled"


def test_a_device_without_graphs_says_so() -> None:
    assert GraphGuard([8], enabled=True, supported=False).decide("decode", 1, 1).reason == "unsupported"


def test_a_bucket_whose_capture_failed_is_not_replaced_by_a_larger_one() -> None:
    guard = GraphGuard([2, 4], enabled=True, supported=True)
    guard.mark_failed(Bucket("decode", 2))
    assert guard.decide("decode", 1, 1) == Decision(None, "capture_failed")
    assert guard.decide("decode", 3, 3) == Decision(Bucket("decode", 4), None)


@pytest.mark.parametrize("mode", ["mixed", "extend"])
def test_steps_that_prefill_replay_in_the_smallest_token_bucket_that_holds_them(mode: str) -> None:
    guard = GraphGuard([1, 8], enabled=True, supported=True, token_sizes=[64, 16])
    found = [guard.decide(mode, rows, tokens).bucket for rows, tokens in ((1, 2), (9, 16), (2, 17), (3, 64))]
    assert found == [Bucket("mixed", size) for size in (16, 16, 64, 64)]
    assert guard.decide(mode, 1, 65) == Decision(None, "no_bucket")
    assert guard.steps == {(mode, "replay"): 4, (mode, "eager"): 1}
    assert guard.decide("decode", 9, 9) == Decision(None, "no_bucket")  # never in a token bucket
    guard.mark_failed(Bucket("mixed", 16))
    assert guard.decide(mode, 1, 2) == Decision(None, "capture_failed")
    assert guard.decide(mode, 1, 17) == Decision(Bucket("mixed", 64), None)
    assert guard.decide("decode", 1, 1) == Decision(Bucket("decode", 1), None)


def test_token_sizes_are_those_that_are_replayed() -> None:
    guard = GraphGuard([1, 8], enabled=True, supported=True, token_sizes=[64, 16, 32])
    guard.mark_failed(Bucket("mixed", 32))
    guard.mark_failed(Bucket("decode", 8))
    assert guard.token_sizes == [16, 64]
    assert GraphGuard([1], enabled=False, supported=True, token_sizes=[16]).token_sizes == []


def test_there_are_no_buckets_to_prepare_where_none_is_replayed() -> None:
    sizes = {"batch_sizes": [4, 2], "token_sizes": [16]}
    assert GraphGuard(enabled=True, supported=True, **sizes).buckets == [
        Bucket("decode", 2),
        Bucket("decode", 4),
        Bucket("mixed", 16),
    ]
    assert GraphGuard(enabled=False, supported=True, **sizes).buckets == []
    assert GraphGuard(enabled=True, supported=False, **sizes).buckets == []


@pytest.mark.parametrize("max_tokens", [2, 16, 17, 100, 256, 777, 1024])
def test_default_token_buckets_waste_at_most_a_fifth_of_a_larger_step(max_tokens: int) -> None:
    sizes = default_token_sizes(max_tokens)
    assert sizes == tuple(sorted(set(sizes)))
    assert sizes[-1] == max_tokens
    for below, size in zip((0, *sizes), sizes, strict=False):
        assert size - below <= 16 or (size - below - 1) / size <= 0.2


@pytest.mark.parametrize("max_rows", [1, 2, 3, 9, 32, 256, 4096])
def test_default_buckets_waste_at_most_a_fifth_of_a_step(max_rows: int) -> None:
    sizes = default_batch_sizes(max_rows)
    assert sizes == tuple(sorted(set(sizes)))
    assert sizes[-1] == max_rows
    for below, size in zip((0, *sizes), sizes, strict=False):
        assert (size - below - 1) / size <= 0.2


def test_a_load_that_is_waited_for_changes_the_count_and_nothing_else() -> None:
    guard = GraphGuard([4], enabled=True, supported=True)
    replay = Decision(Bucket("decode", 4), None)
    assert guard.decide("decode", 3, 3, after_load=True) == guard.decide("decode", 3, 3) == replay
    assert guard.decide("decode", 9, 9, after_load=True) == Decision(None, "no_bucket")
    assert guard.decide("extend", 1, 5, after_load=True) == Decision(None, "unsupported")
    assert guard.steps == {
        ("decode", "replay_after_load"): 1,
        ("decode", "replay"): 1,
        ("decode", "eager"): 1,
        ("extend", "eager"): 1,
    }


def test_rows_that_bring_few_drafts_are_padded_to_a_verify_bucket():
    guard = GraphGuard([1, 2], enabled=True, supported=True, verify_lens=[2, 4])
    found = [guard.decide("verify", rows, tokens).bucket for rows, tokens in ((1, 2), (1, 3), (2, 5), (2, 8))]
    assert found == [Bucket("verify", size) for size in (2, 4, 8, 8)]
    assert guard.decide("verify", 3, 9) == Decision(None, "no_bucket")
    plain = GraphGuard([1, 2], enabled=True, supported=True)
    assert plain.decide("verify", 1, 2) == Decision(None, "unsupported")


def test_the_passes_of_a_draft_are_counted_beside_the_steps():
    guard = GraphGuard([1], enabled=True, supported=True)
    guard.count("draft", None)
    guard.count("draft", "capture_failed")
    guard.count("draft_extend", None, after_load=True)
    assert guard.steps == {
        ("draft", "replay"): 1,
        ("draft", "eager"): 1,
        ("draft_extend", "replay_after_load"): 1,
    }
    assert guard.eager_steps == {("draft", "capture_failed"): 1}
