"""The storm's memory of a round's steps, and what it tells of a token that turned out wrong.

A rank's loop calls it at each step's launch; it keeps the plans and looks into them only when asked.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from tests.bench.gpu_rank import BenchRank, StepRecord
from tests.gpu.storm_clients import Asked, Forced
from tests.gpu.storm_compare import WrongToken, margin_below
from workers.plan import BatchPlan, CloseSlot, FreePages, LoadPages, SavePages, SetRow
from workers.protocol import RequestId

NUM_TOLD = 5
"""Of the most likely tokens."""
NUM_ASKED = 1_000
"""Candidates, so that most tokens are among them."""


@dataclass(frozen=True)
class TracedStep:
    """A step that was launched, and whose its rows were."""

    plan: BatchPlan
    request_ids: list[RequestId]
    record: StepRecord | None
    top: torch.return_types.topk | None
    """Largest logits of its sampled rows, on the device; None unless they are kept."""


class StormTrace:
    """The steps of one round of `rank`; whoever begins another clears them.

    `keeps_logits`: each step has two kernels more, which may hide what depends on its timing.
    """

    def __init__(self, rank: BenchRank, keeps_logits: bool = False) -> None:
        self._rank = rank
        self._top: torch.return_types.topk | None = None
        self.steps: list[TracedStep] = []
        if keeps_logits:
            self._keep_logits()

    def launched(self, plan: BatchPlan, record: StepRecord | None) -> None:
        """Keep a step."""
        planned = self._rank.scheduler._in_flight[-1]
        assert planned.plan is plan, "another step was planned last"
        ids = [request.request_id for request in planned.requests]
        self.steps.append(TracedStep(plan, ids, record, self._top))
        self._top = None

    def about(self, asked: Asked, place: int) -> dict[str, Any]:
        """Tell how a token of an answer came to be: its step, who was beside it, on which pages it was."""
        name, end = asked.submit.request_id, len(asked.submit.token_ids) + place
        rows = self._rows_of(name)
        # Of several, those before the last were void: the request had lost its slot.
        sampled = [
            (number, row)
            for number, row, start, length in rows
            if start + length == end and row in self.steps[number].plan.sampled
        ]
        if not sampled:
            return {"request": name, "place": place, "step": None}
        number, row = sampled[-1]
        traced = self.steps[number]
        step, record, ids = traced.plan, traced.record, traced.request_ids
        assert record is not None, "it has rows"
        return {
            "request": name,
            "place": place,
            "step": step.step,
            "mode": record.mode,
            "outcome": record.outcome,
            "was_moving": record.was_moving,
            "num_tokens": step.num_tokens,
            "num_rows": len(step.slots),
            "num_void": len(sampled) - 1,
            "row": row,
            "slot": step.slots[row],
            "start": step.starts[row],
            "len": step.lens[row],
            "is_awaited": row < step.num_awaited,
            "neighbours": [
                [ids[other], step.slots[other], step.starts[other], step.lens[other]]
                for other in (row - 1, row + 1)
                if 0 <= other < len(ids)
            ],
            # Where it began again further to the front, or was admitted: [step, first token computed].
            "begins": [
                [self.steps[later].plan.step, start]
                for (_, _, before, _), (later, _, start, _) in pairwise([(0, 0, 1 << 60, 0), *rows])
                if start < before
            ],
            "steps": len({number for number, *_ in rows}),
            "pages": self._pages(number, step.slots[row]),
            "top": None if traced.top is None else _row_of(traced.top, step.sampled.index(row)),
        }

    def _keep_logits(self) -> None:
        sampler = self._rank.engine._sampler
        assert sampler is not None, "rank 0 has one"
        sample = sampler.sample

        def watched(logits: torch.Tensor, slots: Sequence[int], positions: Sequence[int]) -> Any:
            self._top = logits.topk(NUM_TOLD)
            return sample(logits, slots, positions)

        sampler.sample = watched

    def _rows_of(self, name: RequestId) -> list[tuple[int, int, int, int]]:
        """Return step, row, start and length of each row of a request."""
        return [
            (number, row, step.plan.starts[row], step.plan.lens[row])
            for number, step in enumerate(self.steps)
            for row, other in enumerate(step.request_ids)
            if other == name
        ]

    def _pages(self, last: int, slot: int) -> list[list[Any]]:
        """Return the pages of a slot in a step, and since when its bytes are there and how they came:

        [page, "loaded" | "shared" | "own", step, arena slot of its LOAD or SAVE or None]
        """
        pages: list[int] = []
        keyed: set[int] = set()
        loads: dict[int, tuple[int, int]] = {}
        saves: dict[int, int] = {}
        rows: dict[int, int] = {}  # page -> step in which the slot came by it
        for step in self.steps[: last + 1]:
            for op in step.plan.ops:
                match op:
                    case FreePages():
                        for page in op.pages:
                            loads.pop(page, None)
                            saves.pop(page, None)
                    case LoadPages():
                        loads.update(
                            (page, (step.plan.step, to)) for page, to in zip(op.pages, op.slots, strict=True)
                        )
                    case SavePages():
                        saves.update(zip(op.pages, op.slots, strict=True))
                    case CloseSlot() if op.slot == slot:
                        pages, keyed, rows = [], set(), {}
                    case SetRow() if op.slot == slot:
                        pages[op.first : op.first + len(op.pages)] = op.pages
                        rows.update(dict.fromkeys(op.pages, step.plan.step))
                        keyed.update(op.pages if op.keys else ())
        return [
            [page, "loaded", *loads[page]]
            if page in loads
            else [page, "shared" if page in keyed else "own", rows[page], saves.get(page)]
            for page in pages
        ]


def _row_of(top: torch.return_types.topk, row: int) -> list[list[Any]]:
    values, ids = top.values[row].tolist(), top.indices[row].tolist()
    return [[token, round(value, 4)] for token, value in zip(ids, values, strict=True)]


def look_again(rank: BenchRank, wrong: WrongToken, name: str, max_margin: float) -> dict[str, Any]:
    """Ask a rank for a wrong token's place by itself, then for the whole answer; tell what it says now."""
    single = Forced(f"{name}/single", [wrong.prompt], [1], NUM_ASKED)
    rank.run(single)
    whole = Forced(f"{name}/whole", [wrong.asked.submit.token_ids], [wrong.place + 1], NUM_TOLD)
    rank.run(whole)
    said, candidates = whole.token_ids[0], single.candidates[0][0]
    answer = wrong.asked.token_ids[: wrong.place + 1]
    margins = {
        which: round(margin_below(candidates, token), 4)
        for which, token in (("given", wrong.token_id), ("wanted", wrong.wanted))
    }
    return {
        "says": single.token_ids[0][0],
        "margins": margins,
        "is_tie_now": wrong.token_id in candidates and margins["given"] <= max_margin,
        "given_rank": list(candidates).index(wrong.token_id) if wrong.token_id in candidates else None,
        "top": [[token, round(value, 4)] for token, value in list(candidates.items())[:NUM_TOLD]],
        # Up to the first difference its answers are of one prompt.
        "whole_differs_at": next(
            (place for place, (ours, its) in enumerate(zip(answer, said, strict=True)) if ours != its), None
        ),
    }
