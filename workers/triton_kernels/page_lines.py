"""line_up_pages: the pages of a batch's rows one behind the other, as paged attention reads them.

One launch at the beginning of a pass. It overlaps with nothing: kernels further on read what it writes
before they wait for those in front of them.
"""

import torch
import triton
import triton.language as tl

_MAX_BLOCK_COLUMNS = 512


@triton.jit
def _line_up_kernel(
    page_rows,
    num_columns,
    context_lens,
    starts,
    pages,
    last_page_lens,
    PAGE_SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    # starts   | 0 | pages of row 0 | pages of rows 0 and 1 | ... | of all rows |
    row = tl.program_id(0)
    rows = tl.arange(0, BLOCK_ROWS)
    lens = tl.load(context_lens + rows, mask=rows < row, other=0)
    first = tl.sum((lens + PAGE_SIZE - 1) // PAGE_SIZE, axis=0)
    own_len = tl.load(context_lens + row)
    num_pages = (own_len + PAGE_SIZE - 1) // PAGE_SIZE
    tl.store(starts + row + 1, first + num_pages)
    tl.store(last_page_lens + row, own_len - (num_pages - 1) * PAGE_SIZE)
    source = page_rows + row.to(tl.int64) * tl.load(num_columns)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = column < num_pages
    tl.store(pages + first + column, tl.load(source + column, mask=inside), mask=inside)


def line_up_pages(
    page_rows: torch.Tensor,
    num_columns: torch.Tensor,
    max_columns: int,
    context_lens: torch.Tensor,
    page_size: int,
    starts: torch.Tensor,
    pages: torch.Tensor,
    last_page_lens: torch.Tensor,
) -> None:
    """Write the pages of context_lens [B] tokens of page_rows [B, C] to `pages`, row r's from starts[r] on.

    C is what num_columns [1] holds then, at most max_columns, whatever the shape says. All int32; starts
    [B + 1], whose first is 0 already, and last_page_lens [B], of rows with tokens, are written as well.
    """
    num_rows = page_rows.shape[0]
    assert page_rows.is_contiguous(), page_rows.stride()
    block_columns = min(_MAX_BLOCK_COLUMNS, triton.next_power_of_2(max_columns))
    _line_up_kernel[(num_rows, triton.cdiv(max_columns, block_columns))](
        page_rows,
        num_columns,
        context_lens,
        starts,
        pages,
        last_page_lens,
        PAGE_SIZE=page_size,
        BLOCK_ROWS=triton.next_power_of_2(num_rows),
        BLOCK_COLUMNS=block_columns,
    )
