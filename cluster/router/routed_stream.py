"""RoutedStream: a placed request's outputs; what its first token took goes into the rate."""

from collections.abc import Callable
from typing import Self

from cluster.replica import ReplicaStream
from cluster.router.costs import PrefillRate
from workers.protocol import FinishReason, RequestOutput


class RoutedStream:
    """A replica's stream, its first output read already, that measures the prefill rate while it is read.

    Only prefills without copies say what a token takes: no more than `num_held_tokens`, those on the device,
    may have been found. None: pages were to be copied.
    """

    def __init__(
        self,
        stream: ReplicaStream,
        answer: RequestOutput,
        rate: PrefillRate,
        num_tokens: int,
        num_held_tokens: int | None,
        clock: Callable[[], float],
    ) -> None:
        self._stream = stream
        self._answer: RequestOutput | None = answer
        self._rate = rate
        self._num_tokens = num_tokens
        self._num_held_tokens = num_held_tokens
        self._clock = clock
        self._sent_s = clock()
        self._awaits_token = True

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RequestOutput:
        if self._answer is not None:
            output, self._answer = self._answer, None
        else:
            output = await anext(self._stream)
        if self._awaits_token and output.token_ids:
            self._awaits_token = False
            if self._num_held_tokens is not None and output.num_cached_tokens <= self._num_held_tokens:
                num_computed = self._num_tokens - output.num_cached_tokens
                self._rate.observe(num_computed, self._clock() - self._sent_s)
        return output

    async def abort(self, finish_reason: FinishReason = "abort") -> None:
        """End the request; its last output says `finish_reason`."""
        await self._stream.abort(finish_reason)

    async def aclose(self) -> None:
        """Release the stream; aborts when unfinished."""
        self._answer = None
        await self._stream.aclose()
