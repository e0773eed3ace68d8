"""The Sampler against a plain numpy reading of each parameter, and its independence from everything else."""

import math

import numpy as np
import pytest
import torch

from workers.engine.copies import InlineCopies
from workers.engine.sampler import Sampler
from workers.plan import OpenSlot
from workers.protocol import SamplingParams

VOCAB_SIZE = 50


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors: waking a second thread costs more than it computes."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def open_slot(slot, prompt=(1, 2, 3), generated=(), seed=0, end_token_ids=(), **sampling):
    return OpenSlot(
        slot=slot,
        sampling=SamplingParams(**sampling),
        seed=seed,
        prompt_len=len(prompt),
        token_ids=[*prompt, *generated],
        end_token_ids=list(end_token_ids),
    )


def make_sampler(*ops, vocab_size=VOCAB_SIZE, max_slots=8, may_wait=True, **options):
    sampler = Sampler(vocab_size, max_slots, "cpu", InlineCopies(), may_wait, **options)
    for op in ops:
        sampler.open(op)
    return sampler


def sample(sampler, logits, slots, positions):
    """Tokens and logprobs of each row, on the host."""
    return sampler.sample(logits, slots, positions).read()


def make_logits(rows, vocab_size=VOCAB_SIZE, seed=0, scale=2.0):
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def softmax(scores):
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def reference_probabilities(logits, params, prompt, generated):
    """The distribution of the next token, one token at a time and in float64."""
    scores = logits.double().numpy().copy()
    for token in range(len(scores)):
        count = generated.count(token)
        if token in prompt or count:
            penalty = params.repetition_penalty
            scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
        scores[token] -= params.frequency_penalty * count + params.presence_penalty * (count > 0)
    for token, bias in params.logit_bias:
        scores[token] += bias
    if params.temperature == 0:
        return np.eye(len(scores))[scores.argmax()]
    probabilities = softmax(scores / params.temperature)
    order = sorted(range(len(scores)), key=lambda token: (-probabilities[token], token))
    kept = order[: params.top_k]
    total = sum(probabilities[token] for token in kept)
    nucleus, mass = [], 0.0
    for token in kept:
        if mass >= params.top_p * total:
            break
        nucleus.append(token)
        mass += probabilities[token]
    least = params.min_p * probabilities[order[0]]
    result = np.zeros(len(scores))
    for token in nucleus:
        if probabilities[token] >= least:
            result[token] = probabilities[token]
    return result / result.sum()


def chi_squared_is_plausible(counts, probabilities):
    """Whether the counts are a draw from the probabilities, at a false-alarm rate of about 1e-5.

    Wilson and Hilferty's normal approximation of the chi-squared quantile, z = 4.26; cells of fewer than five
    expected draws are joined.
    """
    expected = probabilities * counts.sum()
    small = expected < 5
    observed = np.append(counts[~small], counts[small].sum())
    wanted = np.append(expected[~small], expected[small].sum())
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    freedom = max(1, len(wanted) - 1)
    limit = freedom * (1 - 2 / (9 * freedom) + 4.26 * math.sqrt(2 / (9 * freedom))) ** 3
    return statistic <= limit


def count_draws(op, logits, num_draws=20_000, seeds=200):
    """Counts over many positions of many seeds, as many requests with the same next-token logits."""
    sampler = Sampler(logits.shape[-1], seeds, "cpu", InlineCopies())
    for slot in range(seeds):
        sampler.open(OpenSlot(slot, op.sampling, 1000 + slot, op.prompt_len, op.token_ids, op.end_token_ids))
    rows = logits.expand(seeds, -1)
    counts = np.zeros(logits.shape[-1], dtype=np.int64)
    for position in range(num_draws // seeds):
        tokens, _ = sample(sampler, rows, list(range(seeds)), [position + len(op.token_ids)] * seeds)
        np.add.at(counts, tokens, 1)
    return counts


DISTRIBUTIONS = {
    "plain": {},
    "hot": {"temperature": 1.7},
    "cold": {"temperature": 0.4},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.8},
    "top_k_of_top_p": {"top_k": 12, "top_p": 0.6, "temperature": 1.2},
    "min_p": {"min_p": 0.1},
    "min_p_with_top_k": {"min_p": 0.05, "top_k": 20},
    "all": {"temperature": 0.9, "top_k": 30, "top_p": 0.9, "min_p": 0.02},
    "bias": {"logit_bias": [(3, 4.0), (7, -100.0)]},
}


@pytest.mark.parametrize("params", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS.keys())
def test_draws_follow_the_distribution(params):
    logits = make_logits(1)
    op = open_slot(0, **params)
    counts = count_draws(op, logits)
    probabilities = reference_probabilities(logits[0], op.sampling, [1, 2, 3], [])
    assert counts[probabilities == 0].sum() == 0
    assert chi_squared_is_plausible(counts, probabilities)


def test_chi_squared_tells_a_wrong_temperature():
    logits = make_logits(1)
    counts = count_draws(open_slot(0, temperature=1.0), logits)
    wrong = reference_probabilities(logits[0], SamplingParams(temperature=1.05), [], [])
    assert not chi_squared_is_plausible(counts, wrong)


def test_neighbouring_positions_and_seeds_are_independent():
    logits = torch.zeros(1, 4)
    sampler = Sampler(4, 300, "cpu", InlineCopies())
    for slot in range(300):
        sampler.open(open_slot(slot, seed=slot, prompt=(1,)))
    draws = np.array(
        [sample(sampler, logits.expand(300, -1), range(300), [pos] * 300)[0] for pos in range(1, 81)]
    )  # [positions, seeds]
    for pairs in (4 * draws[1:] + draws[:-1], 4 * draws[:, 1:] + draws[:, :-1]):
        assert chi_squared_is_plausible(np.bincount(pairs.ravel(), minlength=16), np.full(16, 1 / 16))


@pytest.mark.parametrize(
    "params",
    [
        {"repetition_penalty": 1.8},
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.7},
        {"presence_penalty": -1.0, "frequency_penalty": 0.4, "repetition_penalty": 0.7},
        {"presence_penalty": 2.0, "logit_bias": [(4, 3.0), (5, -3.0)]},
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_penalties_equal_the_reference_step_by_step(params, temperature):
    op = open_slot(0, temperature=temperature, num_logprobs=VOCAB_SIZE, **params)
    sampler = make_sampler(op)
    generated = []
    for step in range(12):
        logits = make_logits(1, seed=step // 4)
        expected = reference_probabilities(
            logits[0], SamplingParams(temperature=1.0, **params), [1, 2, 3], generated
        )
        [token], [logprobs] = sample(sampler, logits, [0], [3 + step])
        by_token = np.zeros(VOCAB_SIZE)
        by_token[logprobs.top_ids] = np.exp(logprobs.top_logprobs)
        np.testing.assert_allclose(by_token, expected, rtol=1e-4)
        if temperature == 0:
            assert token == expected.argmax()
        generated.append(token)


def test_presence_and_frequency_leave_the_prompt_alone():
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 2] = 1.0
    sampler = make_sampler(open_slot(0, prompt=(2, 2, 2), temperature=0.0, presence_penalty=2.0))
    assert sample(sampler, logits, [0], [3])[0] == [2]
    assert sample(sampler, logits, [0], [4])[0] == [0]


def test_logprobs_hold_after_penalties_and_before_temperature_and_filters():
    logits = make_logits(1)
    sampler = make_sampler(open_slot(0, temperature=0.3, top_k=2, num_logprobs=5, logit_bias=[(9, 50.0)]))
    [token], [logprobs] = sample(sampler, logits, [0], [3])
    logits[0, 9] += 50.0
    expected = logits.log_softmax(-1)[0]
    assert token == 9
    assert logprobs.logprob == pytest.approx(expected[9].item(), abs=1e-5)
    assert logprobs.top_ids == expected.topk(5).indices.tolist()
    assert logprobs.top_logprobs == pytest.approx(expected.topk(5).values.tolist(), rel=1e-5)


def test_rows_get_exactly_the_logprobs_they_asked_for():
    sampler = make_sampler(
        open_slot(0, temperature=0.0, num_logprobs=0),
        open_slot(1, temperature=1.0),
        open_slot(2, temperature=1.0, num_logprobs=3),
    )
    _, logprobs = sample(sampler, make_logits(3), [0, 1, 2], [3, 3, 3])
    assert logprobs[0].top_ids == []
    assert logprobs[1] is None
    assert len(logprobs[2].top_ids) == len(logprobs[2].top_logprobs) == 3


def test_end_tokens_are_banned_until_min_tokens_are_generated():
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 7], logits[0, 8], logits[0, 9] = 30.0, 20.0, 10.0
    sampler = make_sampler(open_slot(0, temperature=0.0, min_tokens=2, end_token_ids=[7], stop_token_ids=[8]))
    tokens = [sample(sampler, logits, [0], [3 + i])[0][0] for i in range(3)]
    assert tokens == [9, 9, 7]


def test_ignored_end_tokens_are_not_banned():
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 7] = 30.0
    sampler = make_sampler(open_slot(0, temperature=0.0, min_tokens=2, end_token_ids=[7], ignore_eos=True))
    assert sample(sampler, logits, [0], [3])[0] == [7]


def test_bias_forces_and_bans():
    sampler = make_sampler(
        open_slot(0, temperature=1.0, logit_bias=[(33, 100.0)]),
        open_slot(1, temperature=1.0, logit_bias=[(t, -100.0) for t in range(VOCAB_SIZE) if t != 12]),
    )
    for position in range(3, 40):
        assert sample(sampler, make_logits(2, seed=position), [0, 1], [position] * 2)[0] == [33, 12]


VARIED = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 1},
    {"temperature": 0.7, "top_p": 0.9, "seed": 2},
    {"temperature": 1.3, "top_k": 5, "seed": 3, "num_logprobs": 2},
    {"temperature": 1.0, "min_p": 0.02, "presence_penalty": 0.5, "seed": 4},
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {"temperature": 1.0, "top_p": 0.99, "logit_bias": [(1, 2.0)], "seed": 5},
    {"temperature": 1.0, "min_tokens": 6, "stop_token_ids": [0, 1], "seed": 6},
]


def generate(sampler, slots, logits, first_position, num_tokens):
    """Tokens of each slot, and all logprobs; logits[i, t] are slot slots[i]'s at its t-th token."""
    tokens = {slot: [] for slot in slots}
    logprobs = []
    for step in range(num_tokens):
        rows = torch.stack([logits[slot, first_position - 3 + step] for slot in slots])
        chosen, some = sample(sampler, rows, slots, [first_position + step] * len(slots))
        logprobs.append(some)
        for slot, token in zip(slots, chosen, strict=True):
            tokens[slot].append(token)
    return tokens, logprobs


@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE, 3000])
def test_a_row_does_not_depend_on_its_neighbours(vocab_size):
    logits = torch.stack([make_logits(12, vocab_size, seed=i) for i in range(len(VARIED))])
    ops = [open_slot(slot, **params) for slot, params in enumerate(VARIED)]
    together, _ = generate(make_sampler(*ops, vocab_size=vocab_size), list(range(len(VARIED))), logits, 3, 12)
    backwards, _ = generate(
        make_sampler(*ops, vocab_size=vocab_size), list(range(len(VARIED)))[::-1], logits, 3, 12
    )
    assert backwards == together
    for slot, op in enumerate(ops):
        alone, _ = generate(make_sampler(op, vocab_size=vocab_size), [slot], logits, 3, 12)
        assert alone[slot] == together[slot], VARIED[slot]


def test_a_preempted_request_goes_on_as_if_it_had_not_been():
    logits = torch.stack([make_logits(12, seed=i) for i in range(len(VARIED))])
    for slot, params in enumerate(VARIED):
        whole, whole_logprobs = generate(make_sampler(open_slot(slot, **params)), [slot], logits, 3, 12)
        sampler = make_sampler(open_slot(slot, **params))
        first, _ = generate(sampler, [slot], logits, 3, 5)
        sampler.close(slot)
        sampler.open(open_slot(slot, generated=first[slot], **params))
        second, second_logprobs = generate(sampler, [slot], logits, 8, 7)
        assert first[slot] + second[slot] == whole[slot], params
        assert second_logprobs == whole_logprobs[5:]


def test_another_seed_gives_other_tokens():
    logits = make_logits(1, scale=0.1)
    runs = []
    for seed in (0, 1, 2**63, -1):
        sampler = make_sampler(open_slot(0, seed=seed))
        runs.append(tuple(sample(sampler, logits, [0], [3 + i])[0][0] for i in range(20)))
    assert len(set(runs)) == 4


def test_equal_logits_rank_by_token_id():
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 40:] = -0.0
    sampler = make_sampler(open_slot(0, top_k=3, num_logprobs=4), open_slot(1, temperature=0.0))
    drawn = set()
    for position in range(3, 103):
        (token, greedy), (logprobs, _) = sample(sampler, logits.expand(2, -1), [0, 1], [position] * 2)
        drawn.add(token)
        assert greedy == 0
        assert logprobs.top_ids == [0, 1, 2, 3]
    assert drawn == {0, 1, 2}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_logits_give_the_tokens_and_logprobs_of_the_same_wide(dtype):
    logits, ops = make_logits(8).to(dtype), [open_slot(slot, **VARIED[slot]) for slot in range(8)]
    logits[0, 20:30] = 9.0
    for slots in (list(range(8)), [0]):
        given, at = logits[slots], [3] * len(slots)
        found, wide = (sample(make_sampler(*ops), x, slots, at) for x in (given, given.float()))
        assert found == wide and found[0][0] == 20


def test_greedy_rows_are_chosen_by_the_given_kernel_and_alone_from_logits_as_they_come():
    seen = []

    def last_token(logits):
        seen.append(logits.dtype)
        return torch.full((len(logits),), VOCAB_SIZE - 1)

    ops = [*(open_slot(slot, temperature=0.0) for slot in (0, 1)), open_slot(2, logit_bias=[(5, 99.0)])]
    sampler, logits = make_sampler(*ops, greedy=last_token), make_logits(3).bfloat16()
    assert sample(sampler, logits[:2], [0, 1], [3, 3])[0] == [49, 49]
    assert sample(sampler, logits, [0, 1, 2], [4, 4, 4])[0] == [49, 49, 5]
    assert seen == [torch.bfloat16, torch.float32]


def test_a_nucleus_wider_than_the_first_candidates_is_drawn_whole():
    vocab_size = 1024
    counts = count_draws(open_slot(0, top_p=0.9), torch.zeros(1, vocab_size), num_draws=20_000, seeds=500)
    num_kept = math.ceil(0.9 * vocab_size)
    assert counts[num_kept + 1 :].sum() == 0
    assert chi_squared_is_plausible(counts[:num_kept], np.full(num_kept, 1 / num_kept))


@pytest.mark.parametrize("scale", [0.01, 1.0, 4.0])
def test_a_nucleus_is_the_same_whether_the_host_waits_for_its_size_or_not(scale):
    """Flat logits need more candidates than are ranked at first, steep ones do not."""
    vocab_size, slots = 5000, list(range(8))
    ops = [open_slot(slot, seed=slot, top_p=0.5 + 0.06 * slot, min_p=1e-6) for slot in slots]
    waiting, ahead = (make_sampler(*ops, vocab_size=vocab_size, may_wait=wait) for wait in (True, False))
    for position in range(3, 23):
        logits = make_logits(len(slots), vocab_size, seed=position, scale=scale)
        logits[:, ::3] = logits[:, 1::3].mean()  # equal ones, in and around the nucleus
        assert sample(waiting, logits, slots, [position] * 8) == sample(ahead, logits, slots, [position] * 8)


def test_top_p_close_to_zero_and_top_k_one_are_greedy():
    logits = make_logits(2)
    sampler = make_sampler(open_slot(0, top_p=1e-9), open_slot(1, top_k=1))
    for position in range(3, 30):
        assert sample(sampler, logits, [0, 1], [position] * 2)[0] == logits.argmax(-1).tolist()


def test_a_tiny_temperature_is_greedy_and_finite():
    logits = make_logits(1)
    for temperature in (1e-4, 1e-6, 1e-30):
        sampler = make_sampler(open_slot(0, temperature=temperature, top_p=0.9))
        assert sample(sampler, logits, [0], [3])[0] == [logits.argmax().item()]


def test_logits_are_not_changed():
    logits = make_logits(len(VARIED))
    before = logits.clone()
    ops = [open_slot(slot, **params) for slot, params in enumerate(VARIED)]
    sample(make_sampler(*ops), logits, list(range(len(VARIED))), [3] * len(VARIED))
    assert torch.equal(logits, before)


def test_a_slot_opened_again_has_no_memory_of_the_last_request():
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 5], logits[0, 6] = 2.0, 1.0
    sampler = make_sampler(max_slots=2)
    for _ in range(3):
        sampler.open(open_slot(0, temperature=0.0, presence_penalty=1.5))
        sampler.open(open_slot(1, temperature=0.0, repetition_penalty=3.0, prompt=(5,)))
        sampler.check()
        assert sample(sampler, logits.expand(2, -1), [0, 1], [3, 1])[0] == [5, 6]
        assert sample(sampler, logits.expand(2, -1), [0, 1], [4, 2])[0] == [6, 5]
        sampler.close(0)
        sampler.close(1)
        sampler.check()
