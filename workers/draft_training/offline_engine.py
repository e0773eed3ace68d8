"""OfflineEngine: an Engine and its Scheduler in this thread, for many requests and no client. Without Ray."""

import gc
import itertools
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from random import Random
from types import TracebackType
from typing import Self

import torch

from workers.card import load_card
from workers.config import WorkerConfig
from workers.engine.engine import Engine
from workers.kvcache.manager import KVCacheManager
from workers.parallel import TPGroup
from workers.protocol import FinishReason, RequestId, SamplingParams, SubmitRequest
from workers.scheduler.scheduler import Scheduler

_STALL_S = 1e-4
_INCARNATION = 1


@dataclass(frozen=True)
class Question:
    """A prompt in tokens, and how it is to be answered. `number`: the caller's, to know the answer by."""

    number: int
    token_ids: list[int]
    sampling: SamplingParams


@dataclass(frozen=True)
class Answered:
    """The tokens that followed a question's; `stop`: the last of them is the model's end token."""

    number: int
    token_ids: list[int]
    finish_reason: FinishReason


@dataclass(frozen=True)
class DraftCounts:
    """What became of drafts: rows that verified some, the tokens these kept, and by place from 1 on how
    many drafts there were, of how many the predecessors were right, and how many were right as well."""

    num_rows: int
    num_kept: int
    drafted: dict[int, int]
    reached: dict[int, int]
    accepted: dict[int, int]


class OfflineEngine:
    """One rank, kept busy by `answer` alone. Closes what it made."""

    def __init__(self, config: WorkerConfig) -> None:
        self._config = config
        card = load_card(config.model)
        with ExitStack() as stack:
            group = TPGroup.single()
            self._board = group.board
            self._engine = Engine(config, card, group)
            stack.callback(self._engine.close)
            cache = KVCacheManager(
                self._engine.num_pages,
                config.page_size,
                self._engine.namespace.digest(),
                _INCARNATION,
                prefix_caching=config.prefix_caching,
            )
            self._cache = cache
            self._scheduler = Scheduler(
                config,
                cache,
                end_token_ids=list(card.end_token_ids),
                max_context_len=self._engine.max_context_len,
                vocab_size=card.vocab_size,
                seeds=Random(config.seed),
                step_sizes=self._engine.step_sizes,
            )
            self._resources = stack.pop_all()
        self._num_launched = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the device's memory."""
        self._resources.close()
        del self._engine, self._scheduler, self._cache
        if self._config.device == "cuda":
            gc.collect()  # graphs and what they hold refer to each other
            torch.cuda.empty_cache()

    @property
    def max_context_len(self) -> int:
        """Most tokens of a question and its answer."""
        return self._engine.max_context_len

    def answer(self, questions: Iterable[Question], max_at_once: int | None = None) -> Iterator[Answered]:
        """Yield the questions' answers as they end; `max_at_once` of them run at a time (None: as many as the
        configuration allows).

        Raise RequestRefusedError for a question that leaves no room for an answer.
        """
        pending = iter(questions)
        asked: dict[RequestId, tuple[int, list[int]]] = {}
        max_asked = max_at_once or self._config.max_running_requests + self._config.max_waiting_requests // 2
        while True:
            for question in itertools.islice(pending, max_asked - len(asked)):
                request_id = RequestId(str(question.number))
                asked[request_id] = (question.number, [])
                submit = SubmitRequest(request_id, question.token_ids, question.sampling)
                self._scheduler.add(submit, time.monotonic())
            if not asked:
                return
            yield from self._step(asked)

    def _step(self, asked: dict[RequestId, tuple[int, list[int]]]) -> Iterator[Answered]:
        """Plan and launch a step, commit the oldest under way; yield what has ended by it."""
        self._scheduler.completed(self._board.minimum())
        plan = self._scheduler.plan(time.monotonic())
        if plan is not None:
            self._engine.launch(plan)
            self._num_launched += 1
        if not self._num_launched:
            time.sleep(_STALL_S)
            return
        if plan is not None and self._num_launched <= self._config.depth:
            return
        output = self._engine.collect()
        self._num_launched -= 1
        self._board.publish(output.step)
        self._cache.take_events()
        for told in self._scheduler.commit(output):
            number, token_ids = asked[told.request_id]
            token_ids += told.token_ids
            if told.finish_reason is not None:
                del asked[told.request_id]
                yield Answered(number, token_ids, told.finish_reason)

    def take_counts(self) -> DraftCounts:
        """Return what became of drafts since the last call."""
        stats = self._scheduler.stats
        places = sorted({place for place, _ in stats.num_drafts})
        counts = DraftCounts(
            num_rows=sum(stats.accept_lengths.values()),
            num_kept=sum(kept * num_rows for (_, kept), num_rows in stats.accept_lengths.items()),
            drafted={
                place: stats.num_drafts[place, "accepted"] + stats.num_drafts[place, "rejected"]
                for place in places
            },
            reached={place: stats.num_reached_drafts[place] for place in places},
            accepted={place: stats.num_drafts[place, "accepted"] for place in places},
        )
        stats.accept_lengths.clear()
        stats.num_drafts.clear()
        stats.num_reached_drafts.clear()
        return counts
