"""RowPages: the pages of a batch's rows one behind the other, as FlashInfer's kernels read them.

Written on the device from the batch's own page rows, once a pass: in a captured graph by the graph itself.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from workers.engine.forward_batch import ForwardBatch, IntArray


@dataclass(frozen=True)
class RowPages:
    """For B rows of at most P pages each; row r's are pages[starts[r] : starts[r + 1]].

    pages   | row 0's | row 1's | ... | row B - 1's | whatever | bin |
            0         starts[1]        starts[B - 1]  starts[B]  B * P
    """

    starts: torch.Tensor
    """[B + 1] int32; the first is 0"""
    pages: torch.Tensor
    """[B * P + 1] int32; the last is where the rest of a page row goes"""
    last_page_lens: torch.Tensor
    """[B] int32: tokens in each row's last page; of rows without pages undefined"""

    @classmethod
    def room(cls, num_rows: int, max_columns: int, device: torch.device) -> Self:
        """Return room for so many rows of so many pages."""
        return cls(
            starts=torch.zeros(num_rows + 1, dtype=torch.int32, device=device),
            pages=torch.zeros(num_rows * max_columns + 1, dtype=torch.int32, device=device),
            last_page_lens=torch.zeros(num_rows, dtype=torch.int32, device=device),
        )


def host_page_starts(batch: ForwardBatch, page_size: int) -> IntArray:
    """Return what `starts` will be, [B + 1] int32."""
    starts = np.zeros(batch.num_rows + 1, dtype=np.int32)
    np.cumsum(-(-batch.host_context_lens // page_size), out=starts[1:])
    return starts
