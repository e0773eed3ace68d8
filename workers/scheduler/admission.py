"""Admission: what a request must satisfy to be queued, what it becomes, and the queue itself.

Used by the Scheduler in rank 0's step loop thread. Refusals are typed errors; the step loop answers them with
a `rejected` output that carries `code` and the message.
"""

from bisect import insort
from collections.abc import Iterator
from operator import attrgetter
from random import Random

from workers.kvcache.manager import KVCacheManager
from workers.protocol import SubmitRequest
from workers.scheduler.request import Request

_SEED_BITS = 63


class RequestRefusedError(Exception):
    """A request was not queued. `code` is its RequestOutput.error_code."""

    code = "bad_request"


class QueueFullError(RequestRefusedError):
    """As many requests run and wait as may."""

    code = "queue_full"


class PromptTooLongError(RequestRefusedError):
    """The context, or the pool, does not hold the prompt and one more token."""

    code = "prompt_too_long"


class BadTokenError(RequestRefusedError):
    """A token id is outside the vocabulary."""

    code = "bad_token"


class Admission:
    """Checks what the API sent and makes Requests of it, numbered by arrival."""

    def __init__(
        self,
        cache: KVCacheManager,
        *,
        end_token_ids: list[int],
        max_context_len: int,
        vocab_size: int,
        seeds: Random,
    ) -> None:
        self._cache = cache
        self._end_token_ids = sorted(set(end_token_ids))
        self._max_context_len = max_context_len
        self._vocab_size = vocab_size
        self._seeds = seeds
        self._num_arrived = 0

    def accept(self, submit: SubmitRequest, now_s: float) -> Request:
        """Return the request, with a seed, or raise a RequestRefusedError that names what is wrong."""
        self._validate(submit)
        sampling = submit.sampling
        token_ids = list(submit.token_ids)
        prompt_len = len(token_ids)
        max_tokens = self._max_context_len if sampling.max_tokens is None else sampling.max_tokens
        end_token_ids = [] if sampling.ignore_eos else self._end_token_ids
        self._num_arrived += 1
        return Request(
            request_id=submit.request_id,
            token_ids=token_ids,
            tokens=self._cache.keyed(token_ids, submit.tenant_salt),
            prompt_len=prompt_len,
            max_len=min(prompt_len + max_tokens, self._max_context_len),
            sampling=sampling,
            seed=self._seeds.getrandbits(_SEED_BITS) if sampling.seed is None else sampling.seed,
            end_token_ids=end_token_ids,
            stop_token_ids=frozenset(end_token_ids).union(sampling.stop_token_ids),
            order=(submit.priority, self._num_arrived),
            arrival_s=now_s,
        )

    def _validate(self, submit: SubmitRequest) -> None:
        prompt, sampling = submit.token_ids, submit.sampling
        if not prompt:
            raise RequestRefusedError("token_ids: found an empty prompt, allowed is one token or more")
        if len(prompt) >= self._max_context_len:
            raise PromptTooLongError(
                f"token_ids: found {len(prompt)} prompt tokens, allowed are {self._max_context_len - 1}: "
                f"prompt and answer share a context of {self._max_context_len} tokens; shorten the prompt"
            )
        self._check_token_ids("token_ids", prompt)
        self._check_token_ids("stop_token_ids", sampling.stop_token_ids)
        self._check_token_ids("logit_bias", [token_id for token_id, _ in sampling.logit_bias])
        if sampling.max_tokens is not None and sampling.max_tokens < 1:
            raise RequestRefusedError(f"max_tokens: found {sampling.max_tokens}, allowed is 1 or more")

    def _check_token_ids(self, field: str, token_ids: list[int]) -> None:
        if not token_ids:
            return
        lowest, highest = min(token_ids), max(token_ids)
        if lowest < 0 or highest >= self._vocab_size:
            found = lowest if lowest < 0 else highest
            raise BadTokenError(f"{field}: found token id {found}, allowed are 0 to {self._vocab_size - 1}")


class WaitingQueue:
    """Requests without a slot, first come first served within their priority class."""

    def __init__(self) -> None:
        self._requests: list[Request] = []
        self.num_tokens = 0
        """Tokens that the queued requests have to compute, cached prefixes not deducted."""

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    @property
    def first(self) -> Request | None:
        """The request to admit next: who awaits a FETCH keeps its place, and is passed over meanwhile."""
        return next((request for request in self._requests if not request.is_fetching), None)

    def push(self, request: Request) -> None:
        """Queue a new or preempted request at its place."""
        insort(self._requests, request, key=attrgetter("order"))
        self.num_tokens += len(request.token_ids)

    def remove(self, request: Request) -> None:
        """Take a request out, from wherever it stands. It waits for nothing any more."""
        self._requests.remove(request)
        self.num_tokens -= len(request.token_ids)
        request.end_prefetch()

    def check(self) -> None:
        """Prove that the requests are in order and none of them runs, and the count of tokens."""
        assert self._requests == sorted(self._requests, key=attrgetter("order")), (
            "the waiting requests are out of order"
        )
        for request in self._requests:
            assert request.slot is None and request.num_computed == request.num_in_flight == 0, (
                f"{request.request_id} waits and runs"
            )
        assert self.num_tokens == sum(len(request.token_ids) for request in self._requests), (
            "the queue miscounts its tokens"
        )
