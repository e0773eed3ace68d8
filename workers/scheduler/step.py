"""Step: the plan that is on its way through the ranks, and the requests of its rows."""

from dataclasses import dataclass

from workers.plan import BatchPlan, PlanOp, RelocationVersion
from workers.scheduler.request import Request


@dataclass(frozen=True, slots=True)
class Step:
    """Row i of `plan` is `rows[i]`, unless that request was aborted meanwhile and has no slot any more."""

    plan: BatchPlan
    rows: list[Request]


def assemble(step: int, version: RelocationVersion, ops: list[PlanOp], requests: list[Request]) -> Step:
    """Write the plan of the requests' planned tokens, decodes first.

    token_ids of a request   |-- num_computed --|-- num_planned --| ... |
                                                 ^ start           ^ end; sampled where nothing follows
    """
    rows = [request for request in requests if request.num_planned == 1]
    rows += [request for request in requests if request.num_planned > 1]
    slots: list[int] = []
    token_ids: list[int] = []
    sampled: list[int] = []
    for index, request in enumerate(rows):
        assert request.slot is not None
        slots.append(request.slot)
        start, end = request.num_computed, request.num_computed + request.num_planned
        token_ids += request.token_ids[start:end]
        if end == len(request.token_ids):
            sampled.append(index)
    plan = BatchPlan(
        step=step,
        relocation_version=version,
        ops=ops,
        slots=slots,
        starts=[request.num_computed for request in rows],
        lens=[request.num_planned for request in rows],
        token_ids=token_ids,
        sampled=sampled,
    )
    return Step(plan, rows)
