"""The bodies of `/v1/chat/completions` and `/v1/completions`: every field, its type and its range.

What depends on the model (vocabulary, context length) is checked later, in cluster.api.prompts.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
)

from cluster.api.errors import bad_request, from_validation, unknown_field, unsupported

MAX_CHOICES = 128
"""Sequences one call may ask for: n times its prompts."""
MAX_STOP_STRINGS = 4
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIAS = 300
MAX_MESSAGES = 4096
MAX_CHAT_LOGPROBS = 20
MAX_COMPLETION_LOGPROBS = 5
MAX_CACHE_SALT_CHARS = 256
LAST_PRIORITY = 100
"""Clients may step back from 0, everyone's default, never ahead of it: others would starve."""

_TOKEN_ID = re.compile(r"[0-9]{1,10}", re.ASCII)

Prompt = str | tuple[int, ...]
"""Text, or token ids as they are."""


def _stops(value: object) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list):
        raise ValueError("must be a string or a list of strings")
    if len(items) > MAX_STOP_STRINGS:
        raise ValueError(f"must hold at most {MAX_STOP_STRINGS} strings")
    if not all(isinstance(item, str) for item in items):
        raise ValueError("must be a string or a list of strings")
    if not all(0 < len(item) <= MAX_STOP_CHARS for item in items):
        raise ValueError(f"must hold strings of 1 to {MAX_STOP_CHARS} characters")
    return tuple(items)


def _logit_bias(value: object) -> tuple[tuple[int, float], ...]:
    if not isinstance(value, Mapping):
        raise ValueError("must be an object from token ids (as strings) to numbers")
    if len(value) > MAX_LOGIT_BIAS:
        raise ValueError(f"must hold at most {MAX_LOGIT_BIAS} entries")
    biases = []
    for key, bias in value.items():
        if _TOKEN_ID.fullmatch(key) is None:
            raise ValueError("must have token ids, in decimal digits, as keys")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise ValueError("must have numbers from -100 to 100 as values")
        biases.append((int(key), float(bias)))
    return tuple(biases)


def _stop_token_ids(value: object) -> tuple[int, ...]:
    if isinstance(value, list) and len(value) > MAX_STOP_TOKEN_IDS:
        raise ValueError(f"must hold at most {MAX_STOP_TOKEN_IDS} ids")
    if not isinstance(value, list) or not _are_token_ids(value):
        raise ValueError("must be a list of token ids (integers of 0 or more)")
    return tuple(value)


def _prompts(value: object) -> tuple[Prompt, ...]:
    shapes = "must be a string, a list of strings, a list of token ids or a list of such lists"
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list):
        raise ValueError(shapes)
    if not value:
        raise ValueError("must hold at least one prompt")
    if isinstance(value[0], int):
        if not _are_token_ids(value):
            raise ValueError(f"{shapes}; token ids are integers of 0 or more")
        return (tuple(value),)
    if len(value) > MAX_CHOICES:
        raise ValueError(f"must hold at most {MAX_CHOICES} prompts")
    if all(isinstance(item, str) for item in value):
        return tuple(value)
    if not all(isinstance(item, list) and _are_token_ids(item) for item in value):
        raise ValueError(f"{shapes}; token ids are integers of 0 or more")
    return tuple(tuple(item) for item in value)


def _are_token_ids(items: list[Any]) -> bool:
    return all(type(item) is int and 0 <= item < 2**31 for item in items)


def _content(value: object) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise ValueError("must be a string or a list of parts of type 'text'")
    texts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise ValueError("must have parts of type 'text' only; this model reads no other")
        if not isinstance(part.get("text"), str) or len(part) != 2:
            raise ValueError("must have parts with the fields 'type' and 'text' (a string) only")
        texts.append(part["text"])
    return "".join(texts)


def _priority(value: object) -> int:
    if type(value) is not int or not 0 <= value <= LAST_PRIORITY:
        raise ValueError(f"must be an integer from 0 (first) to {LAST_PRIORITY}")
    return value


def _cache_salt(value: object) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= MAX_CACHE_SALT_CHARS:
        raise ValueError(f"must be a string of 1 to {MAX_CACHE_SALT_CHARS} characters")
    return value


def _ignored(value: object) -> None:
    """Accept anything: OpenAI's clients send it and it changes nothing about the answer."""


Ignored = Annotated[None, PlainValidator(_ignored)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @classmethod
    def refuse_unknown(cls, decoded: object, *location: int | str) -> None:
        """Raise ApiError (400) about the first unknown key; pydantic would collect every one of them."""
        if isinstance(decoded, dict):
            for key in decoded:
                if key not in cls.model_fields:
                    raise unknown_field((*location, key), cls.model_fields)


class StreamOptions(_Strict):
    """What a stream carries beside its chunks."""

    include_usage: bool = False
    include_obfuscation: Ignored = None


class SamplingFields(_Strict):
    """Fields that chat and completions share. OpenAI's first, then ours."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[tuple[tuple[int, float], ...], PlainValidator(_logit_bias)] | None = None
    stop: Annotated[tuple[str, ...], PlainValidator(_stops)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None

    top_k: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[tuple[int, ...], PlainValidator(_stop_token_ids)] | None = None
    priority: Annotated[int, PlainValidator(_priority)] | None = None
    cache_salt: Annotated[str, PlainValidator(_cache_salt)] | None = None
    """Only requests with the same one, of the same API key, share cached pages."""
    usage_details: bool | None = None
    """The usage tells what became of tokens that a draft model guessed."""

    user: Ignored = None
    metadata: Ignored = None
    store: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None

    @classmethod
    def from_json(cls, decoded: dict[str, object]) -> Self:
        """Return the checked body; raise ApiError (400) about the first fault.

        Features not there yet are told apart from fields nobody knows.
        """
        for field, (harmless, refusal) in UNSUPPORTED.items():
            if field in decoded and decoded.pop(field) not in harmless:
                raise unsupported(field, refusal)
        cls.refuse_unknown(decoded)
        StreamOptions.refuse_unknown(decoded.get("stream_options"), "stream_options")
        cls.refuse_unknown_in_lists(decoded)
        try:
            body = cls.model_validate(decoded)
        except ValidationError as error:
            raise from_validation(error, cls) from None
        body.check_fields_agree()
        return body

    @classmethod
    def refuse_unknown_in_lists(cls, decoded: dict[str, object]) -> None:
        """Raise ApiError (400) about the first unknown key of a list's items, where a body has such lists."""

    def check_fields_agree(self) -> None:
        """Raise ApiError (400) for fields that are fine alone but not together."""
        if self.stream_options is not None and not self.stream:
            raise bad_request("'stream_options': allowed only with 'stream': true.", "stream_options")
        if self.usage_details and self.stream and not self.streams_usage:
            raise bad_request(
                "'usage_details': allowed in a stream only with 'stream_options': {'include_usage': true}.",
                "usage_details",
            )

    @property
    def num_choices(self) -> int:
        """Return n, 1 by default."""
        return self.n or 1

    @property
    def streams_usage(self) -> bool:
        """The stream ends with a chunk that carries the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class Message(_Strict):
    """One message of a chat. What answers carry beside role and content may come back as null."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_content)]
    name: str | None = None
    refusal: None = None
    audio: None = None
    tool_calls: None = None
    function_call: None = None
    annotations: Ignored = None


class ChatCompletionRequest(SamplingFields):
    """Body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_CHAT_LOGPROBS)] | None = None
    parallel_tool_calls: Ignored = None

    @classmethod
    def refuse_unknown_in_lists(cls, decoded: dict[str, object]) -> None:
        """Raise ApiError (400) about the first unknown key of a message."""
        messages = decoded.get("messages")
        if isinstance(messages, list):
            for index, message in enumerate(messages[: MAX_MESSAGES + 1]):
                Message.refuse_unknown(message, "messages", index)

    def check_fields_agree(self) -> None:
        """Raise ApiError (400) for fields that are fine alone but not together."""
        super().check_fields_agree()
        if self.top_logprobs is not None and not self.logprobs:
            raise bad_request("'top_logprobs': allowed only with 'logprobs': true.", "top_logprobs")
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise bad_request(
                f"'max_tokens' ({both[0]}) and 'max_completion_tokens' ({both[1]}) differ; send one of them.",
                "max_tokens",
            )


class CompletionRequest(SamplingFields):
    """Body of `/v1/completions`."""

    prompt: Annotated[tuple[Prompt, ...], PlainValidator(_prompts)]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_COMPLETION_LOGPROBS)] | None = None
    suffix: None = None
    best_of: Literal[1] | None = None

    def check_fields_agree(self) -> None:
        """Raise ApiError (400) for fields that are fine alone but not together."""
        super().check_fields_agree()
        if self.echo and self.logprobs is not None:
            raise unsupported(
                "logprobs", "logprobs of the prompt are not supported; leave out echo or logprobs."
            )
        num_choices = self.num_choices * len(self.prompt)
        if num_choices > MAX_CHOICES:
            raise bad_request(
                f"'n': n times the number of prompts may be at most {MAX_CHOICES} (found {num_choices}).", "n"
            )


UNSUPPORTED: Mapping[str, tuple[tuple[object, ...], str]] = {
    "tools": ((None, []), "tool calls are not supported"),
    "tool_choice": ((None, "none"), "tool calls are not supported; only 'none' is allowed"),
    "functions": ((None, []), "function calls are not supported"),
    "function_call": ((None, "none"), "function calls are not supported; only 'none' is allowed"),
    "response_format": ((None, {"type": "text"}), "only {'type': 'text'} is supported"),
    "modalities": ((None, ["text"]), "only ['text'] is supported"),
    "audio": ((None,), "audio is not supported"),
    "prediction": ((None,), "predicted outputs are not supported"),
    "web_search_options": ((None,), "web search is not supported"),
    "reasoning_effort": ((None,), "reasoning effort is not supported"),
    "verbosity": ((None,), "verbosity is not supported"),
}
"""Features not there yet: the values that ask for nothing, and what to say to the others."""
