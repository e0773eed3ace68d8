"""Measures a draft with the engine that serves: accept length, and speed beside the same engine without."""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch

from workers.card import ModelCard, load_card
from workers.config import WorkerConfig
from workers.draft_training.chat import Chat
from workers.draft_training.corpus import Sample
from workers.draft_training.first_entry import FirstEntry, measure_first_entry
from workers.draft_training.offline_engine import OfflineEngine, Question
from workers.draft_training.options import EvalOptions
from workers.draft_training.prompts import PromptError, read_prompts
from workers.protocol import SamplingParams

Progress = Callable[[str, int, int], None]
"""Hears what is being done, how many answers are done, and how many there will be."""


@dataclass(frozen=True)
class Speed:
    """Tokens per second of both arms, medians over the repeats, at so many requests at a time."""

    batch_size: int
    tokens_per_s: float
    tokens_per_s_without: float
    speedup: float


@dataclass(frozen=True)
class Measured:
    """What a draft is worth on greedy answers. `accept_length`: tokens that a verify step brings, the
    target's own included. `rates`: of the drafts at each place (of trees at each depth) whose predecessors
    were right, the share that was right, as in a draft's card; `accepted_rates`: of all drafts there, those
    that were accepted.
    `equal_ratio`: answers that are the same without the draft, in float32 all."""

    draft_tokens: int
    draft_topk: int
    num_prompts: int
    num_answer_tokens: int
    accept_length: float
    rates: list[float]
    accepted_rates: list[float]
    equal_ratio: float
    speeds: list[Speed]
    first_entry: FirstEntry | None


@dataclass
class _Arm:
    """One engine, and what it has done."""

    engine: OfflineEngine
    seconds: dict[int, list[float]]
    answers: dict[int, list[int]]


def measure(options: EvalOptions, progress: Progress) -> Measured:
    """Answer the prompts with and without the draft, in turn, after a round that does not count.

    Raise PromptError, ModelError and RequestRefusedError, for the user.
    """
    if options.num_threads:
        torch.set_num_threads(options.num_threads)
    card = load_card(options.model)
    questions = _questions(options, Chat(card))
    sizes = options.batch_sizes
    num_all = 2 * (
        sum(min(size, len(questions)) for size in sizes) + options.repeats * len(sizes) * len(questions)
    )
    done = _Done(progress, num_all + (len(questions) if options.first_entry else 0))
    drafted, reached, accepted = Counter[int](), Counter[int](), Counter[int]()
    num_rows = num_kept = 0
    with ExitStack() as stack:
        arms = []
        for draft in (options.draft, None):
            done.now("starting the engine " + ("without a draft" if draft is None else f"with {draft}"))
            arms.append(_Arm(stack.enter_context(OfflineEngine(_config(options, draft))), {}, {}))
        for repeat in range(-1, options.repeats):
            done.now("warming up" if repeat < 0 else f"round {repeat + 1} of {options.repeats}")
            for batch_size in sizes:
                for arm in arms:
                    asked = questions if repeat >= 0 else questions[:batch_size]
                    took_s = _answer(arm, asked, batch_size, done)
                    counts = arm.engine.take_counts()
                    if repeat < 0:
                        continue
                    arm.seconds.setdefault(batch_size, []).append(took_s)
                    drafted.update(counts.drafted)
                    reached.update(counts.reached)
                    accepted.update(counts.accepted)
                    num_rows, num_kept = num_rows + counts.num_rows, num_kept + counts.num_kept
    with_draft, without = arms
    num_tokens = sum(map(len, without.answers.values()))
    equal = sum(with_draft.answers[place] == without.answers[place] for place in without.answers)
    return Measured(
        draft_tokens=options.draft_tokens,
        draft_topk=options.draft_topk,
        num_prompts=len(questions),
        num_answer_tokens=num_tokens,
        accept_length=num_kept / max(1, num_rows),
        rates=[accepted[place] / max(1, reached[place]) for place in sorted(drafted)],
        accepted_rates=[accepted[place] / drafted[place] for place in sorted(drafted)],
        equal_ratio=equal / len(questions),
        speeds=[_speed(with_draft, without, size, num_tokens) for size in sizes],
        first_entry=_first_entry(options, card, questions, without.answers, done)
        if options.first_entry
        else None,
    )


class _Done:
    """Counts answers, and says so."""

    def __init__(self, progress: Progress, num_all: int) -> None:
        self._progress = progress
        self._num_all = num_all
        self._num_done = 0
        self._what = ""

    def now(self, what: str) -> None:
        """Something else is being done."""
        self._what = what
        self.add(0)

    def add(self, num: int) -> None:
        """So many answers more are done."""
        self._num_done += num
        self._progress(self._what, self._num_done, self._num_all)


def _questions(options: EvalOptions, chat: Chat) -> list[Question]:
    conversations = read_prompts(options.prompts)[: options.max_prompts]
    if not conversations:
        raise PromptError("no prompts; at least one is needed")
    sampling = SamplingParams(temperature=0.0, max_tokens=options.max_answer_tokens)
    return [
        Question(place, chat.prompt(conversation), sampling)
        for place, conversation in enumerate(conversations)
    ]


def _answer(arm: _Arm, questions: Sequence[Question], batch_size: int, done: _Done) -> float:
    start_s = time.perf_counter()
    for answered in arm.engine.answer(questions, batch_size):
        arm.answers[answered.number] = answered.token_ids
        done.add(1)
    return time.perf_counter() - start_s


def _first_entry(
    options: EvalOptions,
    card: ModelCard,
    questions: Sequence[Question],
    answers: Mapping[int, list[int]],
    done: _Done,
) -> FirstEntry | None:
    """Measure along the answers that leave something to guess; None: there are none."""
    done.now("drafting along the answers with and without an entry of the first token")
    samples = [
        Sample(np.array([*question.token_ids, *answers[question.number]]), len(question.token_ids))
        for question in questions
        if len(answers[question.number]) > 1
    ]
    return measure_first_entry(options, card, samples, done.add) if samples else None


def _speed(with_draft: _Arm, without: _Arm, batch_size: int, num_tokens: int) -> Speed:
    own_s = statistics.median(with_draft.seconds[batch_size])
    other_s = statistics.median(without.seconds[batch_size])
    return Speed(batch_size, num_tokens / own_s, num_tokens / other_s, other_s / own_s)


def _config(options: EvalOptions, draft: str | None) -> WorkerConfig:
    return WorkerConfig(
        model=options.model,
        load_format=options.load_format,
        device=options.device,
        dtype=options.dtype,
        attention_backend=options.attention_backend,
        max_running_requests=max(options.batch_sizes),
        kv_gb=4.0 if options.device == "cuda" else 0.5,
        draft=draft,
        draft_tokens=options.draft_tokens,
        draft_topk=options.draft_topk,
        draft_attention_backend=options.draft_attention_backend,
        prefix_caching=False,
        num_threads=options.num_threads,
    )
