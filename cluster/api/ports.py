"""What the API needs from the rest of the cluster: protocols, their errors and the records they exchange.

`cluster.router.router.Router` is a RequestRouter, `cluster.metrics` brings the RequestRecorder, tests bring
fakes. All of it is called on the API process's event loop and must not block.
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from workers.protocol import FinishReason, RequestOutput, SubmitRequest


class NoReplicaError(Exception):
    """No replica can take a request now (none is ready). The API answers 503 with Retry-After."""

    def __init__(self, retry_after_s: float, reason: str) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s
        self.reason = reason


class OverloadedError(Exception):
    """Every queue is full. The API answers 429 with Retry-After."""

    def __init__(self, retry_after_s: float, reason: str = "all queues are full") -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s
        self.reason = reason


class RequestStream(Protocol):
    """One submitted request's outputs, in order.

    The first item comes as soon as the worker has queued the request (no tokens) or refused it
    (`rejected`); the last one carries a finish reason, and the iterator then ends. A replica that dies
    yields a last item with finish_reason `error`; it never just stops and never hangs.
    """

    def __aiter__(self) -> AsyncIterator[RequestOutput]: ...

    async def __anext__(self) -> RequestOutput: ...

    async def abort(self, finish_reason: FinishReason = "abort") -> None:
        """Tell the worker to end the request; the stream then ends with an output of that reason.

        Idempotent; no effect once finished.
        """

    async def aclose(self) -> None:
        """Release the stream; aborts when unfinished. Idempotent."""


class RequestRouter(Protocol):
    """Places requests on replicas."""

    async def submit(self, request: SubmitRequest) -> RequestStream:
        """Pick a replica and send. Raise NoReplicaError (503) or OverloadedError (429).

        When the awaiting task is cancelled, nothing is left behind on any replica.
        """

    def ready(self) -> str | None:
        """Return None when some replica takes work, else the reason why none does."""

    @property
    def max_context_len(self) -> int | None:
        """Tokens (prompt + generated) a replica holds for one request; None before the first Welcome."""


@dataclass(frozen=True)
class RequestSummary:
    """One ended request, for the metrics: a choice of an API call (n=2 makes two)."""

    finish_reason: FinishReason
    duration_s: float
    prompt_len: int
    generated_len: int
    cached_len: int


class RequestRecorder(Protocol):
    """Metrics of the API process (declared in cluster.metrics)."""

    def first_token(self, latency_s: float) -> None:
        """Count one time to first token, from the arrival of the HTTP request."""

    def next_tokens(self, latency_s: float, num_tokens: int) -> None:
        """Count the gap before one step's tokens: `latency_s` / `num_tokens`, observed `num_tokens` times."""

    def finished(self, summary: RequestSummary) -> None:
        """Count one ended request."""

    def answered(self, route: str, status: int) -> None:
        """Count one HTTP answer; `route` is the route's template, never the raw path."""

    def exposition(self) -> tuple[bytes, str]:
        """Return this process's metrics and their content type."""


@dataclass(frozen=True)
class ScrapeTarget:
    """One process that serves metrics, in the terms of Prometheus' http_sd."""

    address: str
    """host:port"""
    labels: dict[str, str] = field(default_factory=dict)


class ScrapeTargets(Protocol):
    """Lists every process of the cluster that serves metrics."""

    def __call__(self) -> Sequence[ScrapeTarget]:
        """Return the processes known now."""
