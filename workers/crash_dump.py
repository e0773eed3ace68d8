"""Writes a rank's CrashDump when its loop has failed: the log's end, pages, moves, counters, versions.

Called by Rank, in its thread. It asks the host alone: after a CUDA error every question to the device fails.
"""

import logging
import os
import platform
import tempfile
import traceback
from collections.abc import Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec
import torch

from workers.config import WorkerConfig
from workers.dump_record import (
    FORMAT_VERSION,
    CrashDump,
    DumpedMove,
    DumpedOp,
    DumpedPage,
    DumpedPlan,
)
from workers.engine.engine import Engine
from workers.kvcache.manager import KVCacheManager
from workers.kvcache.moves import moves_of
from workers.move_board import MoveBoard
from workers.parallel import TPGroup
from workers.plan import BatchPlan, LoadPages, PlanOp, RelocationVersion, SavePages

logger = logging.getLogger(__name__)

MAX_DUMPS = 16
"""Files in the folder; the oldest go."""
_TOKENS = frozenset({"token_ids", "end_token_ids", "sampling"})


def dump_folder() -> Path:
    """Return where this user's ranks leave dumps on this node: they outlive the run and its folder."""
    return Path(tempfile.gettempdir()) / f"eyrie-dumps-{os.getuid()}"


def write_dump(
    folder: Path,
    error: BaseException,
    *,
    config: WorkerConfig,
    replica: str,
    incarnation: int,
    engine: Engine,
    group: TPGroup,
    cache: KVCacheManager | None,
) -> Path | None:
    """Write what is known of a failed rank and return the file; None, with a log line, where that fails."""
    try:
        octets = msgspec.json.encode(_describe(error, config, replica, incarnation, engine, group, cache))
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = folder / f"{replica}-rank{group.rank}-{datetime.now(UTC):%Y%m%dT%H%M%S.%f}.json"
        path.touch(mode=0o600)
        path.write_bytes(octets)
        for old in sorted(folder.glob("*.json"), key=lambda file: file.stat().st_mtime)[:-MAX_DUMPS]:
            old.unlink(missing_ok=True)
    except Exception:  # the rank is failing already: what it failed of must be what is told
        logger.exception("no crash dump could be written")
        return None
    logger.error("wrote a crash dump: `eyrie debug dump` shows it", extra={"path": str(path)})
    return path


def _describe(
    error: BaseException,
    config: WorkerConfig,
    replica: str,
    incarnation: int,
    engine: Engine,
    group: TPGroup,
    cache: KVCacheManager | None,
) -> CrashDump:
    plans = list(engine.plans)
    return CrashDump(
        format_version=FORMAT_VERSION,
        written_at=f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}",
        replica=replica,
        rank=group.rank,
        incarnation=incarnation,
        step=plans[-1].step if plans else None,
        relocation_version=_version(engine.version),
        error=f"{type(error).__name__}: {error}",
        traceback="".join(traceback.format_exception(error)),
        versions=_versions(),
        config={name: _plain(value) for name, value in asdict(config).items()},
        completed_steps=group.board.counts(),
        graph_steps=_counts(engine.graph_steps.items()),
        eager_steps=_counts(engine.eager_steps.items()),
        plans=[_plan(plan) for plan in plans],
        moves=_moves(plans, group.moves),
        rows={str(slot): pages for slot, pages in engine.page_rows().items()},
        pages=[] if cache is None else [DumpedPage(*record) for record in cache.held_pages()],
    )


def _plan(plan: BatchPlan) -> DumpedPlan:
    return DumpedPlan(
        step=plan.step,
        version=_version(plan.relocation_version),
        mode=plan.mode if plan.slots else "none",
        slots=plan.slots,
        starts=plan.starts,
        lens=plan.lens,
        sampled=plan.sampled,
        ops=[_op(op) for op in plan.ops],
    )


def _op(op: PlanOp) -> DumpedOp:
    fields = {name: getattr(op, name) for name in op.__struct_fields__ if name not in _TOKENS}
    return DumpedOp(type(op).__name__, {name: _plain(value) for name, value in fields.items()})


def _moves(plans: Iterable[BatchPlan], board: MoveBoard) -> list[DumpedMove]:
    moves = [
        move
        for plan in plans
        for op in plan.ops
        if isinstance(op, SavePages | LoadPages)
        for move in moves_of(op)
    ]
    told = [[status.name for status in board.statuses(move.number)] for move in moves]
    return [
        DumpedMove(move.number, move.kind, move.page, move.slot, statuses)
        for move, statuses in zip(moves, told, strict=True)
    ]


def _versions() -> dict[str, str]:
    try:
        own = version("eyrie")
    except PackageNotFoundError:  # run from its sources
        own = "not installed"
    found = {
        "eyrie": own,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "system": platform.platform(),
    }
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    return found


def _counts(counts: Iterable[tuple[tuple[str, str], int]]) -> dict[str, int]:
    return {f"{mode} {what}": count for (mode, what), count in counts}


def _version(version: RelocationVersion | None) -> str:
    return "none" if version is None else f"{version.incarnation}.{version.counter}"


def _plain(value: object) -> object:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value
