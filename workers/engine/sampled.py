"""Sampled: the tokens of a step's sampled rows as they leave the Sampler, on the device, then on the host.

Made by the Sampler, taken to the host by the Engine, read once its step is complete.
"""

from dataclasses import dataclass

from torch import Tensor

from workers.engine.copies import CopyStream
from workers.protocol import TokenLogprobs


@dataclass(frozen=True)
class SampledLogprobs:
    """Logprobs of the rows that asked for any: row `rows[i]` for `nums[i]` tokens beside its own."""

    rows: list[int]
    nums: list[int]
    own: Tensor
    """[len(rows)] float32"""
    top_ids: Tensor
    """[len(rows), max(nums)] int64, most likely first"""
    tops: Tensor
    """[len(rows), max(nums)] float32"""


@dataclass(frozen=True)
class Sampled:
    """One token a row."""

    token_ids: Tensor
    """[rows] int64"""
    logprobs: SampledLogprobs | None

    @property
    def num_tokens(self) -> list[int]:
        """StepOutput's: one token a row goes without saying."""
        return []

    def to_host(self, copies: CopyStream) -> "Sampled":
        """Return the same on the host; to be read once a fence behind this call was passed."""
        found = self.logprobs
        if found is not None:
            found = SampledLogprobs(
                found.rows,
                found.nums,
                copies.to_host(found.own),
                copies.to_host(found.top_ids),
                copies.to_host(found.tops),
            )
        return Sampled(copies.to_host(self.token_ids), found)

    def read(self) -> tuple[list[int], list[TokenLogprobs | None]]:
        """Return tokens and logprobs, both by row; to be called on what `to_host` returned."""
        token_ids: list[int] = self.token_ids.tolist()  # on the host: waits for nothing
        logprobs: list[TokenLogprobs | None] = [None] * len(token_ids)
        found = self.logprobs
        if found is not None:
            values = zip(found.own.tolist(), found.top_ids.tolist(), found.tops.tolist(), strict=True)
            for row, num, (own, ids, tops) in zip(found.rows, found.nums, values, strict=True):
                logprobs[row] = TokenLogprobs(own, ids[:num], tops[:num])
        return token_ids, logprobs
