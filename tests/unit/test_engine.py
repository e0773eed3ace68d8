"""Engine: plans in, tokens out, on a random two-layer model, the sanitizer on."""

import itertools

import msgspec
import pytest
import torch

from cache_service.keys import KVNamespace
from tests.unit.engine_plans import VOCAB_SIZE, PlanLog, generate, tiny_card, tiny_engine
from workers.config import WorkerConfig
from workers.engine.device_memory import work_bytes
from workers.engine.engine import Engine, TokenError
from workers.engine.graph_guard import Bucket
from workers.kvcache.page_table import PageTableError
from workers.kvcache.pool_size import PoolSizeError, is_measured, left_bytes, pool_size
from workers.plan import RelocationVersion, RelocationVersionError, SetRow
from workers.protocol import SamplingParams

PROMPTS = [[5, 9, 2], [7] * 11, list(range(20)), [1]]


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    """Each prompt's tokens when it runs alone, eager, in one chunk."""
    return [generate(tiny_engine(graphs=False), [prompt], 12)[0] for prompt in PROMPTS]


def test_the_model_answers_differently_to_different_prompts(expected: list[list[int]]) -> None:
    assert len({tuple(tokens) for tokens in expected}) == len(PROMPTS)
    assert all(len(set(tokens)) > 2 for tokens in expected)


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("chunk_len", [3, 256])
def test_batches_chunks_pages_and_graphs_change_no_token(
    expected: list[list[int]], graphs: bool, page_size: int, chunk_len: int
) -> None:
    engine = tiny_engine(graphs=graphs, page_size=page_size, num_pages=160 // page_size)
    assert generate(engine, PROMPTS, 12, chunk_len) == expected
    assert engine.num_sanitized_steps == sum(engine.graph_steps.values()) >= 12


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("chunk_len", [3, 256])
def test_token_buckets_change_no_token(
    expected: list[list[int]], backend: str, page_size: int, chunk_len: int
) -> None:
    engine = tiny_engine(
        graph_token_sizes=(4, 12, 48),
        page_size=page_size,
        num_pages=160 // page_size,
        attention_backend=backend,
    )
    assert generate(engine, PROMPTS, 12, chunk_len) == expected
    assert not engine.eager_steps
    assert engine.graph_steps["mixed", "replay"] > 0
    assert engine.num_sanitized_steps == sum(engine.graph_steps.values())


def test_steps_of_more_tokens_than_any_bucket_and_pure_prefills_are_counted_as_such() -> None:
    engine, log = tiny_engine(graph_token_sizes=(8,)), PlanLog()
    log.open(0, PROMPTS[2])
    log.open(1, PROMPTS[1])
    log.run(engine, s0=9)
    log.run(engine, s0=4, s1=4)
    log.run(engine, s0=1, s1=6)
    log.run(engine, s0=1, s1=1)
    assert engine.graph_steps == {
        ("extend", "eager"): 1,
        ("extend", "replay"): 1,
        ("mixed", "replay"): 1,
        ("decode", "replay"): 1,
    }
    assert engine.eager_steps == {("extend", "no_bucket"): 1}


def test_a_failed_token_bucket_runs_eager(expected: list[list[int]]) -> None:
    engine = tiny_engine(graph_token_sizes=(12, 48))
    engine._guard.mark_failed(Bucket("mixed", 48))
    assert generate(engine, PROMPTS, 12) == expected
    assert engine.eager_steps == {("mixed", "capture_failed"): 1}


@pytest.mark.parametrize("family", ["mistral", "qwen3"])
def test_sliding_windows_and_query_norms_change_no_token_under_graphs(family: str) -> None:
    card = tiny_card(
        family=family,
        sliding_window=5 if family == "mistral" else None,
        qk_norm=family == "qwen3",
    )
    eager, replayed = (
        generate(tiny_engine(card=card, graphs=graphs), PROMPTS, 12) for graphs in (False, True)
    )
    assert eager == replayed


def test_padded_buckets_change_no_token(expected: list[list[int]]) -> None:
    engine = tiny_engine(graph_batch_sizes=(6,))
    assert generate(engine, PROMPTS, 12) == expected
    assert engine.graph_steps["decode", "replay"] == 11
    assert engine.eager_steps["mixed", "mixed"] == 1  # prompt [1] makes the first step a mixed one


def test_neighbours_that_come_and_go_change_no_token(expected: list[list[int]]) -> None:
    engine, log = tiny_engine(), PlanLog()
    log.open(0, PROMPTS[2])
    log.run(engine, s0=20)
    log.open(1, PROMPTS[1])
    log.run(engine, s0=1, s1=11)
    log.run(engine, s0=1, s1=1)
    log.close(1)
    log.run(engine, s0=1)
    log.open(1, PROMPTS[0])
    log.open(3, PROMPTS[3])
    log.run(engine, s1=2, s0=1, s3=1)
    log.run(engine, s3=1, s0=1, s1=1)
    log.close(3)
    while len(log.tokens[0]) < 32:
        log.run(engine, s1=1, s0=1)
    assert log.tokens[0][20:] == expected[2]
    assert log.tokens[1][3:] == expected[0][: len(log.tokens[1]) - 3]


def test_a_shared_prefix_changes_no_token(expected: list[list[int]]) -> None:
    engine, log = tiny_engine(), PlanLog()
    log.open(0, PROMPTS[2])
    log.run(engine, s0=20)
    log.complete(0)
    log.open(1, PROMPTS[2])
    log.share(1, log.pages[0][:4])
    log.run(engine, s1=4, s0=1)
    log.close(0, num_kept=4)
    while len(log.tokens[1]) < 32:
        log.run(engine, s1=1)
    assert log.tokens[1][20:] == expected[2]


def test_rows_that_are_not_sampled_are_left_out_of_the_output() -> None:
    engine, log = tiny_engine(), PlanLog()
    for slot in range(3):
        log.open(slot, PROMPTS[1][: slot + 2])
    plan = log.plan(s0=1, s1=1, s2=1)  # single-token chunks: a decode step, nothing to sample
    assert (plan.mode, engine.run(plan).token_ids) == ("decode", [])
    plan = log.plan(s0=1, s1=1, s2=1)
    assert plan.sampled == [0]
    output = engine.run(plan)
    alone = generate(tiny_engine(graphs=False), [PROMPTS[1][:2]], 1)
    assert output.token_ids == alone[0]
    assert engine.graph_steps["decode", "replay"] == 2


@pytest.mark.parametrize("graphs", [True, False])
def test_steps_launched_ahead_run_the_tokens_that_only_the_device_knows(
    expected: list[list[int]], graphs: bool
) -> None:
    engine = tiny_engine(graphs=graphs, overlap_depth=1, graph_batch_sizes=(6,))
    log, slots = PlanLog(), (2, 0, 1)  # rows are in another order than slots
    for slot in slots:
        log.open(slot, PROMPTS[slot])
    plans = [log.plan(**{f"s{slot}": len(PROMPTS[slot]) for slot in slots})]
    engine.launch(plans[0])
    for step in range(11):
        plans.append(log.plan_ahead(*(slots if step % 2 else slots[::-1])))
        engine.launch(plans[-1])
        log.take(plans[-2], engine.collect())
        assert all(op.pages for op in plans[-1].ops)
    log.take(plans[-1], engine.collect())
    assert [log.tokens[slot][len(PROMPTS[slot]) :] for slot in range(3)] == expected[:3]
    assert engine.graph_steps["decode", "replay" if graphs else "eager"] == 11


@pytest.mark.parametrize("graph_token_sizes", [None, (32,)], ids=["eager", "replay"])
def test_a_step_may_run_awaited_tokens_beside_known_ones_and_a_prompt(
    expected: list[list[int]], graph_token_sizes: tuple[int, ...] | None
) -> None:
    engine, log = tiny_engine(overlap_depth=1, graph_token_sizes=graph_token_sizes), PlanLog()
    for slot in range(2):
        log.open(slot, PROMPTS[slot])
    first = log.plan(s0=3, s1=11)
    output = engine.run(first)
    log.take(first, output)
    decodes = log.plan(s0=1)
    engine.launch(decodes)
    log.open(2, PROMPTS[2])
    prefill = log.plan(s1=1, s2=20)
    ahead = log.plan_ahead(0)
    mixed = msgspec.structs.replace(
        prefill,
        relocation_version=ahead.relocation_version,
        ops=prefill.ops + ahead.ops,
        slots=[0, *prefill.slots],
        starts=[4, *prefill.starts],
        lens=[1, *prefill.lens],
        sampled=[0, 1, 2],
        num_awaited=1,
    )
    engine.launch(mixed)
    log.take(decodes, engine.collect())
    log.take(mixed, engine.collect())
    assert log.tokens[0][3:] == expected[0][:3]
    assert log.tokens[1][11:] == expected[1][:2]
    assert log.tokens[2][20:] == expected[2][:1]
    assert engine.graph_steps["mixed", "replay" if graph_token_sizes else "eager"] == 1


def test_a_rank_that_keeps_no_tokens_refuses_a_plan_that_awaits_some() -> None:
    engine, log = tiny_engine(overlap_depth=0), PlanLog()
    log.open(0, PROMPTS[0])
    log.run(engine, s0=3)
    with pytest.raises(AssertionError, match="awaits tokens"):
        engine.launch(log.plan_ahead(0))


def test_sampled_tokens_do_not_depend_on_graphs_or_neighbours() -> None:
    sampling = SamplingParams(temperature=1.0, top_k=50)
    streams = []
    for graphs, others in itertools.product([True, False], [[], [1, 2]]):
        engine, log = tiny_engine(graphs=graphs), PlanLog()
        for slot in [0, *others]:
            log.open(slot, PROMPTS[slot], sampling)
        lens = {f"s{slot}": len(PROMPTS[slot]) for slot in [*others, 0]}
        for _ in range(10):
            log.run(engine, **lens)
            lens = dict.fromkeys(lens, 1)
        streams.append(log.tokens[0])
    assert streams[1:] == streams[:-1]


def test_a_plan_without_rows_applies_its_ops() -> None:
    engine, log = tiny_engine(), PlanLog()
    log.own(3)
    plan = log.plan()
    output = engine.run(plan)
    assert (output.token_ids, output.relocation_version) == ([], RelocationVersion(7, 1))
    log.open(0, [1, 2])
    assert len(log.run(engine, s0=2).token_ids) == 1
    assert sum(engine.graph_steps.values()) == 1


def test_a_plan_of_another_version_is_refused_before_anything_is_applied() -> None:
    engine, log = tiny_engine(), PlanLog()
    log.open(0, [1, 2, 3, 4])
    log.run(engine, s0=4)
    lost = log.plan(s0=1)  # slot 0's next page: this plan never reaches the rank
    assert any(isinstance(op, SetRow) for op in lost.ops)
    log.tokens[0].append(1)
    with pytest.raises(RelocationVersionError, match=r"found relocation version 7\.1, .* 7\.2"):
        engine.run(log.plan(s0=1))
    assert sum(engine.graph_steps.values()) == 1


def test_another_incarnation_is_refused() -> None:
    engine, log = tiny_engine(), PlanLog()
    log.open(0, [1])
    log.run(engine, s0=1)
    log.version = RelocationVersion(8, log.version.counter)
    with pytest.raises(RelocationVersionError):
        engine.run(log.plan(s0=1))


def test_a_restarted_rank_does_not_join_a_log_in_its_middle() -> None:
    log = PlanLog()
    log.open(0, [1])
    log.run(tiny_engine(), s0=1)
    with pytest.raises(RelocationVersionError, match=r"7\.0, .* 7\.1"):
        tiny_engine().run(log.plan(s0=1))


@pytest.mark.parametrize("token_id", [-1, VOCAB_SIZE])
def test_checked_mode_refuses_a_token_outside_the_vocabulary(token_id: int) -> None:
    engine, log = tiny_engine(kv_sanitizer=False, checked=True), PlanLog()
    log.open(0, [1, token_id, 3])
    with pytest.raises(TokenError, match=rf"{token_id}.*allowed are 0 \.\. {VOCAB_SIZE - 1}"):
        engine.run(log.plan(s0=3))


def test_checked_mode_refuses_a_row_without_pages() -> None:
    engine, log = tiny_engine(kv_sanitizer=False, checked=True), PlanLog()
    log.open(0, [1, 2, 3])
    plan = log.plan(s0=3)
    plan.ops[:] = [op for op in plan.ops if not isinstance(op, SetRow)]
    with pytest.raises(PageTableError, match="slot 0 has no page for position 0"):
        engine.run(plan)


def test_a_request_longer_than_a_row_is_refused() -> None:
    engine, log = tiny_engine(max_context_len=8), PlanLog()
    log.open(0, list(range(9)))
    with pytest.raises(PageTableError, match="max_context_len"):
        engine.run(log.plan(s0=9))


def namespace(**options: object) -> KVNamespace:
    return tiny_engine(**options).namespace


def test_the_namespace_names_all_that_changes_kv() -> None:
    base = namespace()
    assert namespace() == base
    assert namespace(graphs=False, num_pages=20, max_running_requests=2).digest() == base.digest()
    others = [
        namespace(seed=1),
        namespace(page_size=8),
        namespace(dtype="bfloat16"),
        tiny_engine(card=tiny_card(rope_theta=20_000.0)).namespace,
        tiny_engine(card=tiny_card(sliding_window=16)).namespace,
        tiny_engine(card=tiny_card(rms_norm_eps=1e-6)).namespace,
    ]
    assert len({other.digest() for other in [base, *others]}) == len(others) + 1


def size(**options: object) -> tuple[int, int]:
    engine = tiny_engine(**{"num_pages": None, **options})
    return engine.num_pages, engine.max_context_len


def test_the_pool_is_sized_by_pages_or_by_memory() -> None:
    bundle_bytes = tiny_engine().layout.bundle_bytes
    assert size(num_pages=12) == (12, 48)  # the pool holds less than the model's 256
    assert size(num_pages=100) == (100, 256)
    assert size(num_pages=100, max_context_len=70) == (100, 70)
    assert size(kv_gb=9.5 * bundle_bytes / 2**30) == (8, 32)  # the ninth is the dummy page


def test_a_measured_pool_takes_what_its_share_of_the_device_leaves() -> None:
    gib = 1 << 30
    assert left_bytes(80 * gib, 60 * gib, 0.9, 2 * gib) == 50 * gib
    config = WorkerConfig(device="cuda")
    assert is_measured(config) and not is_measured(WorkerConfig())
    assert not is_measured(WorkerConfig(device="cuda", kv_gb=1.0))
    assert pool_size(config, 1 << 20, 4096, 60 * gib, 50 * gib).num_pages == 50 * 1024 - 1
    assert pool_size(config, 64, 4096, 60 * gib, 50 * gib).num_pages == 1 << 22  # of tiny pages, not all
    with pytest.raises(PoolSizeError, match=r"device_memory_ratio=0.2 of 80.00 GiB leaves nothing"):
        left_bytes(80 * gib, 60 * gib, 0.2, 2 * gib)
    with pytest.raises(PoolSizeError, match=r"device_memory_ratio=0.9 holds no page"):
        pool_size(config, 1 << 30, 4096, 60 * gib, gib)
    with pytest.raises(PoolSizeError, match=r"takes 50.00 GiB .* lower device_memory_ratio"):
        pool_size(config, 1 << 20, 4096, 40 * gib, 50 * gib)


def test_work_space_grows_with_what_a_step_may_hold() -> None:
    small, large = (
        work_bytes(WorkerConfig(max_tokens_per_step=tokens), tiny_card()) for tokens in (256, 1024)
    )
    assert 0 < small < large < 1 << 30


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_gb": 1e-6}, r"kv_gb=1e-06 holds no page.*kv_gb >="),
        ({"kv_gb": 1e6}, r"kv_gb=1000000.0 takes .* GiB .* available.*lower kv_gb"),
        ({"num_pages": 10**12}, r"num_pages=1000000000000 takes .*lower num_pages"),
        ({"num_pages": 4, "max_context_len": 17}, r"max_context_len=17.*4 pages, 16 tokens; lower"),
        ({"max_context_len": 257}, r"max_context_len=257; the model allows at most 256"),
    ],
)
def test_too_little_memory_is_a_clear_error(options: dict[str, object], message: str) -> None:
    with pytest.raises(PoolSizeError, match=message):
        size(**options)


def test_dtypes_decode() -> None:
    for dtype in ("bfloat16", "float16"):
        tokens = generate(tiny_engine(dtype=dtype), PROMPTS, 5)
        assert all(0 <= token < VOCAB_SIZE for row in tokens for token in row)


def test_close_lets_go_of_the_pool() -> None:
    import gc
    import weakref

    engine: Engine = tiny_engine()
    generate(engine, PROMPTS[:1], 2)
    pool = weakref.ref(engine._pool)
    engine.close()
    gc.collect()
    assert pool() is None
    assert torch.is_inference_mode_enabled() is False
