"""Greedy tokens are transformers' own, whatever runs beside them, however they are cut, paged and sharded.

Ties are among the warnings of a run's summary.
"""

import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.conftest import NUM_WORKERS
from tests.covering import pairwise
from tests.drafts import DRAFTS
from tests.followers import Followers
from tests.harness import TINY_CONFIG, write_tiny_model
from tests.oracle.make_oracle import Oracle, greedy_tokens, read_records
from tests.scenario import FACTORS, MAX_TIE_MARGIN, Case, Comparison, Scenario

COVERING = pairwise(FACTORS, seed=241)  # of many seeds, the one with the fewest combinations
QUICK = [combination for combination in COVERING if combination["attention_backend"] == "auto"]
SERVED = FACTORS | {"attention_backend": ["auto"], "overlap_depth": [0]}
PRODUCT = [  # with each depth in half of it, spread over all other factors
    dict(zip(SERVED, values, strict=True)) | {"overlap_depth": number.bit_count() % 2}
    for number, values in enumerate(itertools.product(*SERVED.values()))
]
DRAFTED = [combination | {"draft": draft} for combination in COVERING for draft in DRAFTS]
QUICK_DRAFTED = [combination for n, combination in enumerate(DRAFTED) if n % 8 in (0, 3, 5, 6)]
SMOLLM2_DRAFTED = [
    next(n for n, combination in enumerate(DRAFTED) if wanted.items() <= combination.items())
    for wanted in (
        {"draft": "self", "attention_backend": "auto", "tp_size": 2},
        {"draft": "random-eagle3", "attention_backend": "auto", "tp_size": 1},
    )
]
RECORDS = [Case(record.prompt_ids, record.token_ids, record.margins) for record in read_records()]


def name_of(combination):
    return "-".join(str(value) for value in combination.values())


def play(combination, cases, comparison, followers, *, max_running, **options):
    scenario = Scenario(combination, cases, max_running)
    # Two cores: threads that outnumber them wait for each other. A tiny model gains nothing by a second one.
    num_threads = 1 if "model" in options or NUM_WORKERS > 1 else 2 // combination["tp_size"]
    scenario.play(comparison, followers, num_threads=num_threads, **options)


@pytest.fixture(scope="module")
def followers():
    with Followers(1) as followers:
        yield followers


@pytest.fixture(scope="module")
def comparison():
    comparison = Comparison()
    yield comparison
    comparison.finish()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random two-layer model in a folder, and answers of transformers' own."""
    folder = write_tiny_model(tmp_path_factory.mktemp("tiny"))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**TINY_CONFIG), dtype=torch.float32).eval()
    model.save_pretrained(folder)
    write_tiny_model(folder)
    generator = torch.Generator().manual_seed(1)
    cases = []
    for prompt_len in (18, 65):
        prompt_ids = torch.randint(3, 256, (prompt_len,), generator=generator).tolist()
        cases.append(Case(prompt_ids, *greedy_tokens(model, prompt_ids, 8)))
    return str(folder), cases


def three_prompts(number):
    short = [case.cut(12) for case in RECORDS if len(case.prompt_ids) < 58]
    whole_page = [case.cut(12) for case in RECORDS if 58 <= len(case.prompt_ids) <= 76]  # once half answered
    return [*short[2 * number : 2 * number + 2], whole_page[number]]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", range(len(QUICK)), ids=[name_of(c) for c in QUICK])
def test_smollm2_answers_like_the_oracle(number, followers, comparison):
    """Each combination serves three other prompts; `make test-slow` serves 25, `make test-long` all."""
    play(QUICK[number], three_prompts(number), comparison, followers, max_running=2)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", SMOLLM2_DRAFTED, ids=[name_of(DRAFTED[n]) for n in SMOLLM2_DRAFTED])
def test_smollm2_with_a_draft_answers_like_the_oracle(number, followers, comparison):
    """A few; `make test-slow` serves all prompts, each under one combination."""
    play(DRAFTED[number], three_prompts(number % 8), comparison, followers, max_running=2)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("number", range(len(COVERING)), ids=[name_of(c) for c in COVERING])
def test_smollm2_answers_a_quarter_of_the_prompts_like_the_oracle(number, followers, comparison):
    """Each combination serves another quarter: each prompt is served under two combinations or three."""
    play(COVERING[number], RECORDS[number % 4 :: 4], comparison, followers, max_running=16)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("combination", COVERING, ids=name_of)
def test_smollm2_answers_all_prompts_like_the_oracle(combination, followers, comparison):
    play(combination, RECORDS, comparison, followers, max_running=16)


@pytest.mark.parametrize("combination", COVERING, ids=name_of)
def test_a_random_model_answers_like_the_oracle(combination, tiny, followers, comparison):
    model, cases = tiny
    play(combination, cases, comparison, followers, max_running=2, model=model)


@pytest.mark.parametrize("combination", QUICK_DRAFTED, ids=name_of)
def test_a_random_model_with_a_draft_answers_like_the_oracle(combination, tiny, followers, comparison):
    model, cases = tiny
    play(combination, cases, comparison, followers, max_running=2, model=model)


@pytest.mark.slow
@pytest.mark.parametrize("combination", [c for c in DRAFTED if c not in QUICK_DRAFTED], ids=name_of)
def test_a_random_model_with_the_other_draft_answers_like_the_oracle(
    combination, tiny, followers, comparison
):
    model, cases = tiny
    play(combination, cases, comparison, followers, max_running=2, model=model)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("number", range(len(DRAFTED)), ids=[name_of(c) for c in DRAFTED])
def test_smollm2_with_a_draft_answers_each_prompt_like_the_oracle(number, followers, comparison):
    """Each prompt is served under one combination."""
    play(DRAFTED[number], RECORDS[number :: len(DRAFTED)], comparison, followers, max_running=8)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("chunk_len", FACTORS["chunk_len"])
@pytest.mark.parametrize("composition", FACTORS["composition"])
@pytest.mark.parametrize("tp_size", FACTORS["tp_size"])
def test_a_random_model_answers_like_the_oracle_in_the_full_product(
    tp_size, composition, chunk_len, tiny, followers, comparison
):
    model, cases = tiny
    part = {"tp_size": tp_size, "composition": composition, "chunk_len": chunk_len}
    for combination in PRODUCT:
        if part.items() <= combination.items():
            play(combination, cases, comparison, followers, max_running=2, model=model)


@pytest.mark.timeout(300)
def test_ten_committed_answers_are_recomputed_by_transformers():
    oracle = Oracle()
    for record in read_records()[::10]:
        again = oracle.prompt_ids(record.text)
        assert again == record.prompt_ids
        logits = oracle.logits(again + record.token_ids[:-1])[len(again) - 1 :]
        best, second = logits.topk(2, dim=-1).values.unbind(-1)
        margins = (best - second).tolist()
        for index, token_id in enumerate(record.token_ids):
            is_best = token_id == int(logits[index].argmax())
            assert is_best or margins[index] < MAX_TIE_MARGIN, f"{record.text!r}: token {index}"
            assert margins[index] == pytest.approx(record.margins[index], abs=2e-3)


def test_a_wrong_answer_is_no_tie():
    comparison = Comparison()
    comparison.compare("tie", [1, 9], [1, 2], [0.5, 0.0005])
    assert len(comparison.ties) == 1
    with pytest.raises(AssertionError, match="token 1 is 9, expected 2"):
        comparison.compare("wrong", [1, 9], [1, 2], [0.5, 0.005])
    comparison.compare("tie", [9], [2], [0.0005])
    with pytest.raises(AssertionError, match="2 ties"):
        comparison.finish()


def test_covering_array_holds_every_pair_of_values():
    for (a, values_a), (b, values_b) in itertools.combinations(FACTORS.items(), 2):
        found = {(combination[a], combination[b]) for combination in COVERING}
        assert found == set(itertools.product(values_a, values_b))
