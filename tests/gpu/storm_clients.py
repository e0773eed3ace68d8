"""The storm's clients: many mixed requests at once, on shared prefixes, sampled or greedy, some given up."""

from dataclasses import dataclass, field
from random import Random

import msgspec

from workers.protocol import (
    AbortRequest,
    FinishReason,
    Received,
    RequestId,
    RequestOutput,
    SamplingParams,
    SubmitRequest,
)

MAX_TOKENS = 40
ABORTED_RATIO, GREEDY_RATIO, AGAIN_RATIO = 0.1, 0.5, 0.25
NUM_FAMILIES = 12


@dataclass
class Asked:
    """One request and what came of it."""

    submit: SubmitRequest
    turns_left: int | None
    """Turns of the loop until the client hangs up; None: it stays."""
    token_ids: list[int] = field(default_factory=list)
    num_cached: int = 0
    finish_reason: FinishReason | None = None

    @property
    def is_greedy(self) -> bool:
        """Its tokens are a function of the prompt alone."""
        return self.submit.sampling.temperature == 0


class StormClients:
    """Asks `num_requests` in all, `concurrency` at a time; everything is drawn from the name.

    `max_prompt_len` bounds prompts. A quarter of the requests go on from an answer of before.
    """

    def __init__(
        self, name: str, num_requests: int, concurrency: int, vocab_size: int, max_prompt_len: int
    ) -> None:
        self._name = name
        self._num_requests = num_requests
        self._concurrency = concurrency
        self._vocab_size = vocab_size
        self._max_prompt_len = max_prompt_len
        self._random = Random(name)
        self._families = [self._tokens(max_prompt_len) for _ in range(NUM_FAMILIES)]
        self._answered: list[list[int]] = []
        self._live: dict[RequestId, Asked] = {}
        self.asked: dict[RequestId, Asked] = {}
        self.num_after_end = 0
        """Outputs of requests that had ended: a bug."""

    @property
    def are_done(self) -> bool:
        return len(self.asked) == self._num_requests and not self._live

    def rest(self) -> list[SubmitRequest]:
        """Return what a new replica is to be asked in the place of a lost one: each answer under way goes on
        from its prompt and its tokens so far."""
        return [
            msgspec.structs.replace(
                asked.submit,
                token_ids=asked.submit.token_ids + asked.token_ids,
                sampling=msgspec.structs.replace(
                    asked.submit.sampling,
                    max_tokens=asked.submit.sampling.max_tokens - len(asked.token_ids),
                ),
            )
            for asked in self._live.values()
        ]

    def ask(self, now_s: float) -> list[Received]:
        received: list[Received] = []
        for name, asked in self._live.items():
            if asked.turns_left is not None:
                asked.turns_left -= 1
                if asked.turns_left == 0:
                    received.append(AbortRequest(name))
        while len(self._live) < self._concurrency and len(self.asked) < self._num_requests:
            asked = self._draw()
            self.asked[asked.submit.request_id] = self._live[asked.submit.request_id] = asked
            received.append(asked.submit)
        return received

    def wait_s(self, now_s: float) -> float:
        return 0.0

    def take(self, outputs: list[RequestOutput], now_s: float) -> None:
        for output in outputs:
            asked = self._live.get(output.request_id)
            if asked is None:
                self.num_after_end += 1
                continue
            asked.token_ids += output.token_ids
            asked.num_cached = max(asked.num_cached, output.num_cached_tokens)
            asked.finish_reason = output.finish_reason
            if output.finish_reason is not None:
                del self._live[output.request_id]
                if output.finish_reason == "length":
                    self._answered.append(asked.submit.token_ids + asked.token_ids)

    def _draw(self) -> Asked:
        random = self._random
        submit = SubmitRequest(
            RequestId(f"{self._name}/{len(self.asked)}"),
            self._prompt(),
            self._sampling(),
            priority=random.choice((0, 0, 0, 0, 0, 0, -1, 1)),
            tenant_salt=random.choice((b"", b"", b"", b"one", b"two")),
        )
        is_aborted = random.random() < ABORTED_RATIO
        return Asked(submit, random.randrange(1, 60) if is_aborted else None)

    def _prompt(self) -> list[int]:
        random = self._random
        if self._answered and random.random() < AGAIN_RATIO:
            before = random.choice(self._answered[-200:])
            if len(before) < self._max_prompt_len:
                return before + self._tokens(random.randint(1, self._max_prompt_len - len(before)))
        own_len = min(self._max_prompt_len, int(random.paretovariate(1.1) * 3))
        shared_len = random.choice((0, 1, 2, 3, 3)) * (self._max_prompt_len // 3)
        shared_len = min(shared_len, self._max_prompt_len - own_len)
        return random.choice(self._families)[:shared_len] + self._tokens(own_len)

    def _sampling(self) -> SamplingParams:
        random = self._random
        num_tokens = random.randint(1, MAX_TOKENS)
        if random.random() < GREEDY_RATIO:
            return SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        return SamplingParams(
            temperature=random.choice((0.3, 1.0, 1.7)),
            top_k=random.choice((None, None, 1, 20)),
            top_p=random.choice((1.0, 0.9, 0.4)),
            min_p=random.choice((0.0, 0.0, 0.05)),
            presence_penalty=random.choice((0.0, 0.0, 0.7)),
            frequency_penalty=random.choice((0.0, 0.0, 0.5)),
            repetition_penalty=random.choice((1.0, 1.0, 1.2)),
            logit_bias=random.choice(([], [], [(7, 4.0), (9, -50.0)])),
            num_logprobs=random.choice((None, None, 0, 3)),
            max_tokens=num_tokens,
            ignore_eos=True,
            stop_token_ids=random.choice(([], [self._random.randrange(3, self._vocab_size)])),
            seed=random.choice((None, random.getrandbits(31))),
        )

    def _tokens(self, length: int) -> list[int]:
        return [self._random.randrange(3, self._vocab_size) for _ in range(length)]


class Forced:
    """Greedy requests that repeat answers from a prefix of them on, all at once, with what came second."""

    def __init__(
        self, name: str, prompts: list[list[int]], num_tokens: list[int], num_candidates: int
    ) -> None:
        self._waiting: list[Received] = [
            SubmitRequest(
                RequestId(f"{name}/{number}"),
                prompt,
                SamplingParams(
                    temperature=0.0, max_tokens=length, ignore_eos=True, num_logprobs=num_candidates
                ),
            )
            for number, (prompt, length) in enumerate(zip(prompts, num_tokens, strict=True))
        ]
        self._num_left = len(prompts)
        self.token_ids: list[list[int]] = [[] for _ in prompts]
        self.candidates: list[list[dict[int, float]]] = [[] for _ in prompts]
        """The most likely tokens at each place and their log-probabilities, the most likely first."""

    @property
    def are_done(self) -> bool:
        return not self._num_left

    def ask(self, now_s: float) -> list[Received]:
        asked, self._waiting = self._waiting, []
        return asked

    def wait_s(self, now_s: float) -> float:
        return 0.0

    def take(self, outputs: list[RequestOutput], now_s: float) -> None:
        for output in outputs:
            number = int(output.request_id.rpartition("/")[2])
            self.token_ids[number] += output.token_ids
            self.candidates[number] += [
                dict(zip(told.top_ids, told.top_logprobs, strict=True)) for told in output.logprobs
            ]
            self._num_left -= output.finish_reason is not None
