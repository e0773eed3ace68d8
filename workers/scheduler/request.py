"""Request: one sequence on its way through the Scheduler. Only the Scheduler changes it."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from workers.kvcache.arrivals import Origin
from workers.kvcache.prefetcher import Prefetch
from workers.kvcache.rows import KeyedTokens
from workers.protocol import FinishReason, RequestId, SamplingParams


@dataclass(slots=True, eq=False)
class Request:
    """A request is waiting without a slot, running with one, and finished with a reason.

    It is loading while it waits without a slot for a FETCH, or with one for the LOADs of its prefix.

    Lengths count tokens: `token_ids` = prompt + generated, then those that steps in flight are sampling:

        |--------------------- len(token_ids) ---------------------|- num_awaited -|
        |-- num_computed --|-- num_in_flight --|-- num_planned --|                  <= max_len
        KV committed        rows of steps on    its row in the step later chunks
                            their way           that is planned
    """

    request_id: RequestId
    token_ids: list[int]
    """Prompt, then generated tokens."""
    tokens: KeyedTokens
    """The same list, with its PageKeys."""
    prompt_len: int
    max_len: int
    """It finishes with `length` at so many tokens, prompt included."""
    sampling: SamplingParams
    seed: int
    end_token_ids: list[int]
    """The model's own end tokens; empty under ignore_eos."""
    stop_token_ids: frozenset[int]
    """All that end it: end_token_ids and its own."""
    order: tuple[int, int]
    """(priority, arrival): who goes first. Kept for life: preempted, it resumes before younger ones."""
    arrival_s: float
    slot: int | None = None
    num_computed: int = 0
    num_in_flight: int = 0
    num_awaited: int = 0
    num_planned: int = 0
    """Of the step that is planned, drafts included."""
    num_drafts: int = 0
    """Tokens that are drafted for its slot."""
    num_verified: int = 0
    """Of `num_planned`, those that are drafts."""
    reserved_len: int = 0
    """Tokens that its pages hold."""
    num_closed: int = 0
    """How often it has lost its slot: what a step planned before that brings for it is void."""
    was_admitted: bool = False
    num_cached: int | None = None
    """Tokens found in the cache when first admitted, or again after some failed to load; None before."""
    origins: Counter[Origin] = field(default_factory=Counter)
    """Of `num_cached`, how many were found where."""
    prefetch: Prefetch | None = None
    """What it waits for in the queue: once only, preempted it finds its pages or computes them."""
    finish_reason: FinishReason | None = None

    @property
    def num_generated(self) -> int:
        """Tokens beyond the prompt."""
        return len(self.token_ids) - self.prompt_len

    @property
    def main_origin(self) -> Origin | Literal["computed"]:
        """Where the most of its prompt was found, if it was not computed."""
        if not self.num_cached:
            return "computed"
        lens: dict[Origin | Literal["computed"], int] = {
            "computed": self.prompt_len - sum(self.origins.values())
        }
        lens.update(self.origins.items())
        return max(lens, key=lens.__getitem__)

    @property
    def is_fetching(self) -> bool:
        """Tell whether it is not to be admitted yet."""
        return self.prefetch is not None and self.prefetch.is_awaited

    def end_prefetch(self) -> None:
        """Go on with what is here."""
        if self.prefetch is not None:
            self.prefetch.end()
            self.prefetch = None

    @property
    def num_tokens(self) -> int:
        """Its tokens once the steps in flight are over, if none of them ends it."""
        return len(self.token_ids) + self.num_awaited

    @property
    def num_left(self) -> int:
        """Tokens still to plan before the next one is sampled: 1 while it decodes."""
        return self.num_tokens - self.num_computed - self.num_in_flight

    @property
    def is_sampled(self) -> bool:
        """Tell whether the step being planned samples its next token."""
        return self.num_planned - self.num_verified == self.num_left

    @property
    def is_ending(self) -> bool:
        """Tell whether a step in flight samples its last token: it needs nothing any more."""
        return self.num_tokens >= self.max_len
