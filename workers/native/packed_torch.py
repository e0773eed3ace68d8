"""packed_by_torch: bf16 products by oneDNN over weights packed once, for CPUs with matrix instructions."""

import logging

import torch
from torch.nn import functional

from workers.layers.kernels import Matmul

logger = logging.getLogger(__name__)


def packed_by_torch(weight: torch.Tensor, bias: torch.Tensor | None) -> Matmul:
    """Return x W^T + b, prepacked where this torch and CPU can, else by functional.linear.

    The packing operators are torch's own and not part of its interface: any failure means doing without.
    """

    def plain(x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, weight, bias)

    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.to_mkldnn(), None)

        def prepacked(x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
            return out

        prepacked(torch.zeros(2, weight.shape[1], dtype=weight.dtype))
    except (RuntimeError, AttributeError, TypeError) as error:
        logger.info("oneDNN packs no weights here", extra={"reason": str(error)})
        return plain
    return prepacked
