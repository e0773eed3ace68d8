"""Engine: applies and runs plans on one rank. Owned by the rank's step loop, used in its thread only.

No Ray, no scheduler, no clock: what a step does is a function of the plans so far (I1).
"""

import logging
from collections import Counter, deque

import numpy as np
import torch

from cache_service.keys import KVNamespace
from workers.attention.choice import choose_kernels
from workers.card import ModelCard, page_layout
from workers.config import WorkerConfig
from workers.draft_card import check_sizes, read_draft_card
from workers.engine.copies import Fence, copies_to
from workers.engine.device_memory import available_bytes, log_memory, measured_pool_size
from workers.engine.forward_batch import ForwardBatch
from workers.engine.graph_guard import CaptureStats, EagerReason, Outcome, StepPart
from workers.engine.graph_runner import GraphRunner, failed_anywhere, guard_for
from workers.engine.last_tokens import LastTokens
from workers.engine.launched_step import LaunchedStep
from workers.engine.mechanisms import ALL_ON, Mechanisms
from workers.engine.model_runner import ModelRunner
from workers.engine.namespace import kv_namespace
from workers.engine.part_times import part_times_of
from workers.engine.sampled import Sampled
from workers.engine.staged_tokens import DraftIds
from workers.engine.staging import Stager
from workers.kvcache.kv_pool import KVPool, allocate_pool
from workers.kvcache.mover import Mover
from workers.kvcache.page_table import PageTable
from workers.kvcache.pool_size import PoolSize, is_measured, num_positions, pool_size
from workers.kvcache.sanitizer import KVSanitizer
from workers.models.draft_weights import load_draft
from workers.models.weights import load_model
from workers.parallel import TPGroup
from workers.plan import (
    BatchPlan,
    CloseSlot,
    FreePages,
    LoadPages,
    OpenSlot,
    OwnPages,
    PlanOp,
    RelocationVersion,
    RelocationVersionError,
    SavePages,
    SetRow,
    StepOutput,
)
from workers.speculative.acceptance import Verified
from workers.speculative.assembly import DraftParts, assemble_draft
from workers.speculative.speculator import Speculator

logger = logging.getLogger(__name__)

NUM_LOGGED_PLANS = 64


class TokenError(RuntimeError):
    """A plan's token id outside the vocabulary: admission refuses those, so a bug; checked mode only."""


class NoMoverError(RuntimeError):
    """A plan moves pages on a rank that has no cache tier: the group was started unevenly, a bug."""


class Engine:
    """One rank's model, KV pool, page table and sampler.

    `namespace` names the KV it writes; `layout` the bytes of a page; `num_pages` and `max_context_len` are
    what the pool came to. `mechanisms` are switched off in mutation tests only.
    """

    def __init__(
        self,
        config: WorkerConfig,
        card: ModelCard,
        tp_group: TPGroup,
        mechanisms: Mechanisms = ALL_ON,
    ) -> None:
        device = self._device = torch.device(config.device)
        dtype = card.config.dtype if config.dtype == "auto" else config.dtype
        draft_card = None if config.draft is None else read_draft_card(config.draft, card)
        check_sizes(config, card, draft_card)
        draft_shape = None if draft_card is None else draft_card.page_shape(config.tp_size)
        self.layout = page_layout(card, config, draft_shape)
        size = None if is_measured(config) else self._asked_pool_size(config, card.context_len)
        loaded = load_model(
            card,
            group=tp_group,
            device=device,
            dtype=dtype,
            load_format=config.load_format,
            seed=config.seed,
            max_context_len=num_positions(config, card.context_len, size),
        )
        draft, draft_digest = None, ""
        if draft_card is not None:
            draft = load_draft(
                draft_card,
                loaded.decoder,
                group=tp_group,
                device=device,
                dtype=loaded.dtype,
                load_format=config.load_format,
                seed=config.seed,
            )
            draft_digest = f"{draft.weights_digest}/{draft_card.digest()}"
        if size is None:
            size = measured_pool_size(config, card, draft_card, self.layout.bundle_bytes, tp_group, device)
        self.num_pages = size.num_pages
        self.max_context_len = size.max_context_len
        self.namespace: KVNamespace = kv_namespace(
            config, card, dtype, loaded.weights_digest, draft_digest, self.layout
        )
        self._vocab_size = card.vocab_size
        self._mechanisms = mechanisms
        self._group = tp_group
        self._is_checked = config.checked or config.kv_sanitizer
        # Every rank starts at counter 0 of the incarnation that the first plan names.
        self._version: RelocationVersion | None = None
        self._mover: Mover | None = None

        pages_per_row = size.pages_per_row(config.page_size)
        max_slots = config.max_running_requests
        self._pool = allocate_pool(config, self.layout, size.num_pages, device)
        self._table = PageTable(max_slots, pages_per_row, config.page_size, size.num_pages, self._is_checked)
        copies = self._copies = copies_to(device)
        self._launched: deque[LaunchedStep] = deque()
        self.part_times = part_times_of(device)
        self.plans: deque[BatchPlan] = deque(maxlen=NUM_LOGGED_PLANS)
        """The log's end, for crash dumps."""
        # A step may hold max_tokens_per_step tokens or one token of every slot.
        max_tokens = max(config.max_tokens_per_step, max_slots)
        self._last_tokens = LastTokens(max_slots, device, copies) if config.depth > 0 else None
        ids = DraftIds(card.vocab_size, config.max_drafts)
        self._stager = Stager(self._table, max_tokens, device, copies, mechanisms, self._last_tokens, ids)
        chosen = choose_kernels(
            config, self._pool, loaded.decoder, copies, max_tokens=max_tokens, mechanisms=mechanisms
        )
        self._sampler = chosen.sampler(card.vocab_size, max_slots, device, copies, tp_group)
        self._guard = guard_for(config, device, chosen.attention.captured_modes, max_tokens)
        self._draft: DraftParts | None = None
        if draft is not None:
            self._draft = assemble_draft(
                config,
                draft.model,
                loaded.decoder,
                chosen,
                self._pool,
                self._table,
                tp_group,
                copies,
                self._guard,
                self.part_times,
            )
        extend = None if self._draft is None else self._draft.extend
        self._runner = ModelRunner(loaded.decoder, chosen.attention, self._pool, extend)
        self._graphs = GraphRunner(
            self._runner,
            self._guard.buckets,
            pages_per_row,
            max_slots,
            device,
            mechanisms,
            chosen.kernels if tp_group.size == 1 else None,
            samples_per_row=1 + config.max_drafts,
            group=tp_group,
            has_trees=config.draft_topk > 1,
        )
        if self._guard.buckets:
            with torch.inference_mode():
                self._capture(tp_group)
        # Last: captures run over pages that nobody owns yet.
        self._sanitizer: KVSanitizer | None = None
        if self._is_checked:
            self._sanitizer = KVSanitizer(
                self._pool,
                max_slots,
                pages_per_row,
                mechanisms.poisons_pages,
                checks_bytes=config.kv_sanitizer,
                check_peers=tp_group.check_peers,
            )
        self._speculator: Speculator | None = None
        if self._draft is not None:
            self._speculator = Speculator(
                self._draft.state, self._draft.runner, self._pool, self._table, copies, self._sanitizer
            )
        log_memory(device, self._pool.data.nbytes)

    @property
    def pool(self) -> KVPool:
        """The device's pages, for the mover that is made over them."""
        return self._pool

    @property
    def graph_steps(self) -> Counter[tuple[StepPart, Outcome]]:
        """Steps by how they ran."""
        return self._guard.steps

    @property
    def step_sizes(self) -> list[int]:
        """Tokens of steps that prefill and were prepared; others are padded to the next."""
        return self._guard.token_sizes

    @property
    def eager_steps(self) -> Counter[tuple[StepPart, EagerReason]]:
        """Eager steps by why."""
        return self._guard.eager_steps

    @property
    def capture_stats(self) -> CaptureStats:
        """What preparing graphs took."""
        return self._graphs.stats

    @property
    def num_sanitized_steps(self) -> int:
        """Steps the sanitizer has checked, be it their indices alone; 0 without it."""
        return self._sanitizer.num_steps if self._sanitizer else 0

    @property
    def version(self) -> RelocationVersion | None:
        """The relocation version that the last plan's ops came to; None before the first."""
        return self._version

    def page_rows(self) -> dict[int, list[int]]:
        """Return the pages of every slot that has some."""
        return self._table.held()

    def attach(self, mover: Mover | None) -> None:
        """Move pages through `mover`, made over `pool`, from the next plan on; None: there is no cache tier.

        The mover before it has no move in flight. Its maker closes it, after the last plan.
        """
        assert self._mover is None or self._mover.num_in_flight == 0, "moves are in flight"
        self._mover = mover
        if self._sanitizer:
            self._sanitizer.watch(mover)

    def launch(self, plan: BatchPlan) -> None:
        """Apply the plan's ops, run its rows, sample, all of it behind the steps launched before.

        On return the device may have yet to do it: `collect`. SAVEs and LOADs that it starts may go on after
        the step, but for the LOADs of pages that its rows read: what became of those is on the board.

        Raises RelocationVersionError, having applied and launched nothing, where this rank's log differs from
        rank 0's (I8); PageTableError, TokenError and SanitizerError where a staged index is not what it must
        be. Each is a bug and fatal to the replica.
        """
        self.plans.append(plan)
        version = self._advance(plan)
        self._apply(plan.ops)
        self._version = version
        sampled: Sampled | Verified | None = None
        fence: Fence | None = None
        if plan.slots:
            if self._is_checked:
                self._check_tokens(plan)
            with torch.inference_mode():
                sampled, fence = self._run_rows(plan)
        self._launched.append(LaunchedStep(plan.step, version, sampled, fence or self._copies.fence()))

    def collect(self) -> StepOutput:
        """Wait until the oldest launched step has ended and return what came of it. See LaunchedStep.

        The device has then done all of it (I2) but the draft's passes: freed pages are used behind them.
        """
        return self._launched.popleft().output(self._group.step_timeout_s, check=self._group.check_peers)

    @property
    def has_ended(self) -> bool:
        """Tell whether `collect` would not wait."""
        return self._launched[0].has_ended

    def run(self, plan: BatchPlan) -> StepOutput:
        """Launch a step and collect it, with no other under way."""
        assert not self._launched, "steps are under way"
        self.launch(plan)
        return self.collect()

    def close(self) -> None:
        """Let go of the device's memory, and of the collectives that graphs hold; no plan may follow."""
        self._graphs.close()
        if self._draft is not None:
            self._draft.runner.close()
        del self._graphs, self._runner, self._pool, self._sanitizer, self._mover
        del self._draft, self._speculator

    def _advance(self, plan: BatchPlan) -> RelocationVersion:
        """Return this rank's version once the plan's ops are applied: each OwnPages and FreePages adds 1."""
        before = self._version or RelocationVersion(plan.relocation_version.incarnation, 0)
        num_relocations = sum(isinstance(op, OwnPages | FreePages) for op in plan.ops)
        version = RelocationVersion(before.incarnation, before.counter + num_relocations)
        if version != plan.relocation_version and self._mechanisms.checks_version:
            raise RelocationVersionError(plan.step, version, plan.relocation_version)
        return version

    def _apply(self, ops: list[PlanOp]) -> None:
        moves: list[SavePages | LoadPages] = []
        for op in ops:
            match op:
                case SetRow():
                    self._table.set_row(op)
                case CloseSlot():
                    self._table.close_slot(op)
                    self._sampler.close(op.slot)
                    if self._speculator:
                        self._speculator.close(op.slot)
                case OpenSlot():
                    self._sampler.open(op)
                case SavePages() | LoadPages():
                    moves.append(op)
        if moves and self._mover is None:
            raise NoMoverError(
                f"move {moves[0].first_move} came to a rank without a cache tier; a plan may move pages once"
                " every rank is attached to the tier"
            )
        if self._sanitizer:
            self._sanitizer.apply(ops)
        for move in moves:  # once the sanitizer has seen what they find
            assert self._mover is not None, "checked above"
            self._mover.start(move)

    def _run_rows(self, plan: BatchPlan) -> tuple[Sampled | Verified | None, Fence | None]:
        """Run a plan's rows; return what they got, and a fence behind that, None: behind all of it."""
        mode = plan.mode
        has_waited = self._wait_for_loads(plan)
        decision = self._guard.decide(mode, len(plan.slots), plan.num_tokens, after_load=has_waited)
        if decision.bucket is None:
            batch, slots = self._stager.stage_eager(plan, mode)
        else:
            batch, slots = self._stager.stage_bucket(plan, self._graphs.inputs(decision.bucket))
        if self._speculator is not None:
            batch = self._speculator.begin(plan, batch, slots, self._sampler)
        if self._sanitizer:
            self._sanitizer.check_inputs(batch, slots)
        logits = self._compute(batch)
        if not plan.sampled:
            logits = None
        elif logits is not None and plan.num_samples < batch.num_samples:
            # A decode replay computes the logits of all its rows.
            logits = logits.index_select(0, self._copies.upload(plan.sampled))
        if self._sanitizer:
            self._sanitizer.check_outputs(logits, [plan.slots[row] for row in plan.sampled])
        if self._speculator is not None and self._draft is not None:
            features = self._draft.extend.behind(batch, self._runner.features, decision, has_waited)
            if plan.speculates:
                return self._speculator.advance(plan, batch, slots, logits, self._sampler, features)
        return self._sample(plan, logits), None

    def _sample(self, plan: BatchPlan, logits: torch.Tensor | None) -> Sampled | None:
        sampled: Sampled | None = None
        slots = [plan.slots[row] for row in plan.sampled]
        if logits is not None:
            positions = [plan.starts[row] + plan.lens[row] for row in plan.sampled]
            sampled = self._sampler.sample(logits, slots, positions)
            if self._last_tokens is not None:
                self._last_tokens.keep(slots, sampled)
        return None if sampled is None or self._group.rank > 0 else sampled.to_host(self._copies)

    def _wait_for_loads(self, plan: BatchPlan) -> bool:
        """Let the step come after the LOADs in flight of pages that its rows read (I5); True if there are."""
        if self._mover is None or not self._mechanisms.waits_for_loads:
            return False
        loading = self._mover.loading_pages()
        if not loading:
            return False
        num_columns = -(-max(map(sum, zip(plan.starts, plan.lens, strict=True))) // self._table.page_size)
        read = np.isin(loading, self._table.rows[plan.slots, :num_columns])
        return self._mover.wait_for([page for page, is_read in zip(loading, read, strict=True) if is_read])

    def _asked_pool_size(self, config: WorkerConfig, model_context_len: int) -> PoolSize:
        num_bytes = available_bytes(self._device, config.tp_size)
        return pool_size(config, self.layout.bundle_bytes, model_context_len, num_bytes)

    def _compute(self, batch: ForwardBatch) -> torch.Tensor | None:
        if batch.bucket is not None:
            return self._graphs.replay(batch)
        self._runner.plan(batch)
        return self._runner.compute(batch)

    def _capture(self, tp_group: TPGroup) -> None:
        """Prepare the buckets; one that failed on any rank is given up on every rank (I1)."""
        failed = set(self._graphs.capture())
        for bucket in failed_anywhere(self._guard.buckets, failed, tp_group, self._device):
            self._guard.mark_failed(bucket)
        if self._draft is not None:
            self._draft.runner.prepare()

    def _check_tokens(self, plan: BatchPlan) -> None:
        lowest, highest = min(plan.token_ids, default=0), max(plan.token_ids, default=0)
        if lowest < 0 or highest >= self._vocab_size:
            raise TokenError(
                f"step {plan.step}: token ids {lowest} .. {highest}; allowed are 0 .. {self._vocab_size - 1}"
            )
