"""Writes a corpus: what the target answers to the user's prompts and to some of its own, by our engine."""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np

from workers.card import ModelCard
from workers.chat_environment import Message
from workers.config import WorkerConfig
from workers.draft_training.chat import Chat
from workers.draft_training.corpus import Sample, held_out_file, shard_file, write_shard
from workers.draft_training.offline_engine import OfflineEngine, Question
from workers.draft_training.options import TrainOptions
from workers.draft_training.prompts import Conversation
from workers.protocol import SamplingParams

TEMPERATURES = (0.0, 0.0, 0.5, 0.8)
"""Of answers, drawn evenly: drafts are judged on greedy ones, sampled ones bring variety."""
_USER_TEMPERATURE = 0.9
_MAX_USER_TOKENS = 128
_MIN_USER_CHARS, _MAX_USER_CHARS = 8, 1000
_FOLLOWED_RATIO = 0.4
"""Share of conversations that go on for a turn, the user's part written by the model."""

Progress = Callable[[str], None]


@dataclass
class Generated:
    """What has been written so far."""

    num_shards: int
    num_answers: int = 0
    num_tokens: int = 0


class Author:
    """Has the engine write users' messages and answers. `seed` decides every draw."""

    def __init__(self, engine: OfflineEngine, chat: Chat, card: ModelCard, options: TrainOptions) -> None:
        self._engine = engine
        self._chat = chat
        self._end_token_ids = frozenset(card.end_token_ids)
        self._end_token_id = card.eos_token_id
        self._options = options

    def user_messages(self, begun: Sequence[Conversation], seed: int) -> list[Conversation | None]:
        """Return each conversation with a user's message more, None where none came to an end."""
        sampling = [
            SamplingParams(
                temperature=_USER_TEMPERATURE, max_tokens=_MAX_USER_TOKENS, seed=_seed(seed, place)
            )
            for place in range(len(begun))
        ]
        written = self._write([self._chat.before_user(conversation) for conversation in begun], sampling)
        found: list[Conversation | None] = []
        for conversation, token_ids in zip(begun, written, strict=True):
            text = "" if token_ids is None else self._chat.decode(token_ids).strip()
            is_whole = token_ids is not None and token_ids[-1] in self._end_token_ids
            is_kept = is_whole and _MIN_USER_CHARS <= len(text) <= _MAX_USER_CHARS
            found.append((*conversation, Message("user", text)) if is_kept else None)
        return found

    def answers(
        self, asked: Sequence[Conversation], seed: int, *, is_greedy: bool = False
    ) -> list[tuple[Conversation, Sample]]:
        """Return the conversations that were answered, the answer behind them, with their tokens."""
        draws = Random(seed)
        sampling = [
            SamplingParams(
                temperature=0.0 if is_greedy else draws.choice(TEMPERATURES),
                max_tokens=self._options.max_answer_tokens,
                seed=_seed(seed, place),
            )
            for place in range(len(asked))
        ]
        prompts = [self._chat.prompt(conversation) for conversation in asked]
        found = []
        for conversation, prompt, token_ids in zip(
            asked, prompts, self._write(prompts, sampling), strict=True
        ):
            if token_ids is None or len(token_ids) < 2:
                continue
            answer = Message("assistant", self._chat.decode(token_ids))
            sample = Sample(np.array(prompt + token_ids, dtype=np.int64), len(prompt))
            found.append(((*conversation, answer), sample))
        return found

    def _write(
        self, prompts: Sequence[list[int]], sampling: Sequence[SamplingParams]
    ) -> list[list[int] | None]:
        """Return what the model writes behind each prompt, its end token included; None: it was too long."""
        longest = min(self._options.max_prompt_tokens, self._engine.max_context_len - 2)
        questions = [
            Question(place, prompt, params)
            for place, (prompt, params) in enumerate(zip(prompts, sampling, strict=True))
            if 0 < len(prompt) <= longest
        ]
        written: list[list[int] | None] = [None] * len(prompts)
        for answered in self._engine.answer(questions):
            token_ids = answered.token_ids
            is_cut = answered.finish_reason != "stop" or self._end_token_id is None
            if not is_cut and (not token_ids or token_ids[-1] not in self._end_token_ids):
                assert self._end_token_id is not None, "is_cut says so"
                token_ids = [*token_ids, self._end_token_id]
            written[answered.number] = token_ids
        return written


def write_corpus(
    folder: Path,
    card: ModelCard,
    options: TrainOptions,
    prompts: Sequence[Conversation],
    held_out: Sequence[Conversation],
    progress: Progress,
) -> None:
    """Write the files of the corpus that are not there yet, until all are or the time is over.

    The answers that are held out come first; there is at least one file of others.
    """
    work = shards(prompts, options)
    missing = [index for index in range(len(work)) if not shard_file(folder, index).exists()]
    has_some = len(missing) < len(work)
    if held_out_file(folder).exists() and not missing:
        return
    end_s = None if options.generate_minutes is None else time.monotonic() + 60 * options.generate_minutes
    config = engine_config(options, card.context_len)
    progress(f"starting the engine for {options.model}")
    with OfflineEngine(config) as engine:
        author = Author(engine, Chat(card), card, options)
        if not held_out_file(folder).exists():
            answered = author.answers(held_out, options.seed, is_greedy=True)
            write_shard(held_out_file(folder), [sample for _, sample in answered])
            progress(f"answered {len(answered)} prompts that are held out")
        total = Generated(len(work))
        start_s = time.monotonic()
        for index in missing:
            if end_s is not None and time.monotonic() > end_s and (has_some or total.num_answers):
                progress("the time for generating is over")
                break
            samples = _shard(author, work[index], _seed(options.seed, index))
            write_shard(shard_file(folder, index), samples)
            total.num_answers += len(samples)
            total.num_tokens += sum(sample.answer_len for sample in samples)
            rate = total.num_tokens / (time.monotonic() - start_s)
            progress(
                f"answers {index + 1} of {len(work)} files: {total.num_answers} more answers,"
                f" {total.num_tokens / 1e6:.2f} M tokens, {rate:.0f} tokens/s"
            )


def shards(prompts: Sequence[Conversation], options: TrainOptions) -> list[list[Conversation]]:
    """Return what is to be answered, file by file; an empty conversation is yet to be begun by the model."""
    work: list[Conversation] = [*prompts, *[()] * options.self_prompts]
    Random(options.seed).shuffle(work)
    return [
        work[first : first + options.shard_prompts] for first in range(0, len(work), options.shard_prompts)
    ]


def engine_config(options: TrainOptions, context_len: int) -> WorkerConfig:
    """Return the engine's options for answering; `context_len` is the model's."""
    dtype = "float32" if options.dtype == "auto" and options.device == "cpu" else options.dtype
    is_cuda = options.device == "cuda"
    return WorkerConfig(
        model=options.model,
        load_format=options.load_format,
        device=options.device,
        dtype=dtype,
        seed=options.seed,
        attention_backend=options.attention_backend,
        max_running_requests=options.max_running_requests,
        max_waiting_requests=2 * options.max_running_requests,
        max_tokens_per_step=4096 if is_cuda else 256,
        max_context_len=min(context_len, options.max_prompt_tokens + options.max_answer_tokens + 1),
        kv_gb=options.kv_gb,
        num_threads=options.num_threads,
    )


def _shard(author: Author, asked: Sequence[Conversation], seed: int) -> list[Sample]:
    own = author.user_messages([conversation for conversation in asked if not conversation], seed)
    given = [conversation for conversation in asked if conversation]
    begun = list(dict.fromkeys([*given, *[conversation for conversation in own if conversation is not None]]))
    first = author.answers(begun, seed + 1)
    draws = Random(seed)
    followed = [conversation for conversation, _ in first if draws.random() < _FOLLOWED_RATIO]
    asked_again = author.user_messages(followed, seed + 2)
    second = author.answers([conversation for conversation in asked_again if conversation], seed + 3)
    return [sample for _, sample in [*first, *second]]


def _seed(seed: int, place: int) -> int:
    """Return a seed of its own for a place: neighbours share no draws."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{place}".encode()).digest()[:4], "little") >> 1
