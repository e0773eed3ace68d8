"""Recording: what is replayed is what was recorded, over whatever the inputs hold by then."""

import pytest
import torch

from tests.unit.engine_plans import PlanLog, generate, tiny_card, tiny_engine
from workers.engine.graph_guard import Bucket
from workers.engine.graph_runner import GraphRunner, repeats
from workers.engine.mechanisms import ALL_ON, Mechanisms
from workers.engine.model_runner import ModelRunner
from workers.engine.recording import Arena, Recording, RecordingError, RecordingKernels
from workers.kvcache.kv_pool import KVPool
from workers.kvcache.layout import target_only

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def kernels() -> RecordingKernels:
    found = RecordingKernels.load()
    assert isinstance(found, RecordingKernels)
    return found


def test_torch_operations_and_kernels_are_repeated_in_order(kernels: RecordingKernels) -> None:
    x = torch.randn(3, 64)
    weight = torch.randn(64)
    table = torch.randn(10, 64)
    ids = torch.tensor([1, 2, 3])

    def step() -> torch.Tensor:
        hidden = torch.nn.functional.embedding(ids, table) + x
        first, second = kernels.rms_norm(hidden, weight, 1e-5).chunk(2, dim=1)
        gated = kernels.silu_mul(torch.cat([second, first], dim=1))
        gated += 1.0
        gated = gated.sort(dim=1).values
        return gated[:, :20].double().float()

    with torch.inference_mode():
        with Recording(kernels, Arena()) as recording:
            recorded = step()
        assert torch.equal(recorded, step())
        for seed in range(3):
            torch.manual_seed(seed)
            x.normal_()
            ids.random_(10)
            expected = step()
            assert not torch.equal(recorded, expected)
            recording.replay()
            assert torch.equal(recorded, expected)
    assert kernels.launches is None
    assert recording.num_launches == 9  # embedding, +, norm, cat, silu, +=, sort, double, float: no views


def test_an_error_while_recording_leaves_the_kernels_unrecorded(kernels: RecordingKernels) -> None:
    with pytest.raises(RecordingError, match="to the host"), Recording(kernels, Arena()):
        torch.randn(()).item()
    assert kernels.launches is None


def test_the_arena_gives_every_tensor_memory_of_its_own_and_the_same_after_a_reset() -> None:
    arena = Arena()
    shapes = [(3, 5), (1,), (700, 1000), (2, 2, 2), (2_000_000,), (9,)]

    def fill() -> list[torch.Tensor]:
        tensors = [arena.take(shape, torch.float32) for shape in shapes]
        for index, tensor in enumerate(tensors):
            tensor.fill_(index)
        return tensors

    tensors = fill()
    assert [tuple(tensor.shape) for tensor in tensors] == shapes
    assert all(bool((tensor == index).all()) for index, tensor in enumerate(tensors))
    assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors)
    arena.reset()
    assert [tensor.data_ptr() for tensor in fill()] == [tensor.data_ptr() for tensor in tensors]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_recorded_and_eager_decode_give_the_same_tokens(family: str, dtype: str) -> None:
    card = tiny_card(
        family=family,
        dtype=dtype,
        hidden_size=64,
        intermediate_size=96,
        head_dim=16,
        sliding_window=5 if family == "mistral" else None,
        qk_norm=family == "qwen3",
        tied_embeddings=family == "llama",
    )
    prompts = [[5, 9, 2], [7] * 11, list(range(20))]
    options = {"card": card, "attention_backend": "native", "graph_batch_sizes": (2, 4)}
    replayed, eager = tiny_engine(**options), tiny_engine(graphs=False, **options)
    assert generate(replayed, prompts, 20) == generate(eager, prompts, 20)
    assert replayed.graph_steps["decode", "replay"] == 19
    assert not replayed.eager_steps["decode", "capture_failed"]


def logits_kept_and_seen(mechanisms: Mechanisms) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Run four replays; return each one's logits as they are at the end and as they were then."""
    engine = tiny_engine(mechanisms, attention_backend="native", kv_sanitizer=False)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    replay = engine._graphs.replay

    def spy(batch):
        logits = replay(batch)
        seen.append((logits, logits.clone()))
        return logits

    engine._graphs.replay = spy
    log = PlanLog()
    log.open(0, [1, 2, 3])
    log.run(engine, s0=3)
    for _ in range(4):
        log.run(engine, s0=1)
    assert len({tuple(copy.flatten().tolist()) for _, copy in seen}) == 4
    return seen


def check_that_logits_last(mechanisms: Mechanisms) -> None:
    last = [torch.equal(logits, copy) for logits, copy in logits_kept_and_seen(mechanisms)]
    assert all(last), f"replayed_logits: they last {last}"


def test_logits_of_a_replay_outlive_the_next() -> None:
    check_that_logits_last(ALL_ON)
    with pytest.raises(AssertionError, match=r"replayed_logits: they last \[False, False, False, True\]"):
        check_that_logits_last(Mechanisms(clones_outputs=False))


def test_a_replay_may_round_otherwise_and_no_more() -> None:
    computed = torch.tensor([[3.0, -20.0, 0.5]])
    assert repeats(computed.nextafter(torch.tensor(0.0)), computed)
    assert not repeats(computed * 1.001, computed)
    assert not repeats(torch.full_like(computed, torch.nan), computed)


class HostBranching:
    """A model whose values pass through the host: no recording can repeat it."""

    def __init__(self, is_open_about_it: bool) -> None:
        self.is_open_about_it = is_open_about_it

    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor, attention: object) -> torch.Tensor:
        first = token_ids[0].item() if self.is_open_about_it else token_ids.numpy()[0]
        return torch.ones(len(token_ids), 4) * int(first)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


class NoAttention:
    captured_modes: frozenset[str] = frozenset()

    def plan(self, batch: object) -> None:
        pass

    def begin(self) -> None:
        pass


@pytest.mark.parametrize(
    ("is_open_about_it", "reason"),
    [(True, "hands a value to the host"), (False, "a replay differs from the decoder")],
)
def test_a_step_that_does_not_repeat_is_not_captured(
    kernels: RecordingKernels, caplog: pytest.LogCaptureFixture, is_open_about_it: bool, reason: str
) -> None:
    pool = KVPool(target_only(1, 4, 1, 8, "float32"), 3, CPU)
    runner = ModelRunner(HostBranching(is_open_about_it), NoAttention(), pool)
    buckets = [Bucket("decode", 1), Bucket("decode", 2)]
    graphs = GraphRunner(runner, buckets, 4, 2, CPU, kernels=kernels)
    assert graphs.capture() == buckets[::-1]
    assert reason in caplog.text
