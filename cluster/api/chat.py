"""`POST /v1/chat/completions`."""

from collections.abc import Iterable, Sequence

import msgspec
from starlette.types import Receive, Scope, Send

from cluster.api.answers import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    ContentLogprob,
    Delta,
    TopLogprob,
)
from cluster.api.calls import Call, answer_call, collect, generating, send_json, stream, usage
from cluster.api.choice_text import Piece, ScoredToken
from cluster.api.generation import Generation
from cluster.api.prompts import chat_prompt
from cluster.api.schemas import ChatCompletionRequest
from cluster.api.service import Service


class ChatCompletions:
    """The endpoint, as an ASGI application."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or raise ApiError or ClientDisconnect."""
        await answer_call(self._service, ChatCompletionRequest, self._answer, scope, receive, send)

    async def _answer(self, call: Call[ChatCompletionRequest], send: Send) -> None:
        body, model = call.body, self._service.model
        async with generating(
            self._service, call, lambda limits: [chat_prompt(model, body.messages, limits)]
        ) as generation:
            if body.stream:
                await self._stream(call, generation, send)
            else:
                pieces = await collect(generation)
                await send_json(send, self._whole(call, generation, pieces))

    def _whole(
        self, call: Call[ChatCompletionRequest], generation: Generation, pieces: Sequence[Sequence[Piece]]
    ) -> ChatCompletion:
        choices = []
        for index, of_choice in enumerate(pieces):
            finish_reason = of_choice[-1].finish_reason
            assert finish_reason is not None, "a choice's last piece carries its finish reason"
            text = "".join(piece.text for piece in of_choice)
            logprobs = _logprobs(call, (scored for piece in of_choice for scored in piece.scored))
            choices.append(ChatChoice(index, AssistantMessage(text), logprobs, finish_reason))
        return ChatCompletion(
            id=_answer_id(call),
            created=call.created,
            model=call.body.model,
            choices=choices,
            usage=usage(generation, call.body),
        )

    async def _stream(self, call: Call[ChatCompletionRequest], generation: Generation, send: Send) -> None:
        num_choices = len(generation.choices)
        answer_id = _answer_id(call)
        no_usage = None if call.body.streams_usage else msgspec.UNSET

        def event(choice: ChatChunkChoice) -> ChatChunk:
            return ChatChunk(
                id=answer_id,
                created=call.created,
                model=call.body.model,
                choices=[choice],
                usage=no_usage,
            )

        def chunk(index: int, piece: Piece) -> ChatChunk:
            delta = Delta(content=piece.text) if piece.text else Delta()
            return event(ChatChunkChoice(index, delta, _logprobs(call, piece.scored), piece.finish_reason))

        def closing() -> list[ChatChunk]:
            if not call.body.streams_usage:
                return []
            totals = usage(generation, call.body)
            return [
                ChatChunk(id=answer_id, created=call.created, model=call.body.model, choices=[], usage=totals)
            ]

        begin = Delta(role="assistant", content="")
        opening = [event(ChatChunkChoice(index, begin)) for index in range(num_choices)]
        await stream(generation, send, call.request_id, chunk, opening, closing)


def _answer_id(call: Call[ChatCompletionRequest]) -> str:
    return f"chatcmpl-{call.request_id}"


def _logprobs(call: Call[ChatCompletionRequest], tokens: Iterable[ScoredToken]) -> ChatLogprobs | None:
    if not call.body.logprobs:
        return None
    return ChatLogprobs([_content_logprob(token) for token in tokens])


def _content_logprob(token: ScoredToken) -> ContentLogprob:
    top = [TopLogprob(other.text, other.logprob, list(other.octets)) for other in token.top]
    return ContentLogprob(token.chosen.text, token.chosen.logprob, list(token.chosen.octets), top)
