"""What a user is told when a call fails: OpenAI error bodies; the field, what was found, what is allowed."""

from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from starlette.responses import Response

from cluster.api.allowed import allowed, nearest

ErrorType = Literal[
    "invalid_request_error",
    "authentication_error",
    "permission_error",
    "not_found_error",
    "rate_limit_error",
    "server_error",
    "service_unavailable_error",
]

RETRY_AFTER_S = 1
"""Told to clients whose call met a full queue or a draining server without a better estimate."""

_TYPE_OF_STATUS: dict[int, ErrorType] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}
_MAX_SHOWN_CHARS = 64


class ErrorDetail(msgspec.Struct, frozen=True):
    """The `error` object of OpenAI's error bodies; `request_id` is ours."""

    message: str
    type: ErrorType
    param: str | None
    code: str | None
    request_id: str


class ErrorBody(msgspec.Struct, frozen=True):
    """A whole error body, or the data of an SSE error event."""

    error: ErrorDetail


class ApiError(Exception):
    """Ends a call with `status`. `param` names the request's field at fault, `code` is for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    def body(self, request_id: str) -> ErrorBody:
        """Return what the user reads."""
        kind = _TYPE_OF_STATUS.get(self.status, "invalid_request_error")
        return ErrorBody(ErrorDetail(self.message, kind, self.param, self.code, request_id))

    def response(self, request_id: str) -> Response:
        """Return the HTTP answer; 401, 429 and 503 carry the headers their status asks for."""
        headers = {}
        if self.retry_after_s is not None:
            headers["retry-after"] = str(max(1, round(self.retry_after_s)))
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return Response(
            msgspec.json.encode(self.body(request_id)),
            status_code=self.status,
            headers=headers,
            media_type="application/json",
        )


def bad_request(message: str, param: str | None = None, code: str | None = "invalid_value") -> ApiError:
    """Return a 400 about one field."""
    return ApiError(400, message, param=param, code=code)


def unsupported(param: str, what: str) -> ApiError:
    """Return a 400 for a feature of OpenAI's API that this server does not have."""
    return ApiError(400, f"'{param}': {what}", param=param, code="unsupported_parameter")


def internal_error() -> ApiError:
    """Return the 500 of a bug: the user gets no detail beyond the request id, the log has the rest."""
    return ApiError(
        500,
        "The server failed on this request; its log names the cause under the request id.",
        code="internal",
    )


def replica_failed(error: str | None) -> ApiError:
    """Return the 503 of a request whose replica died or failed while working on it."""
    cause = f": {error}" if error else ""
    return ApiError(
        503,
        f"The replica working on this request failed{cause}. The request may be sent again.",
        code="replica_failed",
        retry_after_s=RETRY_AFTER_S,
    )


def prompt_timeout(timeout_s: float) -> ApiError:
    """Return the 503 of a body or prompt that its threads did not get through in time."""
    return ApiError(
        503,
        f"The prompt was not prepared within {timeout_s:.0f} s. Send the request again later.",
        code="prompt_timeout",
        retry_after_s=RETRY_AFTER_S,
    )


def unknown_field(location: Sequence[int | str], known: Iterable[str]) -> ApiError:
    """Return the 400 about a field that is not in the schema, which has the `known` ones in its place."""
    param = field_path(location)
    meant = nearest(str(location[-1]), known)
    advice = f"did you mean `{meant}`?" if meant else "remove it."
    return ApiError(
        400,
        f"'{param}': this field is not known to the server; {advice}",
        param=param,
        code="unknown_parameter",
    )


def draining() -> ApiError:
    """Return the 503 of a server that is shutting down."""
    return ApiError(
        503,
        "The server is shutting down and takes no new requests.",
        code="draining",
        retry_after_s=RETRY_AFTER_S,
    )


def from_validation(error: ValidationError, schema: type[BaseModel]) -> ApiError:
    """Return the 400 for a request body that does not fit its schema, about its first fault.

    Unknown fields have been refused before.
    """
    fault: ErrorDetails = error.errors(include_url=False)[0]
    param = field_path(fault["loc"])
    expected = allowed(schema, fault["loc"])
    if fault["type"] == "missing":
        what = f" ({expected})" if expected else ""
        return ApiError(
            400, f"'{param}': this field is required{what}.", param=param, code="missing_required_parameter"
        )
    # A validator of ours says itself what is wrong; pydantic's own wording is not for users.
    problem = str(fault["ctx"]["error"]) if fault["type"] == "value_error" else f"must be {expected}"
    return bad_request(f"'{param}': {problem} (found {shown(fault['input'])}).", param)


def field_path(location: Sequence[int | str]) -> str:
    """Return the path of a field as a user writes it: `messages[0].content`; long names are cut."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
            continue
        name = part if len(part) <= _MAX_SHOWN_CHARS else f"{part[:_MAX_SHOWN_CHARS]}..."
        path += f".{name}" if path else name
    return path


def shown(value: object) -> str:
    """Return a short description of a user's value: scalars as they are, the rest by kind and size."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        text = repr(value) if not isinstance(value, int) or value.bit_length() < 256 else "a huge integer"
        return text[:_MAX_SHOWN_CHARS]
    if isinstance(value, str):
        if not value:
            return "an empty string"
        return f"'{value}'" if len(value) <= _MAX_SHOWN_CHARS else f"a string of {len(value)} characters"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}" if value else "an empty list"
    return "an object" if isinstance(value, dict) else type(value).__name__
