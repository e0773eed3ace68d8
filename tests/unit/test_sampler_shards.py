"""Ranks that sample from their parts of the vocabulary choose what one choosing from all of it does."""

import random

import pytest
import torch

from tests.unit.tensor_parallel_group import on_ranks
from tests.unit.test_sampler import VARIED, open_slot
from workers.engine.copies import InlineCopies
from workers.engine.sampler import Sampler
from workers.parallel import TPGroup
from workers.protocol import TokenLogprobs

MAX_SLOTS = 12
Answers = list[tuple[list[int], list[TokenLogprobs | None]]]


def random_params(draw: random.Random, vocab_size: int) -> dict:
    """Draw a request's parameters: each is as likely left alone as set."""
    choices = {
        "temperature": (0.0, 0.01, 0.7, 1.0, 1.9),
        "top_k": (1, 2, 7, vocab_size // 3, vocab_size - 1),
        "top_p": (1e-9, 0.3, 0.8, 0.999, 1.0),
        "min_p": (0.001, 0.1, 1.0),
        "repetition_penalty": (0.8, 1.3),
        "presence_penalty": (-1.0, 0.6),
        "frequency_penalty": (-0.5, 0.4),
        "min_tokens": (3, 50),
        "num_logprobs": (0, 1, 5, 20),
        "logit_bias": ([(token, draw.uniform(-9, 9)) for token in draw.sample(range(vocab_size), 5)],),
        "stop_token_ids": (draw.sample(range(vocab_size), 2),),
    }
    params = {name: draw.choice(values) for name, values in choices.items() if draw.random() < 0.3}
    return {"temperature": 1.0, "seed": draw.randrange(1 << 40), **params}


def random_requests(seed: int, vocab_size: int) -> list[dict]:
    draw = random.Random(seed)
    return [random_params(draw, vocab_size) for _ in range(MAX_SLOTS)]


def answers(requests: list[dict], vocab_size: int, group: TPGroup, may_wait: bool, num_steps: int) -> Answers:
    """Sample so many tokens of each request, some in every step, some of which are preempted on the way."""
    sampler = Sampler(vocab_size, MAX_SLOTS, "cpu", InlineCopies(), may_wait, group=group)
    share = -(-vocab_size // group.size)
    part = slice(group.rank * share, min((group.rank + 1) * share, vocab_size))
    draw, tokens = random.Random(7), [[1, 2, 3] for _ in requests]
    ends = [vocab_size - 1, 4]

    def open_again(slot: int) -> None:
        generated = tokens[slot][3:]
        sampler.open(open_slot(slot, generated=generated, end_token_ids=ends, **requests[slot]))

    for slot in range(len(requests)):
        open_again(slot)
    found: Answers = []
    for step in range(num_steps):
        slots = draw.sample(range(len(requests)), draw.randint(1, len(requests)))
        generator = torch.Generator().manual_seed(step)
        scale = (0.02, 1.0, 5.0)[step % 3]
        # Narrow logits are often equal, across the parts' border as well.
        logits = (torch.randn(len(slots), vocab_size, generator=generator) * scale).bfloat16()
        sampled = sampler.sample(logits[:, part], slots, [len(tokens[slot]) for slot in slots]).read()
        for slot, token in zip(slots, sampled[0], strict=True):
            tokens[slot].append(token)
        found.append(sampled)
        preempted = draw.choice(slots)
        sampler.close(preempted)
        open_again(preempted)
        sampler.check()
    return found


def assert_same(found: Answers, expected: Answers) -> None:
    """Tokens are the same; logprobs are but for rounding, and so are their ids where they are equal."""
    assert [token_ids for token_ids, _ in found] == [token_ids for token_ids, _ in expected]
    for (_, ours), (_, theirs) in zip(found, expected, strict=True):
        for mine, wanted in zip(ours, theirs, strict=True):
            assert (mine is None) == (wanted is None)
            if mine is not None and wanted is not None:
                assert mine.logprob == pytest.approx(wanted.logprob, rel=1e-5, abs=1e-5)
                assert mine.top_logprobs == pytest.approx(wanted.top_logprobs, rel=1e-5, abs=1e-5)
                assert len(mine.top_ids) == len(wanted.top_ids)


@pytest.mark.parametrize("may_wait", [True, False])
@pytest.mark.parametrize(("num_ranks", "vocab_size", "seed"), [(2, 101, 1), (3, 1000, 2), (4, 2999, 3)])
def test_every_rank_comes_to_the_tokens_and_logprobs_of_one(
    num_ranks: int, vocab_size: int, seed: int, may_wait: bool
) -> None:
    requests = random_requests(seed, vocab_size)

    def work(group: TPGroup) -> Answers:
        return answers(requests, vocab_size, group, may_wait, 20)

    for answer in on_ranks(num_ranks, work):
        assert_same(answer, work(TPGroup.single()))


def test_requests_of_every_kind_together_are_those_of_one() -> None:
    def work(group: TPGroup) -> Answers:
        return answers(VARIED, 50, group, True, 12)

    for answer in on_ranks(2, work):
        assert_same(answer, work(TPGroup.single()))


@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_of_equal_logits_on_several_ranks_the_lower_id_wins(scale: float) -> None:
    logits = torch.zeros(2, 10)
    logits[0, [4, 5, 9]] = scale  # ranks: 0 to 4, 5 to 9
    logits[1, [7, 8]] = scale

    def work(group: TPGroup) -> list[int]:
        return greedy(logits, group)

    assert on_ranks(2, work) == [work(TPGroup.single())] * 2 == [[4, 7] if scale else [0, 0]] * 2


def greedy(logits: torch.Tensor, group: TPGroup) -> list[int]:
    """Return the greedy tokens of rows [rows, vocab], of which each rank has an equal share of columns."""
    num_rows, vocab_size = logits.shape
    sampler = Sampler(vocab_size, num_rows, "cpu", InlineCopies(), group=group)
    for slot in range(num_rows):
        sampler.open(open_slot(slot, temperature=0.0))
    share = vocab_size // group.size
    part = logits[:, group.rank * share : (group.rank + 1) * share]
    return sampler.sample(part, list(range(num_rows)), [3] * num_rows).read()[0]


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_no_number_is_larger_than_all_numbers_however_many_ranks_there_are(
    num_ranks: int, sign: float
) -> None:
    """As to argmax; a sum that overflows on both sides yields NaN with its sign bit set."""
    logits = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    logits[0, 7] = torch.copysign(torch.tensor(torch.nan), torch.tensor(sign))
    logits[1, [6, 13]] = torch.tensor([torch.nan, -torch.nan])
    logits[2, :8], logits[2, 9] = torch.inf, -torch.nan

    def work(group: TPGroup) -> list[int]:
        return greedy(logits, group)

    assert on_ranks(num_ranks, work) == [work(TPGroup.single())] * num_ranks == [[7, 6, 9]] * num_ranks
