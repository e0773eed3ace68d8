"""RankKernelCases: what one rank of several computes alone, run by the files that run KernelCases."""

import pytest
import torch

from workers.engine import vocabulary_shard


class RankKernelCases:
    @pytest.mark.parametrize("shape", [(1, 1001), (3, 5000), (600, 7)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_greedy_keys_are_torch_s(self, shape, dtype):
        from workers.triton_kernels.argmax import greedy_keys

        logits = self.randn(*shape).to(dtype)  # narrow ones are often equal
        logits[0, :] = -0.0
        for first in (0, 1, 64128):
            expected = vocabulary_shard.greedy_keys(logits, first)
            assert torch.equal(greedy_keys(logits, first, pdl=self.pdl), expected)
