"""Bounds what a client may send before its request reaches the application: bytes of headers, time for them.

uvicorn bounds neither, and both come before any key is checked. The ApiServer gives this class to uvicorn; it
runs on the event loop, one object for each connection.
"""

import asyncio
from http import HTTPStatus
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from cluster.api.errors import ApiError


class BoundedHttpProtocol(HttpToolsProtocol):
    """Answers 431 to headers (or trailers) over MAX_HEAD_BYTES, 408 to a head not whole in HEAD_TIMEOUT_S."""

    MAX_HEAD_BYTES = 64 * 1024
    HEAD_TIMEOUT_S = 10.0

    def __init__(self, *args: Any, **fields: Any) -> None:
        super().__init__(*args, **fields)
        self._head_bytes = 0
        self._silent_bytes = 0
        """Fed since the parser last told anything: a header's beginning, held inside the parser."""
        self._parser_told = False
        self._awaits_head = True
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Give the first request's head its time."""
        super().connection_made(transport)
        self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the timer with the connection."""
        self._stop_head_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse; then see whether what is unfinished is still within bounds."""
        self._parser_told = False
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._parser_told:
            self._silent_bytes = 0
            return
        self._silent_bytes += len(data)
        if self._head_bytes + self._silent_bytes > self.MAX_HEAD_BYTES:
            self._refuse_large_head()
        elif self._awaits_head:
            # Empty lines between requests end uvicorn's keep-alive timer but begin no request.
            self._start_head_timer()

    def on_message_begin(self) -> None:
        """Count a new head from zero."""
        self._parser_told = True
        self._head_bytes = 0
        self._start_head_timer()
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Count a piece of the URL."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count a header, or a trailer."""
        self._count(len(name) + len(value) + len(": \r\n"))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is whole in time."""
        self._parser_told = True
        self._awaits_head = False
        self._stop_head_timer()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Leave bodies to the application, which bounds them."""
        self._parser_told = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Expect another head, whose time begins with its first byte."""
        self._parser_told = True
        self._awaits_head = True
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Give a head that began behind the answer its whole time: reading may have been paused until now."""
        super().on_response_complete()
        if self._head_timer is not None:
            self._stop_head_timer()
            self._start_head_timer()

    def send_400_response(self, msg: str) -> None:
        """Answer what the parser could not take; a head that grew too large is one such case."""
        if self._head_bytes > self.MAX_HEAD_BYTES:
            self._refuse_large_head()
        else:
            super().send_400_response(msg)

    def _count(self, num_bytes: int) -> None:
        self._parser_told = True
        self._head_bytes += num_bytes
        if self._head_bytes > self.MAX_HEAD_BYTES:
            # Raised into the parser, which stops there and has `send_400_response` called.
            raise ValueError("the head is too large")

    def _start_head_timer(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.HEAD_TIMEOUT_S, self._head_timed_out)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_timed_out(self) -> None:
        self._head_timer = None
        if self._answers:
            # Reading may be paused behind the request that runs, so the rest cannot come yet.
            self._start_head_timer()
            return
        self._refuse(
            ApiError(
                408,
                f"The request's head did not arrive within {self.HEAD_TIMEOUT_S:g} s.",
                code="head_timeout",
            )
        )

    def _refuse_large_head(self) -> None:
        self._refuse(
            ApiError(
                431,
                f"The request's headers are too large: at most {self.MAX_HEAD_BYTES} bytes are allowed.",
                code="headers_too_large",
            )
        )

    @property
    def _answers(self) -> bool:
        return bool(self.pipeline) or (self.cycle is not None and not self.cycle.response_complete)

    def _refuse(self, error: ApiError) -> None:
        """Close, with an answer unless that would land inside another one."""
        if self.transport.is_closing():
            return
        if not self._answers:
            body = msgspec.json.encode(error.body(request_id=""))
            head = (
                f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\n"
                f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.transport.close()
