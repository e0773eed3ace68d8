"""With a draft, on one rank and two, answers end where they did without: aborted, stopped, out of context."""

import pytest

from tests.drafts import DRAFTS
from tests.followers import Followers
from tests.harness import Harness, tiny_config, write_tiny_model

PROMPTS = [[(11 * i + 5 * n) % 200 + 3 for i in range(length)] for n, length in enumerate((4, 17, 30, 9))]
MAX_TOKENS = 24


@pytest.fixture(scope="module")
def followers():
    with Followers(1) as followers:
        yield followers


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(params=["tp1", "tp2"])
def group(request, followers):
    """Options of a group and its followers."""
    return ({"tp_size": 2}, followers) if request.param == "tp2" else ({}, None)


def serve(model, group, *, samplings=({},), aborts=None, prompts=PROMPTS, **options):
    """Serve each prompt under each sampling, aborting after the steps told; return harness and answers."""
    sizes, followers = group
    aborts = dict(aborts or {})
    with Harness(tiny_config(model, **sizes, **options), followers=followers) as harness:
        for number, sampling in enumerate(samplings):
            for place, prompt in enumerate(prompts):
                given = {"max_tokens": MAX_TOKENS, "ignore_eos": True} | sampling
                harness.submit(f"{number}-{place}", prompt, **given)
        num_steps = 0
        while harness.scheduler.has_requests:
            for name in [name for name, step in aborts.items() if step == num_steps]:
                harness.abort(name)
            harness.step()
            num_steps += 1
        pages = harness.idle_pages()
        assert pages["owned"] == pages["cached"], f"pages leaked: {pages}"
        return harness, harness.answers


def ends(answers):
    return {name: (answer.token_ids, answer.finish_reason) for name, answer in answers.items()}


@pytest.mark.parametrize("draft", DRAFTS)
def test_an_answer_ends_at_the_same_token_wherever_that_is_in_a_window(model, group, draft):
    """Each length and each stop token in turn ends it: at every place among the drafts, and behind them."""
    _, whole = serve(model, ({}, None), prompts=PROMPTS[1:2])
    tokens = whole["0-0"].token_ids
    samplings = [{"max_tokens": length} for length in range(1, 10)]
    samplings += [{"stop_token_ids": [token_id]} for token_id in dict.fromkeys(tokens)]
    samplings += [{"stop_token_ids": [tokens[4]], "min_tokens": length} for length in range(3, 9)]
    samplings += [
        {"ignore_eos": False, "min_tokens": length, "logit_bias": [(2, 100.0)]} for length in (0, 5, 7)
    ]
    _, expected = serve(model, ({}, None), samplings=samplings, prompts=PROMPTS[1:2])
    _, found = serve(model, group, samplings=samplings, prompts=PROMPTS[1:2], **DRAFTS[draft])
    assert ends(found) == ends(expected)
    assert {answer.finish_reason for answer in found.values()} == {"length", "stop"}
    assert len({len(answer.token_ids) for answer in found.values()}) > 8


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("draft_tokens", [1, pytest.param(3, marks=pytest.mark.slow), 7])
def test_an_answer_reaches_the_contexts_end(model, group, draft, draft_tokens):
    """Windows reach beyond it, over the pages' end: nothing of that is ever read."""
    options = {"max_context_len": 40, "page_size": 8}
    samplings = [{"max_tokens": 500}]
    _, expected = serve(model, ({}, None), samplings=samplings, **options)
    _, found = serve(
        model, group, samplings=samplings, **DRAFTS[draft] | {"draft_tokens": draft_tokens}, **options
    )
    assert ends(found) == ends(expected)
    for place, prompt in enumerate(PROMPTS):
        assert len(prompt) + len(found[f"0-{place}"].token_ids) == 40


@pytest.mark.parametrize("draft", DRAFTS)
def test_an_answer_reaches_the_end_of_the_models_own_context(tmp_path, group, draft):
    """The positions behind it are the draft's alone."""
    model = write_tiny_model(tmp_path / "short", max_position_embeddings=48)
    samplings = [{"max_tokens": 500}]
    _, expected = serve(model, ({}, None), samplings=samplings)
    harness, found = serve(model, group, samplings=samplings, **DRAFTS[draft])
    assert harness.scheduler.max_context_len == 48
    assert ends(found) == ends(expected)


@pytest.mark.parametrize("draft", DRAFTS)
def test_aborted_amid_drafts_it_leaves_the_others_alone(model, group, draft):
    """A slot, and the drafts that are there for it, go to the next request."""
    options = {"max_running_requests": 2, "num_pages": 24}
    samplings = [{}, {"temperature": 1.0, "seed": 3, "frequency_penalty": 0.4}, {}]
    _, expected = serve(model, ({}, None), samplings=samplings, **options)
    aborts = {"0-0": 2, "0-2": 3, "1-0": 5, "1-3": 9, "2-1": 14}
    _, found = serve(model, group, samplings=samplings, aborts=aborts, **DRAFTS[draft], **options)
    num_aborted = 0
    for name, (tokens, reason) in ends(found).items():
        wanted, wanted_reason = ends(expected)[name]
        num_aborted += reason == "abort"
        assert tokens == wanted[: len(tokens)], name
        assert (reason, len(tokens)) == (wanted_reason, len(wanted)) or reason == "abort"
    assert num_aborted == len(aborts)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("graphs", [False, True])
def test_every_draft_of_the_target_itself_is_right_on_each_backend(model, group, backend, graphs):
    harness, _ = serve(
        model,
        group,
        samplings=[{"max_tokens": 21}],
        **DRAFTS["self"],
        graphs=graphs,
        attention_backend=backend,
    )
    assert harness.scheduler.stats.accept_lengths == {("computed", 4): 5 * len(PROMPTS)}
