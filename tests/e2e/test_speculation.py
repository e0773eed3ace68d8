"""With a draft the answers are those without one, token for token, and pages carry the draft's part.

`self`, the target as its own draft, is right always, `random-eagle3` by chance alone.
"""

import pytest

from tests.harness import Harness, tiny_config, write_tiny_model
from workers.kvcache.page_pool import Safety
from workers.kvcache.page_table import PageTableError
from workers.kvcache.pool_size import PoolSizeError

PROMPTS = [[(7 * i + 3 * n) % 200 + 3 for i in range(length)] for n, length in enumerate((3, 9, 30, 41, 5))]
SAMPLINGS = {
    "greedy": {},
    "sampled": {"temperature": 0.9, "seed": 5, "top_p": 0.9},
    "top-k": {"temperature": 1.2, "seed": 6, "top_k": 20, "min_p": 0.01},
    "penalties": {"frequency_penalty": 0.7, "presence_penalty": 0.3, "repetition_penalty": 1.3},
    "sampled-penalties": {"temperature": 0.8, "seed": 9, "frequency_penalty": 1.5},
    "bias": {"logit_bias": [(17, 3.0), (40, -50.0)], "min_tokens": 8, "ignore_eos": False},
    "logprobs": {"num_logprobs": 3, "temperature": 0.7, "seed": 1},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


def answers(model, *, sampling=None, prompts=PROMPTS, max_tokens=20, **options):
    """Serve all prompts together; return the harness, closed, and the answers."""
    with Harness(tiny_config(model, **options)) as harness:
        for number, prompt in enumerate(prompts):
            given = {"max_tokens": max_tokens, "ignore_eos": True} | (sampling or {})
            harness.submit(f"r{number}", prompt, **given)
        harness.run()
        pages = harness.idle_pages()
        assert pages["owned"] == pages["cached"], f"pages leaked: {pages}"
        return harness, list(harness.answers.values())


@pytest.mark.parametrize("draft", ["self", "random-eagle3"])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_answers_are_those_without_a_draft(model, draft, sampling):
    _, expected = answers(model, sampling=SAMPLINGS[sampling])
    _, found = answers(model, sampling=SAMPLINGS[sampling], draft=draft)
    for answer, wanted in zip(found, expected, strict=True):
        assert answer.token_ids == wanted.token_ids
        assert answer.finish_reason == wanted.finish_reason
        assert len(answer.logprobs) == len(wanted.logprobs)
        for own, theirs in zip(answer.logprobs, wanted.logprobs, strict=True):
            assert own.top_ids == theirs.top_ids
            assert own.logprob == pytest.approx(theirs.logprob, abs=1e-4)


def test_a_draft_that_is_always_right_is_believed(model):
    """Three drafts and one token more for each step that verifies."""
    harness, found = answers(model, draft="self", prompts=PROMPTS[2:3], max_tokens=21)
    assert harness.engine.graph_steps["verify", "replay"] == 5
    verifying = [plan for plan in harness.plans if plan.num_drafts]
    assert len(verifying) == 5, "of 21 tokens the first comes with the prompt, then four at a time"
    assert all(plan.num_drafts == [3] and plan.mode == "verify" for plan in verifying)
    assert len(found[0].token_ids) == 21
    stats = harness.scheduler.stats
    assert stats.accept_lengths == {("computed", 4): 5}
    assert stats.num_drafts == {(place, "accepted"): 5 for place in (1, 2, 3)}


@pytest.mark.parametrize("draft", ["self", "random-eagle3"])
@pytest.mark.parametrize("page_size", [1, 2, 8])
@pytest.mark.parametrize("draft_tokens", [1, 5])
def test_any_page_size_and_length(model, draft, page_size, draft_tokens):
    """Prompts in chunks beside rows that verify, prefix hits, a pool in which requests have to give way."""
    _, expected = answers(model, page_size=page_size, num_pages=1024 // page_size)
    options = {
        "draft": draft,
        "draft_tokens": draft_tokens,
        "page_size": page_size,
        "num_pages": 96 // page_size,
        "max_tokens_per_step": 12,
    }
    harness, found = answers(model, prompts=PROMPTS + PROMPTS, **options)
    assert harness.scheduler.stats.num_preemptions > 0
    for answer, wanted in zip(found, expected + expected, strict=True):
        assert answer.token_ids == wanted.token_ids


@pytest.mark.parametrize("draft", ["self", "random-eagle3"])
def test_each_answer_tells_what_became_of_its_drafts(model, draft):
    """Of a draft that is always right, those behind the end were guessed in vain, too."""
    harness, found = answers(model, draft=draft, max_tokens=20)
    num_drafts = [answer.num_accepted_drafts + answer.num_rejected_drafts for answer in found]
    assert sum(num_drafts) == sum(sum(plan.num_drafts) for plan in harness.plans)
    if draft == "self":
        # the first token comes with the prompt; then four times three drafts and one, then two drafts and one
        assert {(answer.num_accepted_drafts, answer.num_rejected_drafts) for answer in found} == {(15, 0)}


def test_parts_of_steps_are_timed(model):
    harness, _ = answers(model, draft="random-eagle3")
    seconds = harness.engine.part_times.seconds
    for part in ("target", "accept", "draft"):
        assert seconds["verify", part] > 0 and seconds["extend", part] + seconds["mixed", part] > 0


def test_a_pool_without_room_for_drafts_is_refused(model):
    with pytest.raises(PoolSizeError, match="lower draft_tokens"):
        answers(model, draft="self", num_pages=4, page_size=4, draft_tokens=8)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_steps_that_verify_are_replayed(model, backend):
    """Also those of fewer rows than their bucket; not those of prompts in chunks beside them."""
    _, expected = answers(model, attention_backend=backend, graphs=False)
    for draft in ("self", "random-eagle3"):
        harness, found = answers(model, attention_backend=backend, draft=draft)
        steps = harness.engine.graph_steps
        assert steps["verify", "replay"] > 0 and not steps["verify", "eager"]
        assert [answer.token_ids for answer in found] == [answer.token_ids for answer in expected]


@pytest.mark.parametrize("sanitizer", [False, True])
def test_drafts_without_places_reserved_for_them_are_found_out(model, sanitizer):
    """Their places would be the dummy page's, or those of whoever owned the page before (I4)."""
    config = tiny_config(model, draft="random-eagle3", page_size=1, checked=True, kv_sanitizer=sanitizer)
    with Harness(config, safety=Safety(reserves_ahead=False)) as harness:
        harness.submit("r", PROMPTS[2], max_tokens=20, ignore_eos=True)
        with pytest.raises(PageTableError, match="has no page for position"):
            harness.run()


@pytest.mark.parametrize("draft_tokens", [1, 7])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_answers_go_to_the_contexts_end(model, draft_tokens, backend):
    """A context that fills no whole number of pages, nor does the window behind it."""
    options = {"max_context_len": 43, "page_size": 8, "attention_backend": backend}
    _, expected = answers(model, max_tokens=100, **options)
    _, found = answers(model, max_tokens=100, draft="self", draft_tokens=draft_tokens, **options)
    assert [answer.token_ids for answer in found] == [answer.token_ids for answer in expected]
    assert all(answer.finish_reason == "length" for answer in found)
