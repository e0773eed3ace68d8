"""What calls answer: OpenAI's objects as records, whole and in chunks."""

from collections.abc import Sequence
from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from workers.protocol import FinishReason


class CachedTokens(msgspec.Struct, frozen=True):
    """Of the prompt's tokens, those whose KV was found, not computed."""

    cached_tokens: int


class DraftedTokens(msgspec.Struct, frozen=True):
    """What a draft model guessed: those among the completion's tokens, and those that were not to be."""

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Usage(msgspec.Struct, frozen=True):
    """Tokens of a call; a prompt with n choices counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: DraftedTokens | UnsetType = UNSET
    """Where the call asked for it."""


class TopLogprob(msgspec.Struct, frozen=True):
    """One of a place's most likely tokens."""

    token: str
    logprob: float
    bytes: list[int]


class ContentLogprob(msgspec.Struct, frozen=True):
    """One generated token of a chat."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """Log probabilities of a chat's answer, or of a chunk of it."""

    content: list[ContentLogprob]
    refusal: None = None


class TextLogprobs(msgspec.Struct, frozen=True):
    """Log probabilities of a completion; `text_offset` counts characters from the start of its text."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class AssistantMessage(msgspec.Struct, frozen=True):
    """A chat's answer."""

    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class ChatChoice(msgspec.Struct, frozen=True):
    """One of a chat's n answers."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(msgspec.Struct, frozen=True):
    """What a chunk adds to the message."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True):
    """What a chunk adds to one choice."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatChunk(msgspec.Struct, frozen=True, kw_only=True):
    """One event of a chat's stream. `usage` is there, null but in the last, when the call asked for it."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET


class TextChoice(msgspec.Struct, frozen=True):
    """One completion, or what a chunk adds to it."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None


class TextCompletion(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of `/v1/completions`, and each event of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | UnsetType | None = UNSET


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of `/v1/models`."""

    id: str
    object: Literal["model"] = "model"
    created: int
    max_model_len: int
    owned_by: Literal["eyrie"] = "eyrie"


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of `/v1/models`."""

    object: Literal["list"] = "list"
    data: list[Model]


class Status(msgspec.Struct, frozen=True):
    """Answer of `/health` and `/ready`."""

    status: Literal["ok", "ready", "not ready"]
    reason: str | UnsetType = UNSET


class TargetGroup(msgspec.Struct, frozen=True):
    """One entry of Prometheus' http_sd form."""

    targets: Sequence[str]
    labels: dict[str, str]
