"""Planning a step while one runs changes no answer: all that clients see is what comes of a depth of 0."""

from dataclasses import dataclass, field
from random import Random

import pytest

from tests.followers import Followers
from tests.harness import Answer, Harness, tiny_config, write_tiny_model

NUM_REQUESTS = 24
COMMON = [7, 8, 9, 10, 11, 12, 13, 14, 15]
KINDS = (
    {"temperature": 0.0},
    {"temperature": 0.0, "num_logprobs": 3},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 0.8, "top_k": 20, "num_logprobs": 0},
    {"temperature": 1.0, "presence_penalty": 0.8, "frequency_penalty": 0.5},
    {"temperature": 0.0, "repetition_penalty": 1.4},
    {"temperature": 1.2, "min_p": 0.01, "logit_bias": [(40, 3.0)]},
    {"temperature": 1.0, "min_tokens": 5},
)


@pytest.fixture(scope="module")
def followers():
    with Followers(1) as followers:
        yield followers


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@dataclass
class Ask:
    """A request, how many steps after the last it comes, and after how many more it is aborted."""

    prompt: list[int]
    sampling: dict[str, object]
    priority: int
    num_steps_after: int
    num_steps_until_abort: int | None


@dataclass
class Served:
    answers: dict[str, Answer] = field(default_factory=dict)
    num_preemptions: int = 0
    num_void_rows: int = 0
    num_awaited: int = 0


def asks(seed: int) -> list[Ask]:
    """Draw requests of all kinds; many end by one of their stop tokens, at any place of their answer."""
    random = Random(seed)
    drawn = []
    for number in range(NUM_REQUESTS):
        stops = random.sample(range(256), random.choice((0, 0, 20, 60)))
        sampling = KINDS[number % len(KINDS)] | {
            "seed": number,
            "max_tokens": random.randrange(1, 30),
            "stop_token_ids": stops,
            "ignore_eos": random.random() < 0.5,
        }
        own = [random.randrange(3, 256) for _ in range(random.randrange(1, 40))]
        drawn.append(
            Ask(
                (COMMON if random.random() < 0.5 else []) + own,
                sampling,
                random.choice((1, 1, 1, 0)),
                random.randrange(3),
                random.randrange(1, 12) if random.random() < 0.2 else None,
            )
        )
    return drawn


def serve(model, drawn: list[Ask], followers: Followers | None, **options: object) -> Served:
    with Harness(tiny_config(model, max_running_requests=4, **options), followers=followers) as harness:
        to_abort: dict[str, int] = {}
        for number, ask in enumerate(drawn):
            for _ in range(ask.num_steps_after):
                step(harness, to_abort)
            harness.submit(str(number), ask.prompt, priority=ask.priority, **ask.sampling)
            if ask.num_steps_until_abort is not None:
                to_abort[str(number)] = ask.num_steps_until_abort
        while harness.unfinished():
            step(harness, to_abort)
        pages = harness.idle_pages()
        assert pages["owned"] == pages["cached"], f"pages leaked: {pages}"
        stats, plans = harness.scheduler.stats, harness.plans
        num_sampled = sum(len(plan.sampled) for plan in plans)
        return Served(
            harness.answers,
            stats.num_preemptions,
            num_sampled - stats.num_generated_tokens,
            sum(plan.num_awaited for plan in plans),
        )


def step(harness: Harness, to_abort: dict[str, int]) -> None:
    for name in list(to_abort):
        to_abort[name] -= 1
        if not to_abort[name] and harness.answers[name].finish_reason is None:
            harness.abort(name)
    harness.step()


def same(found: Served, expected: Served) -> None:
    """Hold answers against each other; of an aborted one the beginning, however far it came."""
    for name, answer in expected.answers.items():
        other = found.answers[name]
        num = min(len(answer.token_ids), len(other.token_ids))
        is_aborted = "abort" in (answer.finish_reason, other.finish_reason)
        assert other.token_ids[:num] == answer.token_ids[:num], name
        assert is_aborted or len(other.token_ids) == num == len(answer.token_ids), name
        assert is_aborted or other.finish_reason == answer.finish_reason, name
        for got, wanted in zip(other.logprobs, answer.logprobs, strict=False):
            assert got.top_ids == wanted.top_ids, name
            assert got.logprob == pytest.approx(wanted.logprob, abs=1e-4), name
            assert got.top_logprobs == pytest.approx(wanted.top_logprobs, abs=1e-4), name
        assert is_aborted or len(other.logprobs) == len(answer.logprobs), name


@pytest.mark.parametrize("num_pages", [256, 30], ids=["roomy", "tight"])
@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_answers_are_those_of_a_depth_of_0(model, followers, seed, tp_size, num_pages):
    drawn = asks(seed)
    group = followers if tp_size > 1 else None
    plain, ahead = (
        serve(
            model,
            drawn,
            group,
            tp_size=tp_size,
            num_pages=num_pages,
            max_context_len=100,
            overlap_depth=depth,
            itl_target_ms=None if seed % 2 else 1.0,
        )
        for depth in (0, 1)
    )
    same(ahead, plain)
    reasons = {answer.finish_reason for answer in plain.answers.values()}
    assert reasons == {"stop", "length", "abort"}
    assert (plain.num_awaited, plain.num_void_rows) == (0, 0)
    assert ahead.num_awaited > 0 and ahead.num_void_rows > 0
    if num_pages < 256:
        assert plain.num_preemptions > 0 and ahead.num_preemptions > 0


def test_what_the_cache_tells_and_finds_is_that_of_a_depth_of_0(model):
    """One after another, so that nothing depends on which step brings what, and in a pool that holds all: a
    row that turns out to be void may have evicted the page that it was given."""
    drawn = [ask for ask in asks(7) if ask.num_steps_until_abort is None]
    drawn += drawn[::-1]
    found = []
    for depth in (0, 1):
        with Harness(tiny_config(model, num_pages=600, overlap_depth=depth)) as harness:
            for number, ask in enumerate(drawn):
                harness.submit(str(number), ask.prompt, **ask.sampling)
                harness.run()
                harness.idle_pages()
            stats = harness.scheduler.stats
            assert harness.cache.stats().num_evictions == 0
            counts = (stats.num_generated_tokens, stats.prefix_tokens, stats.num_finished)
            cached = {name: answer.num_cached_tokens for name, answer in harness.answers.items()}
            stored = [key for event in harness.events for key in event.keys]
            found.append((stored, cached, counts, harness.cache.snapshot()[1]))
    for plain, ahead in zip(*found, strict=True):
        assert ahead == plain
    assert any(found[0][1].values())
    assert len(found[0][0]) == len(set(found[0][0])) > 0
