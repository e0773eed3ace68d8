"""Server-sent events over ASGI: one chunk an event, and a client that stops reading counts as gone."""

import asyncio

import msgspec
from starlette.requests import ClientDisconnect
from starlette.types import Send

SEND_TIMEOUT_S = 120.0
"""A client that takes nothing for so long, with its buffers full, has hung up."""

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect the events
]
_DONE = b"data: [DONE]\n\n"


class EventStream:
    """Writes one response. Each method raises ClientDisconnect when the client does not read."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._encoder = msgspec.json.Encoder()

    async def open(self) -> None:
        """Send status 200 and the headers."""
        await self._send({"type": "http.response.start", "status": 200, "headers": _HEADERS})

    async def event(self, record: msgspec.Struct) -> None:
        """Send one record as one event."""
        await self._body(b"data: " + self._encoder.encode(record) + b"\n\n", more=True)

    async def close(self) -> None:
        """Send the end mark and end the response."""
        await self._body(_DONE, more=False)

    async def _body(self, octets: bytes, *, more: bool) -> None:
        try:
            async with asyncio.timeout(SEND_TIMEOUT_S):
                await self._send({"type": "http.response.body", "body": octets, "more_body": more})
        except TimeoutError:
            raise ClientDisconnect from None
