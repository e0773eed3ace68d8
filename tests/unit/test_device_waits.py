"""Nothing that a step does on a device waits for it: the host may be a step ahead."""

import pytest
import torch

from tests.unit.device_line import DEVICE, DeviceLine
from tests.unit.test_sampler import VARIED, open_slot
from workers.engine.sampler import Sampler

VOCAB_SIZE = 3000


def sampler_on_the_device(line, **options):
    return Sampler(VOCAB_SIZE, 8, DEVICE, line, **options)


def sample_all_kinds(sampler):
    """Requests of all kinds come, sample, go on from a preemption, and leave."""
    slots = list(range(len(VARIED)))
    for slot, params in enumerate(VARIED):
        sampler.open(open_slot(slot, **params))
    for position in (3, 4):
        sampled = sampler.sample(torch.empty(len(slots), VOCAB_SIZE, device=DEVICE), slots, [position] * 8)
        assert sampled.token_ids.device == DEVICE
    for slot, params in enumerate(VARIED):
        sampler.close(slot)
        sampler.open(open_slot(slot, generated=[5, 5, 9], **params))
        sampler.sample(torch.empty(1, VOCAB_SIZE, device=DEVICE), [slot], [6])
    return sampled


def test_sampling_waits_for_nothing():
    with DeviceLine() as line:
        sampled = sample_all_kinds(sampler_on_the_device(line))
        token_ids, logprobs = sampled.to_host(line).read()
    assert len(token_ids) == len(VARIED)
    assert [row for row, found in enumerate(logprobs) if found] == [3]


def test_a_sampler_that_may_wait_does():
    with DeviceLine() as line, pytest.raises(NotImplementedError, match="meta"):
        sample_all_kinds(sampler_on_the_device(line, may_wait=True))


def test_an_index_made_of_a_list_is_seen():
    with DeviceLine() as line, pytest.raises(AssertionError, match="by itself"):
        line.upload([1.0, 2.0])[[0, 1]]
