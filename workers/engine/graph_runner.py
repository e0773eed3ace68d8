"""GraphRunner: replays one prepared step per bucket over that bucket's static inputs (I3, I9).

On CUDA a prepared step is a captured graph; on CPU it is a callable over buffers whose addresses never
change, which keeps every rule of graphs but the capture. The engine's thread.
"""

import logging
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import TypeVar, cast

import torch

from workers.config import WorkerConfig
from workers.engine.cuda_graphs import CaptureError, CudaGraphs, PassGraphs
from workers.engine.forward_batch import ForwardBatch
from workers.engine.graph_guard import (
    MAX_CAPTURED_ROWS,
    MAX_CAPTURED_TOKENS,
    Bucket,
    CaptureStats,
    GraphGuard,
    default_batch_sizes,
    default_token_sizes,
)
from workers.engine.mechanisms import ALL_ON, Mechanisms
from workers.engine.model_runner import ModelRunner
from workers.engine.recording import Arena, Recording, RecordingError, RecordingKernels
from workers.engine.rehearsal import Rehearsal
from workers.engine.staging import BucketInputs
from workers.parallel import TPGroup
from workers.plan import Mode

logger = logging.getLogger(__name__)

Prepared = TypeVar("Prepared")
PreparedStep = Callable[[], torch.Tensor | None]
"""Computes the step over the static inputs; returns the logits of every sample index, pads included. They
last until the next call of any bucket's."""

MAX_ROUNDING_RATIO = 1e-5
"""Of the largest logit. One input that a replay does not read anew changes logits by far more."""
_MAX_NARROW_ROUNDING_RATIOS = {torch.bfloat16: 2**-6, torch.float16: 2**-9}
"""On CUDA, where a product may be summed in another order: two units in the last place."""
_PROGRESS_S = 5.0


class GraphRunner:
    """Buckets of static inputs, each with a prepared step once `capture` has run.

    With `kernels`, those that the decoder and its attention use on CPU, a decode step is recorded and
    replayed; without, or in a group of several ranks, whose collectives no recording repeats, it is the
    decoder itself.
    """

    def __init__(
        self,
        runner: ModelRunner,
        buckets: Sequence[Bucket],
        pages_per_row: int,
        max_slots: int,
        device: torch.device,
        mechanisms: Mechanisms = ALL_ON,
        kernels: RecordingKernels | None = None,
        samples_per_row: int = 1,
        has_trees: bool = False,
        group: TPGroup | None = None,
        graphs: PassGraphs | None = None,
    ) -> None:
        """`samples_per_row`, `has_trees`: of rows that verify. `group`: whose collectives a step contains,
        None: none. `graphs`: the device's where None."""
        self._runner = runner
        self._is_alone = group is None or group.size == 1
        self._kernels = kernels
        self._mechanisms = mechanisms
        self._arena = Arena()
        self._device = device
        self._pages_per_row = pages_per_row
        self._max_slots = max_slots
        self._graphs = graphs or graphs_of(device, group)
        page_size = runner.pool.page_size
        self._inputs = {
            bucket: BucketInputs(
                bucket, max_slots, page_size, pages_per_row, device, mechanisms, samples_per_row, has_trees
            )
            for bucket in sorted(buckets, key=lambda bucket: bucket.size, reverse=True)
        }
        self._steps: dict[Bucket, PreparedStep] = {}
        self._logits: torch.Tensor | None = None
        """Of every captured graph: the largest comes first and is followed by smaller ones"""
        self.stats = CaptureStats()

    @staticmethod
    def supports(device: torch.device, captured_modes: frozenset[Mode]) -> bool:
        """Tell whether steps can be prepared, on CUDA with an attention that may be captured so far."""
        return device.type == "cpu" or "decode" in captured_modes

    def inputs(self, bucket: Bucket) -> BucketInputs:
        """Return a bucket's static inputs and ring, to be staged."""
        return self._inputs[bucket]

    def capture(self) -> list[Bucket]:
        """Prepare every bucket, the largest first; return those that failed, each logged with its reason.

        All ranks call it together: a prepared step contains the group's collectives. It writes to pages that
        nobody owns yet.
        """
        started_s = told_s = time.monotonic()
        used_bytes = self._graphs.used_bytes() if self._graphs else 0
        rehearsal = Rehearsal(self._runner.pool, self._max_slots, self._pages_per_row, self._device)
        failed = []
        with self._graphs.capturing() if self._graphs else nullcontext():
            for bucket, inputs in self._inputs.items():
                try:
                    self._steps[bucket] = self._capture(inputs, rehearsal)
                except RuntimeError as error:
                    if not can_go_on(error, self._is_alone):
                        raise
                    fields = {"bucket": bucket.size, "mode": bucket.mode}
                    logger.exception("capture of a bucket failed", extra=fields)
                    failed.append(bucket)
                if time.monotonic() - told_s > _PROGRESS_S:
                    told_s = time.monotonic()
                    logger.info("captured %d of %d graphs", len(self._steps), len(self._inputs))
        self._runner.pool.zero_dummy_page()
        num_bytes = self._graphs.used_bytes() - used_bytes if self._graphs else 0
        self.stats = CaptureStats(len(self._steps), time.monotonic() - started_s, num_bytes)
        if self._graphs:
            logger.info("captured the graphs", extra=asdict(self.stats))
        return failed

    def replay(self, batch: ForwardBatch) -> torch.Tensor | None:
        """Run the prepared step of a batch staged into its bucket; return the logits of its samples.

        They are this step's own: no later replay changes them. Pads leave the dummy page zero.
        """
        assert batch.bucket is not None, "an eager batch has no graph"
        self._runner.plan(batch)
        logits = self._steps[batch.bucket]()
        if batch.host_query_starts[batch.num_real_rows] < batch.num_tokens:
            self._runner.pool.zero_dummy_page()
        if logits is None:
            return None
        samples = _of_samples(batch, logits)
        is_own = batch.bucket.mode == "verify" or not self._mechanisms.clones_outputs
        return samples if is_own else samples.clone()

    def close(self) -> None:
        """Let go of the prepared steps."""
        self._steps.clear()
        if self._graphs is not None:
            self._graphs.close()

    def _capture(self, inputs: BucketInputs, rehearsal: Rehearsal) -> PreparedStep:
        """Run the bucket, which allocates and packs whatever it needs, bind its inputs, and compare.

        Raises RuntimeError where a prepared step does not repeat what the decoder computes. Several ranks
        have then run the same collectives, unless it was the decoder itself that failed on one.
        """
        batch = rehearsal.first(inputs)
        self._runner.plan(batch)
        computed_first = self._runner.compute(batch)

        def compute() -> torch.Tensor | None:
            return self._runner.compute(batch)

        step: PreparedStep
        if self._graphs is not None:
            step = self._captured(self._graphs, batch, computed_first)
        elif self._kernels is not None and inputs.bucket.mode != "mixed":
            with Recording(self._kernels, self._arena) as recording:
                logits = compute()
            features = self._runner.features
            assert logits is not None, "a recording is of a group of one, which always has logits"

            def step() -> torch.Tensor:
                recording.replay()
                self._runner.features = features
                return logits
        else:
            return compute
        second = rehearsal.second(inputs)  # other inputs than those captured
        self._runner.plan(second)
        replayed = step()
        # Pads, whose tokens all write one place, say nothing.
        replayed = None if replayed is None else _of_samples(second, replayed).clone()
        computed = compute()
        if replayed is None or computed is None:
            return step
        if not repeats(replayed, _of_samples(second, computed), self._max_rounding_ratio()):
            raise RecordingError(f"bucket {inputs.bucket}: a replay differs from the decoder")
        return step

    def _captured(
        self, graphs: PassGraphs, batch: ForwardBatch, computed: torch.Tensor | None
    ) -> PreparedStep:
        """Capture a pass that writes its logits where all buckets' are."""
        if computed is not None and (self._logits is None or len(self._logits) < len(computed)):
            num_samples = max(inputs.num_samples for inputs in self._inputs.values())
            self._logits = computed.new_empty(num_samples, computed.shape[1])
        out = None if computed is None else cast(torch.Tensor, self._logits)[: len(computed)]
        replay = graphs.capture(lambda: self._runner.compute(batch, out))
        features = self._runner.features

        def step() -> torch.Tensor | None:
            replay()
            self._runner.features = features
            return out

        return step

    def _max_rounding_ratio(self) -> float:
        if self._device.type == "cpu":
            return MAX_ROUNDING_RATIO
        return _MAX_NARROW_ROUNDING_RATIOS.get(self._runner.pool.layer(0)[0].dtype, MAX_ROUNDING_RATIO)


def graphs_of(device: torch.device, group: TPGroup | None) -> PassGraphs | None:
    """Return what captures passes of a rank of the group on `device`; None: they are not captured there."""
    if device.type != "cuda":
        return None
    return CudaGraphs(device) if group is None else CudaGraphs(device, group.agree)


def can_go_on(error: RuntimeError, is_alone: bool) -> bool:
    """Tell whether steps may be run eager after an error while they were prepared.

    A rank that failed while it computed has left the others in its collectives: the group must be rebuilt.
    """
    return is_alone or isinstance(error, CaptureError | RecordingError)


def guard_for(
    config: WorkerConfig, device: torch.device, captured_modes: frozenset[Mode], max_tokens: int
) -> GraphGuard:
    """Return the guard of a rank with such options, whose attention may be captured in such modes.

    `max_tokens`: of any step. On CPU, where a pad costs as much as a token, only decode steps have buckets
    that nobody asked for.
    """
    is_cuda = device.type == "cuda"
    max_rows = config.max_running_requests
    batch_sizes = config.graph_batch_sizes or default_batch_sizes(
        min(max_rows, MAX_CAPTURED_ROWS) if is_cuda else max_rows
    )
    token_sizes = config.graph_token_sizes or ()
    if is_cuda and "mixed" not in captured_modes:
        token_sizes = ()
    elif is_cuda and not token_sizes and max_tokens > 1:
        token_sizes = default_token_sizes(min(max_tokens, MAX_CAPTURED_TOKENS))
    verifies = config.max_drafts > 0 and (not is_cuda or "verify" in captured_modes)
    return GraphGuard(
        batch_sizes,
        config.graphs,
        GraphRunner.supports(device, captured_modes),
        token_sizes,
        verify_lens=[1 + config.draft_topk * length for length in config.draft_lens] if verifies else (),
    )


def failed_anywhere(
    prepared: Sequence[Prepared], failed: Collection[Prepared], group: TPGroup, device: torch.device
) -> list[Prepared]:
    """Return which of what every rank has tried to prepare, in one order, has failed on any of them (I1)."""
    flags = torch.tensor([float(each in failed) for each in prepared], device=device)
    group.all_reduce(flags)
    # At start-up: may wait.
    return [each for each, num_failures in zip(prepared, flags.tolist(), strict=True) if num_failures]


def _of_samples(batch: ForwardBatch, logits: torch.Tensor) -> torch.Tensor:
    """Return the logits of a bucket's samples, without those of pads; of a verify bucket they are a copy."""
    if batch.bucket is not None and batch.bucket.mode == "verify":  # of all tokens in the batch's order
        return logits.index_select(0, batch.sample_indices[: batch.num_samples])
    return logits[: batch.num_samples]


def repeats(
    replayed: torch.Tensor, computed: torch.Tensor, max_rounding_ratio: float = MAX_ROUNDING_RATIO
) -> bool:
    """Tell whether logits of a replay are those that the decoder computes, but for rounding.

    In float32 torch's own BLAS, with several threads, sums in another order from call to call.
    """
    largest = computed.abs().max().item()  # at start-up: may wait
    return torch.allclose(replayed, computed, rtol=0.0, atol=max_rounding_ratio * largest)
