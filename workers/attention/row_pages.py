"""RowPages: the pages of a batch's rows one behind the other, as FlashInfer's kernels read them.

Derived on the device from the batch's own page rows, once a pass: in a captured graph by the graph itself.
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
    """[B + 1] int32"""
    pages: torch.Tensor
    """[B * P + 1] int32; the last is where the rest of a page row goes"""
    last_page_lens: torch.Tensor
    """[B] int32: tokens in each row's last page; of rows without pages undefined"""

    @classmethod
    def like(cls, page_rows: torch.Tensor) -> Self:
        """Return room for what lies in page_rows [B, P]."""
        num_rows, num_columns = page_rows.shape
        device = page_rows.device
        return cls(
            starts=torch.zeros(num_rows + 1, dtype=torch.int32, device=device),
            pages=torch.zeros(num_rows * num_columns + 1, dtype=torch.int32, device=device),
            last_page_lens=torch.zeros(num_rows, dtype=torch.int32, device=device),
        )

    def derive(self, page_rows: torch.Tensor, context_lens: torch.Tensor, page_size: int) -> None:
        """Take the pages that hold the first context_lens[r] tokens of each row, of page_rows [B, P].

        Nothing is waited for, and nothing depends on a value on the host.
        """
        num_pages = (context_lens + (page_size - 1)) // page_size
        self.starts[1:] = num_pages.cumsum(0)
        self.last_page_lens.copy_(context_lens - (num_pages - 1) * page_size)
        columns = torch.arange(page_rows.shape[1], dtype=torch.int64, device=page_rows.device)
        places = self.starts[:-1, None] + columns
        places.masked_fill_(columns >= num_pages[:, None], self.pages.shape[0] - 1)
        self.pages.scatter_(0, places.view(-1), page_rows.reshape(-1))


def host_page_starts(batch: ForwardBatch, page_size: int) -> IntArray:
    """Return what `starts` will be, [B + 1] int32."""
    starts = np.zeros(batch.num_rows + 1, dtype=np.int32)
    np.cumsum(-(-batch.host_context_lens // page_size), out=starts[1:])
    return starts
