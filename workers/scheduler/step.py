"""Step: a plan that is on its way through the ranks, and the requests of its rows."""

from dataclasses import dataclass

from workers.plan import BatchPlan, PlanOp, RelocationVersion
from workers.scheduler.request import Request


@dataclass(frozen=True, slots=True)
class Step:
    """Row i of `plan` is `requests[i]`'s; void once that was closed more often than `num_closed[i]`."""

    plan: BatchPlan
    requests: list[Request]
    num_closed: list[int]

    def rows(self) -> list[Request | None]:
        """Return each row's request, None where the row is void."""
        return [
            request if request.num_closed == num_closed else None
            for request, num_closed in zip(self.requests, self.num_closed, strict=True)
        ]

    def rows_with_a_slot(self) -> list[Request | None]:
        """Return each row's request, None where it has no slot: for the test that shows more to be void."""
        return [request if request.slot is not None else None for request in self.requests]


def assemble(
    step: int,
    version: RelocationVersion,
    ops: list[PlanOp],
    planned: list[Request],
    draft_len: int = 0,
    draft_topk: int = 1,
) -> Step:
    """Write the plan of the requests' planned tokens, and count these as in flight.

    `draft_len` tokens are drafted for each row that is sampled, of a tree `draft_topk` times as many.

    Rows of one token come first, before all others those whose token is awaited: the only one that they lack.

    token_ids of a request   |-- num_computed --|-- num_in_flight --|-- num_planned --| ... |
                                                                     ^ start           ^ end
    sampled where nothing but drafts follows
    """
    awaited = [request for request in planned if request.num_awaited]
    single = [request for request in planned if request.num_planned == 1 and not request.num_awaited]
    longer = [request for request in planned if request.num_planned > 1]
    requests = awaited + single + longer
    slots = [request.slot for request in requests if request.slot is not None]
    starts = [request.num_computed + request.num_in_flight for request in requests]
    lens = [request.num_planned for request in requests]
    num_drafts = [request.num_verified for request in requests]
    sampled: list[int] = []
    token_ids: list[int] = []
    num_awaited = len(awaited)
    for row, (request, start, length) in enumerate(zip(requests, starts, lens, strict=True)):
        end = start + length - num_drafts[row]
        if row >= num_awaited:
            token_ids += request.token_ids[start:end]
        if end == len(request.token_ids) + request.num_awaited:
            sampled.append(row)
            request.num_awaited += 1
            request.num_drafts = draft_len * draft_topk
        request.num_in_flight += length
        request.num_planned = request.num_verified = 0
    plan = BatchPlan(
        step,
        version,
        ops,
        slots,
        starts,
        lens,
        token_ids,
        sampled,
        num_awaited,
        num_drafts if any(num_drafts) else [],
        draft_len,
    )
    return Step(plan, requests, [request.num_closed for request in requests])
