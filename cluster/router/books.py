"""LoadBook: one replica's load as an API process knows it: its last report, and what was sent since.

Reports arrive in the replica's receiver thread and end leases there; leases begin on the event loop.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.router.ways import PageTimes
from workers.protocol import LoadReport, RequestId

REPORT_TTL_S = 1.0
"""Older reports are ignored."""
LEASE_S = 1.0
"""A request sent counts as load until the worker's answer, which comes with a report, or for so long."""


@dataclass(frozen=True)
class Load:
    """A replica's load for one decision."""

    num_prefill_tokens: int
    num_running: int
    num_waiting: int
    num_sent: int
    """Requests on their way there."""
    num_available_pages: int | None
    """None: no report to go by."""


@dataclass(frozen=True)
class _Lease:
    num_tokens: int
    until_s: float


class LoadBook:
    """Adds what this process has sent since the last report to that report."""

    def __init__(self) -> None:
        self._report: tuple[LoadReport, float] | None = None  # replaced whole: readers never see half of one
        self._leases: dict[RequestId, _Lease] = {}

    def report(self, load: LoadReport, now_s: float, answered: Sequence[RequestId] = ()) -> None:
        """Take a report (receiver thread); it counts the requests `answered` so far, their leases end."""
        self._report = (load, now_s)
        for request_id in answered:
            self._leases.pop(request_id, None)

    def clear(self) -> None:
        """Forget the report of a lost replica (receiver thread)."""
        self._report = None

    def lease(self, request_id: RequestId, num_tokens: int, now_s: float) -> None:
        """Count a request as sent, with so many tokens to prefill."""
        self._leases[request_id] = _Lease(num_tokens, now_s + LEASE_S)

    def release(self, request_id: RequestId) -> None:
        """Take a lease back: the request was not sent."""
        self._leases.pop(request_id, None)

    @property
    def page_times(self) -> PageTimes:
        """What copies of pages take there, as it told last, however long ago."""
        report = self._report
        return PageTimes() if report is None else PageTimes.measured(report[0])

    def load(self, now_s: float) -> Load:
        """Return report and leases together."""
        leases = list(self._leases.items())  # one step of the interpreter: the receiver thread ends leases
        for request_id, lease in leases:
            if lease.until_s <= now_s:
                self._leases.pop(request_id, None)
        live = [lease.num_tokens for _, lease in leases if lease.until_s > now_s]
        num_leased_tokens = sum(live)
        report, reported_s = self._report or (None, 0.0)
        if report is None or now_s - reported_s > REPORT_TTL_S:
            return Load(num_leased_tokens, 0, 0, len(live), None)
        return Load(
            num_prefill_tokens=report.num_prefill_tokens + num_leased_tokens,
            num_running=report.num_running,
            num_waiting=report.num_waiting,
            num_sent=len(live),
            num_available_pages=report.num_free_pages + report.num_cached_pages,
        )
