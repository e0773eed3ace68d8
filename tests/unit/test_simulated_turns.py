"""Chats that come back, on made-up time: their prompts are loaded whole, and the same run ends the same."""

import dataclasses

import pytest

from tests.bench.gpu_multiturn import FULL
from tests.bench.simulated_turns import Machine, simulate

CHATS = dataclasses.replace(
    FULL,
    num_chats=8,
    num_turns=4,
    new_len=256,
    num_tokens=16,
    max_in_flight=6,
    think_s=(0.05, 0.15),
    num_steady=2,
    steady_tokens=80,
    device_tokens=4_096,
)
"""Four prompts of the last turn fill the device."""


@pytest.mark.parametrize("depth", [0, 1])
def test_what_the_arena_has_is_never_computed_again(depth):
    figures = simulate(CHATS, Machine(), {"overlap_depth": depth, "max_tokens_per_step": 256})
    prompt_lens = [256 + turn * 272 for turn in range(4)]
    whole_pages = [0] + [(length - 1 - 256) // 16 * 16 for length in prompt_lens[1:]]
    assert figures["load_gb"] > 0 and figures["evictions"] > 0
    assert figures["cached_share"] == pytest.approx(sum(whole_pages) / sum(prompt_lens), abs=0.002)


def test_faster_loads_make_first_tokens_come_sooner():
    slow, fast = (simulate(CHATS, Machine(load_gb_s=speed), {})["ttft_mean_ms"] for speed in (5.0, 40.0))
    assert fast < slow
