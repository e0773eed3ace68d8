"""GraphRunner: replays one prepared step per decode bucket over that bucket's static inputs (I3, I9).

On CPU a prepared step is a callable over buffers whose addresses never change; what a graph is on another
device is decided in `_capture` alone. The engine's thread.
"""

import logging
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import torch

from workers.engine.forward_batch import ForwardBatch
from workers.engine.mechanisms import ALL_ON, Mechanisms
from workers.engine.model_runner import ModelRunner
from workers.engine.recording import Arena, Recording, RecordingError, RecordingKernels
from workers.engine.staging import BucketInputs, static_batch

logger = logging.getLogger(__name__)

PreparedStep = Callable[[], torch.Tensor | None]
"""Computes the step over the static inputs; returns the logits of every row, pads included."""

MAX_ROUNDING_RATIO = 1e-5
"""Of the largest logit. One input that a replay does not read anew changes logits by far more."""


class GraphRunner:
    """Buckets of static inputs, each with a prepared step once `capture` has run.

    With `kernels`, those that the decoder and its attention use, a step is recorded and replayed; without, or
    in a group of several ranks, whose collectives no recording repeats, it is the decoder itself.
    """

    def __init__(
        self,
        runner: ModelRunner,
        batch_sizes: Sequence[int],
        pages_per_row: int,
        device: torch.device,
        mechanisms: Mechanisms = ALL_ON,
        kernels: RecordingKernels | None = None,
    ) -> None:
        self._runner = runner
        self._kernels = kernels
        self._mechanisms = mechanisms
        self._arena = Arena()
        self._device = device
        self._inputs = {
            size: BucketInputs(size, pages_per_row, device, mechanisms) for size in sorted(batch_sizes)
        }
        self._steps: dict[int, PreparedStep] = {}

    @staticmethod
    def supports(device: torch.device) -> bool:
        """Tell whether steps can be prepared on `device`."""
        return device.type == "cpu"

    def inputs(self, bucket: int) -> BucketInputs:
        """Return a bucket's static inputs and ring, to be staged."""
        return self._inputs[bucket]

    def capture(self) -> list[int]:
        """Prepare every bucket, the largest first; return those that failed, each logged with its reason.

        All ranks call it together: a prepared step contains the group's collectives.
        """
        failed = []
        for size in sorted(self._inputs, reverse=True):
            try:
                self._steps[size] = self._capture(self._inputs[size])
            except RuntimeError:
                logger.exception("capture of a decode bucket failed", extra={"bucket": size})
                failed.append(size)
        self._runner.pool.zero_dummy_page()
        return failed

    def replay(self, batch: ForwardBatch) -> torch.Tensor | None:
        """Run the prepared step of a batch staged into its bucket; return the logits of its real rows.

        They are this step's own: no later replay changes them. Pads leave the dummy page zero.
        """
        assert batch.bucket is not None, "an eager batch has no graph"
        self._runner.plan(batch)
        logits = self._steps[batch.bucket]()
        if batch.num_real_rows < batch.num_rows:
            self._runner.pool.zero_dummy_page()
        return None if logits is None else logits[: batch.num_real_rows]

    def _capture(self, inputs: BucketInputs) -> PreparedStep:
        """Run the bucket over pads, which allocates and packs whatever it needs, and bind its inputs.

        The prepared step makes logits of its own on each call. Raises RuntimeError where a recording does not
        repeat what the decoder computes.
        """
        host_query_starts = np.arange(inputs.num_rows + 1, dtype=np.int32)
        host_context_lens = np.ones(inputs.num_rows, dtype=np.int32)
        inputs.static.query_starts.copy_(torch.from_numpy(host_query_starts))
        inputs.static.context_lens.fill_(1)
        batch = static_batch(inputs, 0, host_query_starts, host_context_lens)
        self._runner.plan(batch)
        self._runner.compute(batch)

        def computed() -> torch.Tensor | None:
            return self._runner.compute(batch)

        if self._kernels is None:
            return computed
        with Recording(self._kernels, self._arena) as recording:
            logits = computed()
        assert logits is not None, "a recording is of a group of one, which always has logits"

        def replayed() -> torch.Tensor:
            recording.replay()
            return logits.clone() if self._mechanisms.clones_outputs else logits

        inputs.static.token_ids.fill_(1)  # other inputs than those recorded
        if not repeats(replayed(), cast(torch.Tensor, computed())):
            raise RecordingError(f"bucket {inputs.num_rows}: a replay differs from the decoder")
        return replayed


def repeats(replayed: torch.Tensor, computed: torch.Tensor) -> bool:
    """Tell whether logits of a replay are those that the decoder computes, but for rounding.

    In float32 torch's own BLAS, with several threads, sums in another order from call to call.
    """
    largest = computed.abs().max().item()  # at start-up: may wait
    return torch.allclose(replayed, computed, rtol=0.0, atol=MAX_ROUNDING_RATIO * largest)
