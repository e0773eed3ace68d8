"""Speculation that turns itself off and on in mid-chat changes no answer, and leaves every page whole.

How long steps take is simulated: first those that draft are dear, later they cost no more than others.
"""

import pytest

from tests.arena_host import ArenaHost
from tests.harness import Harness, tiny_config, write_tiny_model
from workers.kvcache.sanitizer_error import SanitizerError

PROMPT = [(11 * i) % 200 + 3 for i in range(33)]
NEXT_TURN = [(7 * i) % 200 + 3 for i in range(9)]
NUM_TOKENS = 240
NUM_NEXT_TOKENS = 61
NUM_DEAR_TOKENS = 120
"""Of the answer, while drafting is dear."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def expected(model):
    """The answer, and the next one in that chat, without a draft."""
    with Harness(tiny_config(model)) as harness:
        answer = ask(harness, PROMPT, NUM_TOKENS)
        return answer, ask(harness, PROMPT + answer + NEXT_TURN, NUM_NEXT_TOKENS)


def ask(harness, prompt, num_tokens):
    """Return the answer."""
    request_id = f"{len(harness.answers)}"
    harness.submit(request_id, prompt, max_tokens=num_tokens, ignore_eos=True, temperature=0.4, seed=5)
    answer, num_steps = harness.answers[request_id], len(harness.plans)
    while harness.scheduler.has_requests:
        harness.step()
        for plan in harness.plans[num_steps:]:
            is_dear = len(answer.token_ids) < NUM_DEAR_TOKENS
            seconds = 0.01 * (1 + plan.draft_len) if is_dear else 0.01
            harness.scheduler.stepped(plan, seconds, now_s=0.01 * plan.step)
        num_steps = len(harness.plans)
    return answer.token_ids


def chat(model, draft, host, spoil=lambda harness: None, **options):
    """Answer the first prompt, on and off; return the harness, closed, and the answer."""
    config = tiny_config(
        model, draft=draft, draft_tokens="auto", max_tokens_per_step=64, attention_backend="native", **options
    )
    with Harness(config, host=host) as harness:
        spoil(harness)
        answer = ask(harness, PROMPT, NUM_TOKENS)
        harness.idle_pages()
        return harness, answer


def go_on(model, draft, prompt, host=None, incarnation=1):
    """Answer the next prompt; return the answer, what was drafted in it, and the harness, closed."""
    config = tiny_config(
        model, draft=draft, draft_tokens=5, max_tokens_per_step=64, attention_backend="native"
    )
    with Harness(config, host=host, incarnation=incarnation) as harness:
        speculator, drafts = harness.engine._speculator, []
        advance = speculator.advance

        def noted(plan, *arguments):
            found = advance(plan, *arguments)
            drafts.extend(speculator._state.drafts[plan.slots[row]].tolist() for row in plan.sampled)
            return found

        speculator.advance = noted
        return ask(harness, prompt, NUM_NEXT_TOKENS), drafts, harness


def is_on(harness):
    """Of each step that decoded: did it draft?"""
    return [plan.draft_len > 0 for plan in harness.plans if plan.mode in ("decode", "verify")]


def lengths(harness):
    """Accept lengths, wherever the prompt was found."""
    return {length: count for (_, length), count in harness.scheduler.stats.accept_lengths.items()}


@pytest.mark.parametrize("overlap_depth", [0, 1])
@pytest.mark.parametrize("draft", ["self", "random-eagle3"])
def test_a_chat_that_was_off_and_on_is_drafted_on_like_a_computed_one(model, expected, draft, overlap_depth):
    answer, next_answer = expected
    with ArenaHost(num_slots=128) as host:
        first, found = chat(model, draft, host, overlap_depth=overlap_depth)
        assert found == answer
        num_ahead = sum(plan.num_awaited > 0 for plan in first.plans)
        assert num_ahead > 30 if overlap_depth else num_ahead == 0
        assert max(plan.draft_len for plan in first.plans) > 1
        on = is_on(first)
        assert sum(not each for each in on) > 30, "it was off for pages on end"
        assert (sum(on[-40:]) > 20) == (draft == "self"), "and came back, where drafts are often right"
        prompt = PROMPT + answer + NEXT_TURN
        restored, drafts, again = go_on(model, draft, prompt, host, incarnation=2)
    computed, drafts_computed, afresh = go_on(model, draft, prompt)
    assert again.answers["0"].num_cached_tokens >= len(PROMPT + answer) - 4
    assert afresh.answers["0"].num_cached_tokens == 0
    assert restored == computed == next_answer
    assert drafts == drafts_computed
    assert lengths(again) == lengths(afresh)


def skip_extend(harness):
    """Compute no entries of the draft in steps that draft nothing."""
    extend = harness.engine._draft.extend
    run = extend.run

    def skipping(batch, features):
        if harness.plans[-1].draft_len:
            run(batch, features)

    extend.run = skipping


@pytest.mark.parametrize("draft", ["self", "random-eagle3"])
def test_pages_without_what_was_skipped_while_off_are_found_out(model, expected, draft):
    """What an engine that forgets its draft while it is off comes to: right answers, other drafts."""
    answer, next_answer = expected
    with ArenaHost(num_slots=128) as host:
        _, found = chat(model, draft, host, skip_extend, kv_sanitizer=False, graphs=False)
        assert found == answer
        prompt = PROMPT + answer + NEXT_TURN
        restored, drafts, again = go_on(model, draft, prompt, host, incarnation=2)
    _, drafts_computed, afresh = go_on(model, draft, prompt)
    assert restored == next_answer
    assert drafts != drafts_computed
    if draft == "self":
        assert lengths(again) != lengths(afresh)


@pytest.mark.parametrize("draft", ["self", "random-eagle3"])
def test_the_sanitizer_finds_pages_of_which_parts_were_skipped(model, draft):
    with pytest.raises(SanitizerError, match="complete_parts"), ArenaHost(num_slots=128) as host:
        chat(model, draft, host, skip_extend, graphs=False)


@pytest.mark.parametrize("overlap_depth", [0, 1])
def test_many_requests_at_once_are_answered_alike(model, overlap_depth):
    prompts = [[(7 * i + 3 * n) % 200 + 3 for i in range(3 + 5 * n)] for n in range(8)]
    found = []
    for draft in (None, "self", "random-eagle3"):
        config = tiny_config(
            model, draft=draft, draft_tokens="auto", num_pages=96, overlap_depth=overlap_depth
        )
        with Harness(config) as harness:
            for number, prompt in enumerate(prompts):
                harness.submit(f"{number}", prompt, max_tokens=40, ignore_eos=True)
            while harness.scheduler.has_requests:
                harness.step()
                plan = harness.plans[-1]
                harness.scheduler.stepped(plan, 0.01 + 1e-4 * plan.num_tokens, now_s=0.01 * plan.step)
            found.append([answer.token_ids for answer in harness.answers.values()])
            pages = harness.idle_pages()
            assert pages["owned"] == pages["cached"], f"pages leaked: {pages}"
            if draft is not None:
                assert len({plan.draft_len for plan in harness.plans}) > 1
    assert found[0] == found[1] == found[2]
