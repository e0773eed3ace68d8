"""Nothing that a step does on a device waits for it: the host may be a step ahead."""

import pytest
import torch

from tests.unit.device_line import DEVICE, DeviceLine
from tests.unit.engine_plans import PlanLog
from tests.unit.test_sampler import VARIED, open_slot
from workers.engine.graph_guard import Bucket
from workers.engine.last_tokens import LastTokens
from workers.engine.sampled import Sampled
from workers.engine.sampler import Sampler
from workers.engine.staging import BucketInputs, Stager
from workers.kvcache.page_table import PageTable
from workers.plan import SetRow

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


def test_a_step_that_is_staged_ahead_waits_for_nothing():
    """Known tokens and awaited ones, in a bucket and eager; then rank 0 keeps what it sampled."""
    with DeviceLine() as line:
        table = PageTable(3, 4, 4, 30, checked=True)
        last_tokens = LastTokens(3, DEVICE, line)
        stager = Stager(table, 16, DEVICE, line, last_tokens=last_tokens)
        bucket = BucketInputs(Bucket("decode", 3), 3, 4, 4, DEVICE)
        log = PlanLog(4, 30)
        log.open(0, [7])
        log.open(1, [8])
        for plan in (log.plan(s0=1, s1=1), log.plan_ahead(1, 0), log.plan_ahead(0)):
            for op in plan.ops:
                if isinstance(op, SetRow):
                    table.set_row(op)
            batches = [stager.stage_bucket(plan, bucket)[0], stager.stage_eager(plan, "decode")[0]]
            assert {batch.token_ids.device for batch in batches} == {DEVICE}
            sampled = Sampled(batches[1].token_ids, None)
            last_tokens.keep(plan.slots, sampled)
            assert sampled.to_host(line).token_ids.device.type == "cpu"


def test_an_index_made_of_a_list_is_seen():
    with DeviceLine() as line, pytest.raises(AssertionError, match="by itself"):
        line.upload([1.0, 2.0])[[0, 1]]
