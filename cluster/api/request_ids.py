"""Request ids: made or accepted at the door, kept in a context variable, put into every log line.

Used in the API process's event loop; the context variable follows each request's tasks by itself.
"""

import itertools
import logging
import re
from contextvars import ContextVar

from starlette.types import Scope

from cluster.api.errors import bad_request
from workers.protocol import RequestId

HEADER = "x-request-id"
NO_REQUEST = "-"

_ACCEPTED = re.compile(r"[A-Za-z0-9._:\-]{1,128}", re.ASCII)

current_request_id: ContextVar[str] = ContextVar("current_request_id", default=NO_REQUEST)
"""Id of the HTTP request that the running task serves, `-` outside of one."""


class RequestIds:
    """Makes ids that no other process, and no other start of this one, makes.

    `boot_id` is random and new on each start (secrets.token_hex(8)).
    """

    def __init__(self, boot_id: str) -> None:
        self._boot_id = boot_id
        self._counter = itertools.count(1)

    def make(self) -> str:
        """Return a new id."""
        return f"req-{self._boot_id}-{next(self._counter):x}"

    def for_choice(self, request_id: str, index: int) -> RequestId:
        """Return the id under which a worker knows one choice of a call.

        It starts with the call's id, so that logs on both sides meet, and ends in one of ours, since two
        clients may send the same x-request-id.
        """
        return RequestId(f"{request_id}/{self._boot_id}-{next(self._counter):x}.{index}")


def header(scope: Scope, name: bytes) -> bytes | None:
    """Return a request's header, as the bytes that came; `name` in lower case."""
    for key, value in scope["headers"]:
        if key == name:
            return bytes(value)
    return None


def accepted(value: str) -> str:
    """Return a client's x-request-id unchanged; raise ApiError (400) when it is not fit for logs."""
    if _ACCEPTED.fullmatch(value) is None:
        raise bad_request(
            f"'{HEADER}': 1 to 128 letters, digits and . _ : - are allowed "
            f"(found {len(value)} characters, or others than these).",
            HEADER,
        )
    return value


class RequestIdFilter(logging.Filter):
    """Gives every record `request_id`, so that a format can name it: attach it to handlers."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Never drop a record."""
        record.request_id = current_request_id.get()
        return True
