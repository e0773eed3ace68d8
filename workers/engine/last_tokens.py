"""LastTokens: what was sampled last for each slot, on every rank's device, where the next step can run it.

With a depth of 1 a step is planned before the host knows these tokens. The engine's thread.
"""

import torch

from workers.engine.copies import CopyStream
from workers.engine.sampled import Sampled


class LastTokens:
    """`token_ids` [slots] int64; a slot's is good from the step that sampled it until the slot is closed."""

    def __init__(self, max_slots: int, device: torch.device, copies: CopyStream) -> None:
        self.token_ids = torch.zeros(max_slots, dtype=torch.int64, device=device)
        self._copies = copies

    def keep(self, slots: list[int], sampled: Sampled) -> None:
        """Keep what was `sampled` for the slots, the same on every rank."""
        self.token_ids.index_copy_(0, self._copies.upload(slots), sampled.token_ids)

    def take(self, target: torch.Tensor, slots: torch.Tensor) -> None:
        """Write the slots' tokens to `target`, behind what was enqueued before."""
        self._copies.take(target, self.token_ids, slots)
