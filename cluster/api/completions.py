"""`POST /v1/completions`."""

from collections.abc import Iterable, Sequence

import msgspec
from starlette.types import Receive, Scope, Send

from cluster.api.answers import TextChoice, TextCompletion, TextLogprobs
from cluster.api.calls import Call, answer_call, collect, generating, send_json, stream, usage
from cluster.api.choice_text import Piece, ScoredToken
from cluster.api.generation import Generation
from cluster.api.prompts import Limits, completion_prompt
from cluster.api.schemas import CompletionRequest
from cluster.api.service import Service


class Completions:
    """The endpoint, as an ASGI application."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or raise ApiError or ClientDisconnect."""
        await answer_call(self._service, CompletionRequest, self._answer, scope, receive, send)

    async def _answer(self, call: Call[CompletionRequest], send: Send) -> None:
        def encode(limits: Limits) -> list[list[int]]:
            return [completion_prompt(self._service.model, prompt, limits) for prompt in call.body.prompt]

        async with generating(self._service, call, encode) as generation:
            if call.body.stream:
                await self._stream(call, generation, send)
            else:
                pieces = await collect(generation)
                await send_json(send, self._whole(call, generation, pieces))

    def _whole(
        self, call: Call[CompletionRequest], generation: Generation, pieces: Sequence[Sequence[Piece]]
    ) -> TextCompletion:
        choices = []
        for index, of_choice in enumerate(pieces):
            text = self._echo(call, index) + "".join(piece.text for piece in of_choice)
            logprobs = _logprobs(call, (scored for piece in of_choice for scored in piece.scored))
            choices.append(TextChoice(index, text, logprobs, of_choice[-1].finish_reason))
        return TextCompletion(
            id=_answer_id(call),
            created=call.created,
            model=call.body.model,
            choices=choices,
            usage=usage(generation, call.body),
        )

    async def _stream(self, call: Call[CompletionRequest], generation: Generation, send: Send) -> None:
        answer_id = _answer_id(call)
        no_usage = None if call.body.streams_usage else msgspec.UNSET

        def event(choice: TextChoice) -> TextCompletion:
            return TextCompletion(
                id=answer_id,
                created=call.created,
                model=call.body.model,
                choices=[choice],
                usage=no_usage,
            )

        def chunk(index: int, piece: Piece) -> TextCompletion:
            return event(TextChoice(index, piece.text, _logprobs(call, piece.scored), piece.finish_reason))

        def closing() -> list[TextCompletion]:
            if not call.body.streams_usage:
                return []
            totals = usage(generation, call.body)
            return [
                TextCompletion(
                    id=answer_id, created=call.created, model=call.body.model, choices=[], usage=totals
                )
            ]

        opening = []
        if call.body.echo:
            opening = [
                event(TextChoice(index, self._echo(call, index), None, None))
                for index in range(len(generation.choices))
            ]
        await stream(generation, send, call.request_id, chunk, opening, closing)

    def _echo(self, call: Call[CompletionRequest], index: int) -> str:
        """Return the text of a choice's prompt when the call wants it, else nothing."""
        if not call.body.echo:
            return ""
        prompt = call.body.prompt[index // call.body.num_choices]
        return prompt if isinstance(prompt, str) else self._service.model.tokenizer.decode(prompt)


def _answer_id(call: Call[CompletionRequest]) -> str:
    return f"cmpl-{call.request_id}"


def _logprobs(call: Call[CompletionRequest], tokens: Iterable[ScoredToken]) -> TextLogprobs | None:
    if call.body.logprobs is None:
        return None
    logprobs = TextLogprobs([], [], [], [])
    for token in tokens:
        logprobs.tokens.append(token.chosen.text)
        logprobs.token_logprobs.append(token.chosen.logprob)
        logprobs.top_logprobs.append({other.text: other.logprob for other in (*token.top, token.chosen)})
        logprobs.text_offset.append(token.offset)
    return logprobs
