"""A draft goes on from pages that come back as from those that were computed; answers stay what they were.

`self`, the target as its own draft, is right always, as long as its own KV is there; `random-eagle3` guesses
from features, of which a page keeps its last token's.
"""

import pytest

from tests.arena_host import ArenaHost
from tests.followers import Followers
from tests.harness import Harness, tiny_config, write_tiny_model

PROMPTS = [
    [(11 * i + 5 * n) % 200 + 3 for i in range(length)] for n, length in enumerate((33, 21, 41, 29, 37))
]
NUM_TOKENS = 13
"""The first with the prompt, then three times four."""


@pytest.fixture(scope="module")
def followers():
    with Followers(1) as followers:
        yield followers


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def expected(model):
    with Harness(tiny_config(model)) as harness:
        for number, prompt in enumerate(PROMPTS):
            harness.submit(f"{number}", prompt, max_tokens=NUM_TOKENS, ignore_eos=True)
        harness.run()
        return [harness.answers[f"{number}"].token_ids for number in range(len(PROMPTS))]


def serve(harness, spoil=lambda engine: None):
    """Answer the prompts one by one; return the answers, and what was drafted behind each one's first token.

    `spoil` is called once a prompt's pages are there, before the draft reads them.
    """
    speculator, drafts = harness.engine._speculator, []
    begin, advance = speculator.begin, speculator.advance

    def spoilt(plan, *arguments):
        if plan.starts[0] and not drafts[-1]:
            spoil(harness.engine)
        return begin(plan, *arguments)

    def seen(plan, *arguments):
        found = advance(plan, *arguments)
        if plan.sampled and not drafts[-1]:
            drafts[-1] = speculator._state.drafts[plan.slots[0]].tolist()
        return found

    speculator.begin, speculator.advance = spoilt, seen
    for number, prompt in enumerate(PROMPTS):
        drafts.append(None)
        harness.submit(f"{number}", prompt, max_tokens=NUM_TOKENS, ignore_eos=True)
        harness.run(max_steps=100_000)
    harness.idle_pages()
    return [harness.answers[f"{number}"].token_ids for number in range(len(PROMPTS))], drafts


def first_and_again(model, draft, tp_size, followers, spoil=lambda engine: None, **options):
    """Serve twice, the second time by a rank that finds all in the arena; return both harnesses' results."""
    config = tiny_config(
        model, draft=draft, tp_size=tp_size, max_tokens_per_step=64, attention_backend="native", **options
    )
    found = []
    with ArenaHost(num_slots=128) as host:
        for incarnation in (1, 2):
            with Harness(
                config,
                followers=followers if tp_size > 1 else None,
                host=host,
                incarnation=incarnation,
            ) as harness:
                found.append((harness, *serve(harness, spoil if incarnation == 2 else lambda engine: None)))
    return found


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("draft", ["self", "random-eagle3"])
def test_a_restored_prefix_is_drafted_on_like_a_computed_one(model, expected, followers, draft, tp_size):
    (first, answers, drafts), (again, answers_again, drafts_again) = first_and_again(
        model, draft, tp_size, followers
    )
    assert answers == answers_again == expected
    assert drafts == drafts_again
    assert all(answer.num_cached_tokens >= 20 for answer in again.answers.values())
    lengths, lengths_again = first.scheduler.stats.accept_lengths, again.scheduler.stats.accept_lengths
    assert {origin for origin, _ in lengths} == {"computed"}
    assert {origin for origin, _ in lengths_again} == {"host"}
    assert {length: count for (_, length), count in lengths.items()} == {
        length: count for (_, length), count in lengths_again.items()
    }
    if draft == "self":
        assert lengths_again == {("host", 4): 3 * len(PROMPTS)}


def forget_kv(engine):
    for index in range(engine.pool.num_layers // 2, engine.pool.num_layers):
        for part in engine.pool.layer(index):
            part.zero_()


def forget_tails(engine):
    engine.pool.tails.zero_()


def test_a_draft_whose_kv_was_lost_is_not_believed_as_often(model, expected):
    """What a tier that keeps the target's KV alone comes to: right answers, silently fewer at a time."""
    _, (again, answers, _) = first_and_again(model, "self", 1, None, forget_kv, kv_sanitizer=False)
    assert answers == expected
    lengths = again.scheduler.stats.accept_lengths
    assert sum(length * count for (_, length), count in lengths.items()) < 4 * sum(lengths.values())


def test_a_draft_whose_feature_was_lost_drafts_something_else(model, expected):
    (_, _, drafts), (_, answers, drafts_again) = first_and_again(
        model, "random-eagle3", 1, None, forget_tails, kv_sanitizer=False
    )
    assert answers == expected
    assert drafts != drafts_again


def test_pages_without_a_drafts_part_are_no_hit(model):
    """Nor are those of another draft: their names differ."""
    names = []
    for draft in (None, "self", "random-eagle3"):
        with Harness(tiny_config(model, draft=draft)) as harness:
            names.append((harness.engine.namespace.digest(), harness.engine.layout.fingerprint()))
    assert len({digest for digest, _ in names}) == len({fingerprint for _, fingerprint in names}) == 3


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("draft", ["self", "random-eagle3"])
def test_two_ranks_answer_like_one_without_a_draft(model, expected, followers, draft, graphs):
    """Chunks of prompts beside rows that verify; urgent requests take slots and pages of those that run."""
    config = tiny_config(
        model, draft=draft, tp_size=2, graphs=graphs, max_tokens_per_step=16, max_running_requests=2
    )
    with Harness(config, followers=followers) as harness:
        for number, prompt in enumerate(PROMPTS):
            priority = -1 if number > 1 else 0
            harness.submit(f"{number}", prompt, priority=priority, max_tokens=NUM_TOKENS, ignore_eos=True)
            while number == 1 and not harness.answers["0"].token_ids:
                harness.step()
        harness.run()
        assert [harness.answers[f"{number}"].token_ids for number in range(len(PROMPTS))] == expected
        assert harness.scheduler.stats.num_preemptions > 0
        steps = harness.engine.graph_steps
        assert (steps["verify", "replay"] > 0) == graphs, steps
        pages = harness.idle_pages()
        assert pages["owned"] == pages["cached"], f"pages leaked: {pages}"


SAMPLINGS = {
    "warm": {"temperature": 0.9, "seed": 3},
    "nucleus": {"temperature": 1.2, "top_p": 0.8, "seed": 4},
    "penalties": {"temperature": 0.8, "repetition_penalty": 1.3, "frequency_penalty": 0.4, "seed": 5},
}


def sampled(model, followers=None, **options):
    """Answer each prompt in each way; return all answers, and the harness, closed."""
    with Harness(tiny_config(model, **options), followers=followers) as harness:
        for name, sampling in SAMPLINGS.items():
            for number, prompt in enumerate(PROMPTS):
                harness.submit(f"{name}/{number}", prompt, max_tokens=NUM_TOKENS, ignore_eos=True, **sampling)
        harness.run()
        return {name: answer.token_ids for name, answer in harness.answers.items()}, harness


@pytest.mark.parametrize("draft", ["self", "random-eagle3"])
def test_sampled_answers_of_two_ranks_are_those_of_one_without_a_draft(model, followers, draft):
    plain, _ = sampled(model)
    one, _ = sampled(model, draft=draft, draft_tokens=3)
    two, harness = sampled(model, followers, draft=draft, draft_tokens=3, tp_size=2)
    assert plain == one == two
    lengths = {length for _, length in harness.scheduler.stats.accept_lengths}
    assert (len(lengths) > 1) == (draft == "self"), "at random they are never right"
