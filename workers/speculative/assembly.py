"""assemble_draft: the parts of a rank's draft, put together for its Engine."""

from dataclasses import dataclass

from workers.attention.choice import ChosenKernels, choose_draft_attention
from workers.config import WorkerConfig
from workers.engine.copies import CopyStream
from workers.engine.graph_guard import EagerReason, GraphGuard
from workers.engine.part_times import PartTimes
from workers.kvcache.kv_pool import KVPool
from workers.kvcache.page_table import PageTable
from workers.models.decoder import Decoder
from workers.models.draft import DraftModel
from workers.parallel import TPGroup
from workers.speculative.draft_extend import DraftExtend
from workers.speculative.draft_runner import DraftRunner
from workers.speculative.draft_state import DraftState
from workers.speculative.loop_inputs import LoopParts
from workers.speculative.loop_sizes import loop_sizes


@dataclass(frozen=True)
class DraftParts:
    """`extend` runs in the target's pass, `runner` behind it."""

    state: DraftState
    extend: DraftExtend
    runner: DraftRunner


def assemble_draft(
    config: WorkerConfig,
    model: DraftModel,
    decoder: Decoder,
    chosen: ChosenKernels,
    pool: KVPool,
    table: PageTable,
    group: TPGroup,
    copies: CopyStream,
    guard: GraphGuard,
    times: PartTimes,
) -> DraftParts:
    """Build what drafts for the rows of `table`; raises BackendError where its attention cannot be."""
    attention = choose_draft_attention(config, pool, model, decoder, chosen)
    state = DraftState(pool, table.max_slots, config.max_drafts, decoder.config.vocab_size, config.draft_topk)
    parts = LoopParts(
        model,
        state,
        pool,
        table,
        group,
        copies,
        attention.for_passes,
        chosen.greedy_tokens,
        chosen.greedy_keys,
    )
    reason: EagerReason | None = None
    if not config.graphs:
        reason = "disabled"
    elif not attention.is_prepared:
        reason = "unsupported"
    kernels = chosen.kernels if group.size == 1 else None
    return DraftParts(
        state,
        DraftExtend(model, attention.extend, pool, state, guard, times, is_apart=attention.is_apart),
        DraftRunner(parts, loop_sizes(table.max_slots), config.draft_lens, guard, times, reason, kernels),
    )
