"""TreeKernelCases: the Triton kernel of trees' masks against torch, run by the files that run KernelCases."""

import pytest
import torch

from workers.attention.pool_kernels import TorchPoolKernels
from workers.attention.tree_mask import row_bytes


class TreeKernelCases:
    @pytest.mark.parametrize("num_before", [0, 5])
    @pytest.mark.parametrize("longest", [1, 63])
    def test_trees_are_packed_as_by_torch(self, kernels, longest, num_before):
        """Rows of one token and of more, one of none and one of pads that do not fit."""
        random = torch.Generator().manual_seed(longest)
        lens = torch.tensor([1, longest, 0, (longest + 1) // 2, 300], dtype=torch.int32)
        contexts = torch.tensor([6, 1000, 0, 83, 300], dtype=torch.int32) + (lens > 0) * num_before
        starts = torch.cat([torch.zeros(1, dtype=torch.int32), lens.cumsum(0, dtype=torch.int32)])
        words = torch.randint(-(2**63), 2**63 - 1, (int(lens.sum()),), generator=random)
        size = row_bytes(longest, 1000 + num_before)
        given = [tensor.to(self.device) for tensor in (words, starts, contexts)]
        found, expected = (torch.zeros(5 * size, dtype=torch.uint8, device=self.device) for _ in range(2))
        for by, bits in ((kernels, found), (TorchPoolKernels(), expected)):
            by.pack_tree(*given, num_before, bits, size)
        assert torch.equal(found, expected)
        assert found[:size].any() and not found[-size:].any()
