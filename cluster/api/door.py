"""The outermost ASGI layer: each request gets its id, its log line, its count and, always, an answer."""

import logging

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.api.errors import ApiError, internal_error
from cluster.api.failure_log import log_failure
from cluster.api.request_ids import HEADER, accepted, current_request_id, header
from cluster.api.routes import PROBES, ROUTE_KEY
from cluster.api.service import Service

logger = logging.getLogger(__name__)

CLIENT_GONE = 499
"""nginx's status for a client that hung up before its answer; for logs and counts only."""


class Door:
    """Wraps the application."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; raise only to make the server cut a half-sent answer's connection."""
        assert scope["type"] == "http", "uvicorn runs with lifespan and websockets off"
        request_id = self._service.request_ids.make()
        refusal: ApiError | None = None
        if (offered := header(scope, HEADER.encode())) is not None:
            try:
                request_id = accepted(offered.decode("latin-1"))
            except ApiError as error:
                refusal = error
        token = current_request_id.set(request_id)
        try:
            await self._answer(scope, receive, send, request_id, refusal)
        finally:
            current_request_id.reset(token)

    async def _answer(
        self, scope: Scope, receive: Receive, send: Send, request_id: str, refusal: ApiError | None
    ) -> None:
        arrival_s = self._service.clock()
        status: int | None = None

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message.get("headers", ()), (HEADER.encode(), request_id.encode())]
                message = {**message, "headers": headers}
            await send(message)

        try:
            if refusal is not None:
                raise refusal
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            status = CLIENT_GONE
        except ApiError as error:
            assert status is None, "an ApiError ends a call before its answer begins"
            await error.response(request_id)(scope, receive, send_with_id)
        # The top of the request: nothing above could tell the user anything.
        except Exception as error:
            log_failure(logger, "request failed", error)
            if status is None:
                await internal_error().response(request_id)(scope, receive, send_with_id)
            else:
                raise ConnectionAbortedError(
                    "the answer broke off; the connection must not look whole"
                ) from None
        finally:
            route = scope.get(ROUTE_KEY, "none")
            self._service.recorder.answered(route, status or CLIENT_GONE)
            logger.log(
                logging.DEBUG if route in PROBES else logging.INFO,
                "answered",
                extra={
                    "route": route,
                    "status": status or CLIENT_GONE,
                    "duration_s": round(self._service.clock() - arrival_s, 4),
                },
            )
