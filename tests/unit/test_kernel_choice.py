"""choose_kernels: which backend a rank gets, and what is said where it cannot be had."""

import re
from types import SimpleNamespace

import pytest
import torch

from tests.unit.flashinfer_fakes import FakeLibrary
from workers.attention.choice import BackendError, choose_kernels
from workers.attention.flashinfer import FlashInferAttention
from workers.attention.flashinfer_kernels import FlashInferError, HeadShape, PlanLimits
from workers.attention.native import NativeAttention
from workers.attention.pool_kernels import TorchPoolKernels
from workers.attention.reference import ReferenceAttention
from workers.config import WorkerConfig
from workers.engine.copies import InlineCopies
from workers.kvcache.kv_pool import KVPool
from workers.kvcache.layout import target_only
from workers.models.config import ModelConfig
from workers.models.decoder import Decoder
from workers.parallel import TPGroup
from workers.triton_kernels.choice import TritonMissingError

CPU = torch.device("cpu")


class CudaLookingPool(KVPool):
    """A pool that says it is on a card: what is chosen for it is not run."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.data = SimpleNamespace(device=torch.device("cuda"))  # type: ignore[assignment]


def decoder(head_dim: int = 64, sliding_window: int | None = None) -> Decoder:
    config = ModelConfig(
        family="mistral",
        vocab_size=11,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=head_dim,
        rms_norm_eps=1e-5,
        rope_theta=10_000.0,
        max_context_len=64,
        dtype="float32",
        sliding_window=sliding_window,
        full_layers=(1,),
    )
    return Decoder(config, dtype=torch.float32, device=CPU, group=TPGroup.single())


class FakeOwn(TorchPoolKernels):
    """Triton kernels that the decoder's layers have no use for, told apart by their tokens."""

    def __init__(self):
        self.greedy: list[torch.Tensor] = []

    def matmul(self, weight, bias):
        return None

    gated_matmul = matmul

    def greedy_tokens(self, logits):
        self.greedy.append(logits)
        return torch.full((len(logits),), 7)

    def greedy_keys(self, logits, first_id):
        raise NotImplementedError("of a group of several ranks")


def choose(
    backend, dtype="bfloat16", *, on_cuda=True, head_dim=64, window=None, load=None, load_own=None, **options
):
    pool = (CudaLookingPool if on_cuda else KVPool)(target_only(2, 16, 2, head_dim, dtype), 3, CPU)
    config = WorkerConfig(
        device="cuda" if on_cuda else "cpu",
        attention_backend=backend,
        **{"max_running_requests": 6, **options},
    )
    made: list[FakeLibrary] = []

    def make(shape: HeadShape, windows: list[int | None], device: torch.device) -> FakeLibrary:
        assert device.type == "cuda"
        made.append(FakeLibrary(shape, InlineCopies()))
        made[0].windows = windows
        return made[0]

    chosen = choose_kernels(
        config,
        pool,
        decoder(head_dim, window),
        InlineCopies(),
        max_tokens=99,
        load_library=load or make,
        load_own=load_own or (lambda device, dtype: None),
    )
    return chosen, made


@pytest.mark.parametrize("backend", ["auto", "flashinfer"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_card_computes_by_flashinfer(backend, dtype):
    chosen, (library,) = choose(backend, dtype, window=8, graph_batch_sizes=(4, 9))
    assert isinstance(chosen.attention, FlashInferAttention)
    assert chosen.kernels is None
    assert library.shape == HeadShape(4, 2, 64, 16, getattr(torch, dtype))
    assert library.windows == [None, 8]
    eager = PlanLimits(num_rows=9, num_tokens=99, is_captured=False)
    assert all(made.limits == [eager] for made in library.made)


def test_a_card_s_sampler_takes_its_kernel_for_greedy_tokens_which_is_compiled_by_then():
    own = FakeOwn()
    chosen, _ = choose("flashinfer", load_own=lambda device, dtype: own)
    kinds = [(logits.dtype, logits.shape) for logits in own.greedy]
    assert kinds == [(torch.bfloat16, (1, 11)), (torch.float32, (1, 11))]
    assert chosen.greedy_tokens(torch.zeros(3, 50)).tolist() == [7, 7, 7]
    without, _ = choose("flashinfer")
    assert without.greedy_tokens(torch.eye(3, dtype=torch.bfloat16)).tolist() == [0, 1, 2]


def not_there(*_):
    raise FlashInferError("No module named 'flashinfer'; pip install eyrie[cuda]")


def no_triton(*_):
    raise TritonMissingError("the CUDA kernels need Triton")


UNFIT = [
    ({"load_own": no_triton}, "the CUDA kernels need Triton"),
    ({"dtype": "float32"}, "found cuda and float32; FlashInfer runs on cuda in float16 or bfloat16"),
    ({"head_dim": 80}, "found heads of 80; FlashInfer's have 64, 128 or 256"),
    ({"load": not_there}, r"No module named 'flashinfer'; pip install eyrie\[cuda\]"),
]


@pytest.mark.parametrize(("case", "message"), UNFIT)
def test_where_flashinfer_cannot_be_it_is_an_error_that_says_why(case, message):
    with pytest.raises(BackendError, match=f"attention_backend=flashinfer: {message}; or choose .*=auto"):
        choose("flashinfer", **case)


@pytest.mark.parametrize(("case", "message"), UNFIT)
def test_auto_then_computes_in_torch_and_warns(case, message, caplog):
    chosen, _ = choose("auto", **case)
    assert isinstance(chosen.attention, ReferenceAttention)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert re.search(message, record.reason)


@pytest.mark.parametrize("backend", ["auto", "native"])
def test_a_cpu_computes_by_its_own_kernels(backend):
    chosen, _ = choose(backend, on_cuda=False)
    assert isinstance(chosen.attention, NativeAttention)
    assert chosen.kernels is not None


def test_flashinfer_is_not_for_cpus_nor_are_the_cpu_s_kernels_for_cards():
    with pytest.raises(BackendError, match="attention_backend=flashinfer: found cpu and bfloat16"):
        choose("flashinfer", on_cuda=False)
    with pytest.raises(BackendError, match="attention_backend=native: found cpu and float16; the compiled"):
        choose("native", "float16", on_cuda=False)


@pytest.mark.parametrize("on_cuda", [False, True])
def test_the_reference_is_for_both(on_cuda, caplog):
    chosen, made = choose("reference", on_cuda=on_cuda)
    assert isinstance(chosen.attention, ReferenceAttention)
    assert chosen.kernels is None and not made and not caplog.records
