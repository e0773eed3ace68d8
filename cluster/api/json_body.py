"""Reads a request's body: bounded in bytes before it is held, strict JSON after."""

import asyncio
import re
from collections.abc import Callable
from functools import cache
from typing import TypeVar

import msgspec
from starlette.requests import Request

from cluster.api.errors import ApiError, bad_request, prompt_timeout, shown, unknown_field
from cluster.api.schemas import UNSUPPORTED, SamplingFields
from cluster.api.text_threads import PROMPT_TIMEOUT_S, TextThreads

MAX_BODY_BYTES = 16 * 1024 * 1024
_BODY_TIMEOUT_S = 60.0
_INLINE_BYTES = 8 * 1024
"""Bodies up to this size are parsed on the event loop (2 ms at worst); larger ones in a prompts' thread."""

_UNKNOWN_FIELD = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
"""What msgspec says."""

Body = TypeVar("Body", bound=SamplingFields)


async def read_body(request: Request, schema: type[Body], threads: TextThreads) -> Body:
    """Return the checked body of a call.

    Raises ApiError as `read_json_bytes` does, 503 when the prompts' threads are too busy to parse it, 400 for
    what is not JSON or does not fit the schema; ClientDisconnect when the client leaves while sending.
    """
    raw = await read_json_bytes(request)
    parse = _parser(schema)
    if len(raw) <= _INLINE_BYTES:
        return parse(raw)
    try:
        return await threads.run_prompt(lambda: parse(raw), PROMPT_TIMEOUT_S)
    except TimeoutError:
        raise prompt_timeout(PROMPT_TIMEOUT_S) from None


async def read_json_bytes(request: Request) -> bytes:
    """Return the body of a call that says it is JSON, unparsed.

    Raises ApiError: 415 for another media type, 413 for a body over MAX_BODY_BYTES (refused by its
    Content-Length, or as soon as that many bytes came), 408 when it does not arrive in time. Raises
    ClientDisconnect when the client leaves while sending.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise ApiError(
            415,
            f"'Content-Type': application/json is required (found {shown(media_type)}).",
            param="Content-Type",
            code="unsupported_media_type",
        )
    try:
        async with asyncio.timeout(_BODY_TIMEOUT_S):
            return await _read_bounded(request)
    except TimeoutError:
        raise ApiError(
            408, f"The request's body did not arrive within {_BODY_TIMEOUT_S:.0f} s.", code="body_timeout"
        ) from None


async def _read_bounded(request: Request) -> bytes:
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > MAX_BODY_BYTES:
        raise _too_large()
    chunks: list[bytes] = []
    num_bytes = 0
    async for chunk in request.stream():
        num_bytes += len(chunk)
        if num_bytes > MAX_BODY_BYTES:
            raise _too_large()
        chunks.append(chunk)
    return b"".join(chunks)


@cache
def _outline(schema: type[SamplingFields]) -> type[msgspec.Struct]:
    """Return a record of the fields a body may have, none looked into: decoding stops at the first other key.

    A million unknown keys would otherwise become objects first, holding the interpreter for most of a second.
    """
    names = schema.model_fields.keys() | UNSUPPORTED.keys()
    fields = [(name, msgspec.Raw, msgspec.Raw()) for name in sorted(names)]
    return msgspec.defstruct(f"{schema.__name__}Outline", fields, forbid_unknown_fields=True)


def _refuse_unknown(raw: bytes, schema: type[SamplingFields]) -> None:
    try:
        msgspec.json.decode(raw, type=_outline(schema))
    except msgspec.ValidationError as error:
        if (unknown := _UNKNOWN_FIELD.match(str(error))) is not None:
            raise unknown_field((unknown[1],), schema.model_fields) from None


def _parser(schema: type[Body]) -> Callable[[bytes], Body]:
    def parse(raw: bytes) -> Body:
        try:
            _refuse_unknown(raw, schema)
            # msgspec is strict: no NaN, no infinities, no lone surrogates, no invalid UTF-8.
            decoded = msgspec.json.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise bad_request(
                f"The body is not valid JSON (RFC 8259, UTF-8): {error}.", None, "invalid_json"
            ) from None
        except RecursionError:
            raise bad_request("The body is nested too deeply.", None, "invalid_json") from None
        if not isinstance(decoded, dict):
            raise bad_request(
                f"The body must be a JSON object (found {shown(decoded)}).", None, "invalid_json"
            )
        return schema.from_json(decoded)

    return parse


def _too_large() -> ApiError:
    return ApiError(
        413, f"The body is too large: at most {MAX_BODY_BYTES} bytes are allowed.", code="body_too_large"
    )
