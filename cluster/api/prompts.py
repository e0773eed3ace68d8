"""From a checked body to requests for the workers: prompt text to tokens, and what only the model can check.

Everything here is pure but slow on long prompts; routes run it in the prompts' threads.
"""

from dataclasses import dataclass

from cluster.api.chat_template import ChatTemplate
from cluster.api.errors import ApiError, bad_request
from cluster.api.schemas import (
    ChatCompletionRequest,
    CompletionRequest,
    Message,
    Prompt,
    SamplingFields,
)
from cluster.api.tokenizer import Tokenizer
from workers.card import ModelCard
from workers.protocol import SamplingParams

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default for `/v1/completions`; chats run to the end of the context by default."""
_SEED_MODULUS = 2**63


@dataclass(frozen=True)
class ServedModel:
    """The model as the API knows it: its text side and its limits."""

    name: str
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    context_len: int
    vocab_size: int
    end_token_ids: frozenset[int]

    @staticmethod
    def from_card(card: ModelCard, name: str | None) -> "ServedModel":
        """Build the tokenizer and compile the template (about a second); `name` None: the card's.

        Raise UnsupportedTokenizerError or ChatTemplateError when the model's files cannot be used.
        """
        template = None
        if card.chat_template is not None:
            template = ChatTemplate(card.chat_template, dict(card.special_tokens))
        return ServedModel(
            name=name or card.name,
            tokenizer=Tokenizer(card.tokenizer_json),
            chat_template=template,
            context_len=card.context_len,
            vocab_size=card.vocab_size,
            end_token_ids=frozenset(card.end_token_ids),
        )


@dataclass(frozen=True)
class Limits:
    """What a call is checked against: the model's vocabulary, the tokens a replica holds for a request."""

    context_len: int
    vocab_size: int


def chat_prompt(model: ServedModel, messages: list[Message], limits: Limits) -> list[int]:
    """Return the tokens of a chat; raise ApiError (400) when the template refuses it or it is too long."""
    if model.chat_template is None:
        raise bad_request(
            f"The model '{model.name}' has no chat template; use /v1/completions.",
            "messages",
            "no_chat_template",
        )
    text = model.chat_template.render(messages)
    # The template writes the special tokens, the first one included.
    return _encoded(model, text, limits, "messages", add_special_tokens=False)


def completion_prompt(model: ServedModel, prompt: Prompt, limits: Limits) -> list[int]:
    """Return the tokens of one prompt; raise ApiError (400) when it is empty, too long or not the model's."""
    if isinstance(prompt, str):
        token_ids = _encoded(model, prompt, limits, "prompt", add_special_tokens=True)
    else:
        token_ids = list(prompt)
        _check_token_ids(token_ids, limits, "prompt")
    if not token_ids:
        raise bad_request("'prompt': at least one token is required (found none).", "prompt")
    _check_prompt_len(len(token_ids), "", limits, "prompt")
    return token_ids


def sampling_params(
    body: ChatCompletionRequest | CompletionRequest, prompt_len: int, choice_index: int, limits: Limits
) -> SamplingParams:
    """Return how one choice is sampled; choice i of a seeded call gets seed + i."""
    max_tokens = _max_tokens(body, limits.context_len - prompt_len)
    _check_lengths(body, prompt_len, max_tokens, limits)
    _check_token_ids([token_id for token_id, _ in body.logit_bias or ()], limits, "logit_bias")
    _check_token_ids(list(body.stop_token_ids or ()), limits, "stop_token_ids")
    return SamplingParams(
        temperature=_given(body.temperature, 1.0),
        top_k=body.top_k,
        top_p=_given(body.top_p, 1.0),
        min_p=_given(body.min_p, 0.0),
        presence_penalty=_given(body.presence_penalty, 0.0),
        frequency_penalty=_given(body.frequency_penalty, 0.0),
        repetition_penalty=_given(body.repetition_penalty, 1.0),
        logit_bias=list(body.logit_bias or ()),
        num_logprobs=_num_logprobs(body),
        max_tokens=max_tokens,
        min_tokens=body.min_tokens or 0,
        ignore_eos=bool(body.ignore_eos),
        stop_token_ids=list(body.stop_token_ids or ()),
        seed=None if body.seed is None else (body.seed + choice_index) % _SEED_MODULUS,
    )


def _given(value: float | None, default: float) -> float:
    return default if value is None else value


def _max_tokens(body: ChatCompletionRequest | CompletionRequest, room: int) -> int | None:
    if isinstance(body, ChatCompletionRequest):
        return body.max_completion_tokens or body.max_tokens
    return body.max_tokens or min(DEFAULT_COMPLETION_TOKENS, room)


def _num_logprobs(body: ChatCompletionRequest | CompletionRequest) -> int | None:
    if isinstance(body, CompletionRequest):
        return body.logprobs
    return (body.top_logprobs or 0) if body.logprobs else None


def _encoded(
    model: ServedModel, text: str, limits: Limits, param: str, *, add_special_tokens: bool
) -> list[int]:
    at_least = model.tokenizer.min_token_count(text)
    _check_prompt_len(at_least, "at least ", limits, param)  # spares the encoding of 16 MB
    token_ids = model.tokenizer.encode(text, add_special_tokens=add_special_tokens)
    _check_prompt_len(len(token_ids), "", limits, param)
    return token_ids


def _check_prompt_len(prompt_len: int, at_least: str, limits: Limits, param: str) -> None:
    if prompt_len >= limits.context_len:
        raise ApiError(
            400,
            f"'{param}': the context holds {limits.context_len} tokens, prompt and answer together, and the "
            f"prompt alone has {at_least}{prompt_len}; shorten it to at most {limits.context_len - 1}.",
            param=param,
            code="context_length_exceeded",
        )


def _check_lengths(body: SamplingFields, prompt_len: int, max_tokens: int | None, limits: Limits) -> None:
    room = limits.context_len - prompt_len
    field = "max_tokens"
    if isinstance(body, ChatCompletionRequest) and body.max_completion_tokens is not None:
        field = "max_completion_tokens"
    if max_tokens is not None and max_tokens > room:
        raise ApiError(
            400,
            f"'{field}': the context holds {limits.context_len} tokens and the prompt has {prompt_len}, "
            f"so at most {room} are allowed (found {max_tokens}).",
            param=field,
            code="context_length_exceeded",
        )
    most = room if max_tokens is None else max_tokens
    if (body.min_tokens or 0) > most:
        raise bad_request(
            f"'min_tokens': at most {most}, the tokens this call may generate, are allowed "
            f"(found {body.min_tokens}).",
            "min_tokens",
        )


def _check_token_ids(token_ids: list[int], limits: Limits, param: str) -> None:
    for token_id in token_ids:
        if token_id >= limits.vocab_size:
            raise bad_request(
                f"'{param}': token ids from 0 to {limits.vocab_size - 1} are allowed (found {token_id}).",
                param,
            )
