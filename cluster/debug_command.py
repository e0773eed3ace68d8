"""`eyrie debug`: shows what a failed rank left. Torch-free; it needs the file alone."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from workers.dump_record import CrashDump, DumpedOp, DumpedPlan, DumpError, read_dump

debug_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="What a failure has left.")

FAILURE_EXIT_CODE = 1
MAX_ROWS = 40
"""Of a table, the newest or the first; the file has all."""
_MIN_WIDTH = 140
"""Of what is printed into a file or a pipe."""


@debug_app.callback()
def debug() -> None:
    """Show what a failure has left."""


@debug_app.command("dump")
def dump(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="As the rank's log line names it.")],
    step: Annotated[
        int | None, typer.Option("--step", metavar="N", help="Show the plan of this step in full instead.")
    ] = None,
) -> None:
    """Show a crash dump: the error, versions, counters, the last plans, moves and pages."""
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console = Console(markup=False, highlight=False, width=_MIN_WIDTH)
    try:
        found = read_dump(file)
    except OSError as error:
        _fail(f"cannot read {file}: {error.strerror}")
    except DumpError as error:
        _fail(str(error))
    if step is None:
        _show(console, found)
        return
    plans = {plan.step: plan for plan in found.plans}
    if step not in plans:
        _fail(
            f"--step is {step}; {file} has the plans of steps {min(plans)} to {max(plans)}"
            if plans
            else f"{file} has no plan"
        )
    _show_plan(console, plans[step])


def _show(console: Console, found: CrashDump) -> None:
    console.print(
        _pairs(
            f"{found.replica} rank {found.rank}, {found.written_at} UTC",
            {
                "step": found.step,
                "relocation version": found.relocation_version,
                "incarnation": found.incarnation,
                "completed steps by rank": found.completed_steps,
                **found.versions,
            },
        )
    )
    console.print(Text(found.error, style="bold red"))
    console.print(Text(found.traceback.rstrip()))
    console.print(_pairs("steps by how they ran", found.graph_steps))
    if found.eager_steps:
        console.print(_pairs("eager steps by why", found.eager_steps))
    console.print(_plans(found.plans))
    if found.moves:
        console.print(_moves(found))
    _show_pages(console, found)
    console.print(_pairs("options", found.config))


def _plans(plans: list[DumpedPlan]) -> Group:
    table = _table("step", "version", "mode", "rows", "tokens", "slots", "ops")
    for plan in plans[-MAX_ROWS:]:
        ops = ", ".join(f"{op.kind} {_size(op)}" for op in plan.ops)
        num_rows, num_tokens = len(plan.slots), sum(plan.lens)
        row = (plan.step, plan.version, plan.mode, num_rows, num_tokens, plan.slots, ops)
        table.add_row(*map(str, row))
    return _titled(f"the last {len(plans)} plans", table)


def _moves(found: CrashDump) -> Group:
    """Return those that are not done on every rank, the newest last."""
    counts = Counter(" ".join(move.statuses) or "forgotten" for move in found.moves)
    told = ", ".join(f"{num} {statuses}" for statuses, num in counts.items())
    table = _table("move", "kind", "page", "slot", "by rank")
    for move in [move for move in found.moves if {*move.statuses} != {"DONE"}][-MAX_ROWS:]:
        table.add_row(str(move.number), move.kind, str(move.page), str(move.slot), " ".join(move.statuses))
    table.show_header = bool(table.rows)
    return _titled(f"moves of these plans: {told}", table)


def _show_pages(console: Console, found: CrashDump) -> None:
    if found.pages:
        states = Counter(page.state for page in found.pages)
        console.print(_pairs("pages that are not free", states))
        table = _table("page", "state", "generation", "leases")
        for page in sorted(found.pages, key=lambda page: -page.num_leases)[:MAX_ROWS]:
            table.add_row(str(page.page), page.state, str(page.generation), str(page.num_leases))
        console.print(_titled("of these the most leased", table))
    if found.rows:
        console.print(_pairs("page table: pages by slot", found.rows))


def _show_plan(console: Console, plan: DumpedPlan) -> None:
    console.print(_pairs(f"step {plan.step}", {"version": plan.version, "mode": plan.mode}))
    table = _table("row", "slot", "first position", "tokens", "sampled")
    sampled = {*plan.sampled}
    for row, (slot, start, length) in enumerate(zip(plan.slots, plan.starts, plan.lens, strict=True)):
        table.add_row(str(row), str(slot), str(start), str(length), "yes" if row in sampled else "")
    console.print(_titled("rows", table))
    for number, op in enumerate(plan.ops):
        console.print(_pairs(f"op {number}: {op.kind}", op.fields))


def _size(op: DumpedOp) -> str:
    pages = op.fields.get("pages")
    return f"of {len(pages)}" if isinstance(pages, list) else f"slot {op.fields.get('slot')}"


def _pairs(title: str, values: Mapping[str, object]) -> Group:
    table = _table("", "")
    table.show_header = False
    for name, value in values.items():
        table.add_row(name, str(value))
    return _titled(title, table)


def _titled(title: str, table: Table) -> Group:
    return Group("", Text(title, style="bold"), table)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _fail(message: str) -> NoReturn:
    typer.echo(f"eyrie: {message}", err=True)
    raise typer.Exit(FAILURE_EXIT_CODE)
