"""One call's choices at work: submit all, wait until all are queued, decode as they come, abort what is left.

On the event loop; the text work of each step runs in the tokens' thread.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from starlette.requests import ClientDisconnect

from cluster.api.choice_text import ChoiceText, Piece
from cluster.api.errors import RETRY_AFTER_S, ApiError, draining, replica_failed
from cluster.api.ports import (
    NoReplicaError,
    OverloadedError,
    RequestRecorder,
    RequestRouter,
    RequestStream,
    RequestSummary,
)
from cluster.api.text_threads import TextThreads
from workers.protocol import FinishReason, RequestOutput, SubmitRequest

Emit = Callable[[int, Piece], Awaitable[None]]
"""Takes a choice's index and its next piece; pieces of one choice come in order, never two at once."""


@dataclass
class Choice:
    """One sequence of a call. Owned by its Generation."""

    request: SubmitRequest
    text: ChoiceText
    stream: RequestStream | None = None
    cached_len: int | None = None
    num_accepted_drafts: int = 0
    num_rejected_drafts: int = 0
    finish_reason: FinishReason | None = None


class Generation:
    """Runs the choices of one call. Use as a context: leaving it aborts whatever is unfinished.

    Raises ApiError from `start` when the call cannot be queued whole, from `run` when a replica fails.
    """

    def __init__(
        self,
        choices: Sequence[Choice],
        router: RequestRouter,
        threads: TextThreads,
        recorder: RequestRecorder,
        clock: Callable[[], float],
        arrival_s: float,
    ) -> None:
        self.choices = choices
        self._router = router
        self._threads = threads
        self._recorder = recorder
        self._clock = clock
        self._arrival_s = arrival_s
        self._first_outputs: list[RequestOutput] = []
        self._is_ending = False

    async def __aenter__(self) -> "Generation":
        return self

    async def __aexit__(self, *exc: object) -> None:
        for choice in self.choices:
            if choice.stream is None:
                continue
            if choice.finish_reason is None:
                self._finish(choice, "abort")
            await choice.stream.aclose()

    async def start(self) -> None:
        """Submit every choice; return when all are queued. One's failure ends and counts for all."""
        try:
            await self._submit()
            await self._all_queued()
        except _RefusedError as refused:
            self._finish_all(refused.reason)
            raise refused.error from refused.__cause__
        except Exception:
            self._finish_all("error")
            raise

    async def _submit(self) -> None:
        try:
            for choice in self.choices:
                choice.stream = await self._router.submit(choice.request)
                if self._is_ending:
                    raise _RefusedError("shutdown", draining())
        except NoReplicaError as error:
            raise _RefusedError("rejected", _no_replica(error.reason, error.retry_after_s)) from error
        except OverloadedError as error:
            raise _RefusedError("rejected", _overloaded(error.reason, error.retry_after_s)) from error

    async def _all_queued(self) -> None:
        for choice in self.choices:
            assert choice.stream is not None
            output = await anext(choice.stream)
            if output.finish_reason == "rejected":
                raise _RefusedError("rejected", _rejection(output))
            if output.finish_reason == "error":
                raise _RefusedError("error", replica_failed(output.error))
            self._first_outputs.append(output)

    async def run(self, emit: Emit) -> None:
        """Emit every choice's pieces until all have finished. One choice's failure is the end of all."""
        tasks = [
            asyncio.create_task(self._run_choice(index, choice, first, emit))
            for index, (choice, first) in enumerate(zip(self.choices, self._first_outputs, strict=True))
        ]
        try:
            await asyncio.gather(*tasks)
        except ClientDisconnect:
            raise
        except Exception:
            self._finish_all("error")
            raise
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def end(self) -> None:
        """Finish every choice with `shutdown`; what was generated so far is emitted."""
        self._is_ending = True
        for choice in self.choices:
            if choice.stream is not None:
                await choice.stream.abort("shutdown")

    async def _run_choice(self, index: int, choice: Choice, first: RequestOutput, emit: Emit) -> None:
        stream = choice.stream
        assert stream is not None
        output = first
        last_s: float | None = None
        while True:
            choice.num_accepted_drafts += output.num_accepted_drafts
            choice.num_rejected_drafts += output.num_rejected_drafts
            if output.token_ids:
                last_s = self._record_tokens(len(output.token_ids), last_s)
                if choice.cached_len is None:
                    choice.cached_len = output.num_cached_tokens
            if output.finish_reason == "error":
                self._finish(choice, "error")
                raise replica_failed(output.error)
            if output.token_ids or output.finish_reason is not None:
                piece = await self._decode(choice.text, output)
                if choice.text.stopped:
                    await stream.abort("stop")
                if piece.finish_reason is not None:
                    self._finish(choice, piece.finish_reason)
                if not piece.is_empty:
                    await emit(index, piece)
                if piece.finish_reason is not None:
                    return
            output = await anext(stream)

    async def _decode(self, text: ChoiceText, output: RequestOutput) -> Piece:
        pieces: list[Piece] = []
        await self._threads.run_tokens(lambda: pieces.append(text.feed(output)))
        return pieces[0]

    def _record_tokens(self, num_tokens: int, last_s: float | None) -> float:
        now_s = self._clock()
        if last_s is None:
            self._recorder.first_token(now_s - self._arrival_s)
        else:
            self._recorder.next_tokens(now_s - last_s, num_tokens)
        return now_s

    def _finish_all(self, reason: FinishReason) -> None:
        """Count every choice that was placed and has not finished."""
        for choice in self.choices:
            if choice.stream is not None and choice.finish_reason is None:
                self._finish(choice, reason)

    def _finish(self, choice: Choice, reason: FinishReason) -> None:
        assert choice.finish_reason is None, "a request ends once"
        choice.finish_reason = reason
        self._recorder.finished(
            RequestSummary(
                finish_reason=reason,
                duration_s=self._clock() - self._arrival_s,
                prompt_len=len(choice.request.token_ids),
                generated_len=choice.text.num_tokens,
                cached_len=choice.cached_len or 0,
            )
        )


class _RefusedError(Exception):
    """A call that cannot be queued whole: what its choices count as, and what the user is told."""

    def __init__(self, reason: FinishReason, error: ApiError) -> None:
        super().__init__(error.message)
        self.reason = reason
        self.error = error


def _no_replica(reason: str, retry_after_s: float) -> ApiError:
    return ApiError(
        503,
        f"No replica can take the request now: {reason}.",
        code="no_replica",
        retry_after_s=retry_after_s,
    )


def _overloaded(reason: str, retry_after_s: float) -> ApiError:
    return ApiError(
        429,
        f"The server is overloaded: {reason}. Send the request again later.",
        code="overloaded",
        retry_after_s=retry_after_s,
    )


def _rejection(output: RequestOutput) -> ApiError:
    """Return the error of a request that a worker did not queue."""
    reason = output.error or "no reason given"
    match output.error_code:
        case "queue_full":
            return _overloaded(reason, RETRY_AFTER_S)
        case "prompt_too_long":
            return ApiError(400, reason, param="messages", code="context_length_exceeded")
        case _:
            return ApiError(400, reason, code=output.error_code)
