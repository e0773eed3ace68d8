"""A launched step is collected once its fence was passed, and not waited for without end."""

import pytest
import torch

from workers.engine.launched_step import LaunchedStep, StepTimeoutError
from workers.engine.sampled import Sampled
from workers.plan import RelocationVersion

VERSION = RelocationVersion(7, 3)


class FenceAfter:
    """Passed at the last of so many looks, at which the stream writes its results."""

    def __init__(self, num_looks, write=lambda: None):
        self.num_looks = num_looks
        self.write = write

    def query(self):
        self.num_looks -= 1
        if self.num_looks == 0:
            self.write()
        return self.num_looks <= 0


class Clock:
    now_s = 0.0
    num_sleeps = 0

    def read(self):
        self.now_s += 1e-5
        return self.now_s

    def sleep(self, seconds):
        self.now_s += seconds
        self.num_sleeps += 1


def test_tokens_are_read_once_the_fence_was_passed():
    tokens, clock = torch.zeros(2, dtype=torch.int64), Clock()
    fence = FenceAfter(5, lambda: tokens.copy_(torch.tensor([8, 9])))
    output = LaunchedStep(4, VERSION, Sampled(tokens, None), fence).output(1.0, clock.read, clock.sleep)
    assert (output.step, output.relocation_version) == (4, VERSION)
    assert (output.token_ids, output.logprobs) == ([8, 9], [None, None])
    assert not clock.num_sleeps, "what ends so soon is not slept for"


def test_a_long_step_is_slept_for():
    clock = Clock()
    LaunchedStep(4, VERSION, None, FenceAfter(500)).output(1.0, clock.read, clock.sleep)
    assert 200 < clock.num_sleeps < 400


def test_a_device_that_hangs_is_an_error():
    clock = Clock()
    step = LaunchedStep(4, VERSION, None, FenceAfter(10**9))
    assert not step.has_ended
    with pytest.raises(StepTimeoutError, match="step 4: the device has not ended it in 2 s"):
        step.output(2.0, clock.read, clock.sleep)
    assert 2.0 < clock.now_s < 2.1


def test_a_step_that_waits_for_a_dead_rank_ends_with_that_rank():
    clock, num_checks = Clock(), 0

    def check():
        nonlocal num_checks
        num_checks += 1
        if num_checks == 3:
            raise ConnectionError("rank 1 is gone")

    step = LaunchedStep(4, VERSION, None, FenceAfter(10**9))
    with pytest.raises(ConnectionError, match="rank 1 is gone"):
        step.output(2.0, lambda: clock.now_s, clock.sleep, check)
    assert clock.now_s < 0.1


def test_a_step_without_rows_that_is_done_brings_nothing():
    step = LaunchedStep(1, VERSION, None, None)
    assert step.has_ended
    assert step.output().token_ids == []
