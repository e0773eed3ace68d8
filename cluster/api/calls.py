"""What every generating call does: admit, read, prepare, watch for hang-up, generate, answer.

`chat` and `completions` bring what differs: the prompts, and how pieces become objects.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cluster.api.answers import CachedTokens, DraftedTokens, Usage
from cluster.api.choice_text import ChoiceText, Piece
from cluster.api.errors import ApiError, internal_error, prompt_timeout
from cluster.api.failure_log import log_failure
from cluster.api.generation import Choice, Generation
from cluster.api.json_body import read_body
from cluster.api.prompts import Limits, sampling_params
from cluster.api.request_ids import current_request_id, header
from cluster.api.schemas import ChatCompletionRequest, CompletionRequest
from cluster.api.service import Service
from cluster.api.sse import EventStream
from cluster.api.text_threads import PROMPT_TIMEOUT_S
from workers.protocol import SubmitRequest

logger = logging.getLogger(__name__)

Body = TypeVar("Body", ChatCompletionRequest, CompletionRequest)


@dataclass(frozen=True)
class Call(Generic[Body]):
    """One admitted call. `created` is Unix time, `arrival_s` the service clock's."""

    body: Body
    request_id: str
    tenant_salt: bytes
    created: int
    arrival_s: float


async def answer_call(
    service: Service,
    schema: type[Body],
    answer: Callable[[Call[Body], Send], Coroutine[Any, Any, None]],
    scope: Scope,
    receive: Receive,
    send: Send,
) -> None:
    """Check key and body, then run `answer` until it is done or the client hangs up (ClientDisconnect)."""
    arrival_s = service.clock()
    tenant = service.authenticator.tenant(header(scope, b"authorization"))
    with service.lifecycle.call():
        body = await read_body(Request(scope, receive), schema, service.threads)
        check_model(service, body.model)
        call = Call(
            body=body,
            request_id=current_request_id.get(),
            tenant_salt=service.authenticator.salt(tenant, body.cache_salt),
            created=int(service.wall_clock()),
            arrival_s=arrival_s,
        )
        await _until_hang_up(receive, answer(call, send))


def check_model(service: Service, name: str) -> None:
    """Raise ApiError (404) for a model that is not the one served."""
    if name != service.model.name:
        raise ApiError(
            404,
            f"'model': '{name[:64]}' is not served here; allowed: '{service.model.name}'.",
            param="model",
            code="model_not_found",
        )


@asynccontextmanager
async def generating(
    service: Service, call: Call[Body], encode: Callable[[Limits], Sequence[list[int]]]
) -> AsyncIterator[Generation]:
    """Prepare a call's prompts in a thread, queue its choices, and abort on leaving what is unfinished.

    `encode` returns the prompts' tokens. Choice i of prompt p has index p * n + i.
    """
    limits = service.limits()
    try:
        choices = await service.threads.run_prompt(
            lambda: _choices(service, call, encode(limits), limits), PROMPT_TIMEOUT_S
        )
    except TimeoutError:
        raise prompt_timeout(PROMPT_TIMEOUT_S) from None
    generation = Generation(
        choices, service.router, service.threads, service.recorder, service.clock, call.arrival_s
    )
    async with generation:
        with service.lifecycle.generating(generation):
            await generation.start()
            yield generation


def _choices(
    service: Service, call: Call[Body], prompts: Sequence[list[int]], limits: Limits
) -> list[Choice]:
    body, model = call.body, service.model
    choices: list[Choice] = []
    for prompt in prompts:
        for _ in range(body.num_choices):
            index = len(choices)
            sampling = sampling_params(body, len(prompt), index, limits)
            request = SubmitRequest(
                request_id=service.request_ids.for_choice(call.request_id, index),
                token_ids=prompt,
                sampling=sampling,
                priority=body.priority or 0,
                tenant_salt=call.tenant_salt,
            )
            text = ChoiceText(
                model.tokenizer,
                stops=body.stop or (),
                end_token_ids=model.end_token_ids.union(sampling.stop_token_ids),
                min_tokens=sampling.min_tokens,
            )
            choices.append(Choice(request, text))
    return choices


async def stream(
    generation: Generation,
    send: Send,
    request_id: str,
    chunk: Callable[[int, Piece], msgspec.Struct],
    opening: Sequence[msgspec.Struct],
    closing: Callable[[], Sequence[msgspec.Struct]],
) -> None:
    """Send a generation as events: `opening`, a `chunk` for each piece, `closing`, the end mark.

    A failure on the way ends every open choice with finish reason `error`, then comes the error body.
    """
    events = EventStream(send)
    await events.open()
    for record in opening:
        await events.event(record)
    open_choices = set(range(len(generation.choices)))

    async def emit(index: int, piece: Piece) -> None:
        if piece.finish_reason is not None:
            open_choices.discard(index)
        await events.event(chunk(index, piece))

    failure: ApiError | None = None
    try:
        await generation.run(emit)
    except ApiError as error:
        failure = error
    except ClientDisconnect:
        raise
    # The top of a response that has begun: its status is sent, so the failure must be told inside it.
    except Exception as error:
        log_failure(logger, "stream failed", error)
        failure = internal_error()
    if failure is None:
        for record in closing():
            await events.event(record)
    else:
        for index in sorted(open_choices):
            await events.event(chunk(index, Piece("", finish_reason="error")))
        await events.event(failure.body(request_id))
    await events.close()


async def collect(generation: Generation) -> list[list[Piece]]:
    """Run a generation to its end; return each choice's pieces."""
    pieces: list[list[Piece]] = [[] for _ in generation.choices]

    async def emit(index: int, piece: Piece) -> None:
        pieces[index].append(piece)

    await generation.run(emit)
    return pieces


async def send_json(send: Send, record: msgspec.Struct) -> None:
    """Send a record as a whole 200 answer."""
    response = Response(msgspec.json.encode(record), media_type="application/json")
    await response({"type": "http"}, _no_receive, send)


def usage(generation: Generation, body: ChatCompletionRequest | CompletionRequest) -> Usage:
    """Return the tokens of a call so far, with as much detail as its body asks for."""
    choices, num_choices = generation.choices, body.num_choices
    prompt_tokens = cached_tokens = 0
    for first in range(0, len(choices), num_choices):
        of_prompt = choices[first : first + num_choices]
        prompt_tokens += len(of_prompt[0].request.token_ids)
        # A later choice may find the pages of the first; what the call itself computed is not cached.
        cached_tokens += min(choice.cached_len or 0 for choice in of_prompt)
    completion_tokens = sum(choice.text.num_tokens for choice in choices)
    return Usage(
        prompt_tokens,
        completion_tokens,
        prompt_tokens + completion_tokens,
        CachedTokens(cached_tokens),
        _drafted(choices) if body.usage_details else msgspec.UNSET,
    )


def _drafted(choices: Sequence[Choice]) -> DraftedTokens:
    return DraftedTokens(
        accepted_prediction_tokens=sum(choice.num_accepted_drafts for choice in choices),
        rejected_prediction_tokens=sum(choice.num_rejected_drafts for choice in choices),
    )


async def _no_receive() -> Any:
    raise AssertionError("a plain response reads nothing")


async def _until_hang_up(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Run `work`; if the client hangs up first, cancel it, await its clean-up, raise ClientDisconnect."""
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_hang_up(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        await working
    finally:
        await _end(working)
        await _end(watching)


async def _hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()  # seen: whoever could act on it has it from `await working`
