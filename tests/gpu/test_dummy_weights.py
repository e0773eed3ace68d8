"""Random weights on CUDA: large tensors are the device's own, small ones those of every device."""

import pytest
import torch

from tests.unit.engine_plans import tiny_card
from workers.models.weights import LoadedModel, load_model
from workers.parallel import TPGroup

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CARD = tiny_card(vocab_size=70_000, hidden_size=128, head_dim=32)


def load(device: str, seed: int = 0) -> LoadedModel:
    group = TPGroup.single()
    return load_model(CARD, group=group, device=torch.device(device), load_format="dummy", seed=seed)


def test_large_tensors_are_drawn_by_the_device_and_small_ones_are_the_same_everywhere() -> None:
    on_cuda, again, other = load("cuda"), load("cuda"), load("cuda", seed=1)
    on_cpu = load("cpu")
    assert on_cuda.weights_digest == again.weights_digest != other.weights_digest
    assert on_cuda.weights_digest != on_cpu.weights_digest
    same = dict(again.decoder.named_parameters())
    theirs = dict(on_cpu.decoder.named_parameters())
    num_large = 0
    for name, parameter in on_cuda.decoder.named_parameters():
        assert torch.equal(parameter, same[name])
        if parameter.numel() > 1 << 22:
            num_large += 1
            assert not torch.equal(parameter.cpu(), theirs[name])
            assert parameter.std().item() == pytest.approx(CARD.config.hidden_size**-0.5, rel=0.01)
        else:
            assert torch.equal(parameter.cpu(), theirs[name])
    assert num_large > 0
