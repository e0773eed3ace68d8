"""The rows of a batch as FlashInfer's kernels plan them: which of them, filled up to what a graph has."""

import numpy as np

from workers.attention.flashinfer_kernels import HostRows
from workers.engine.forward_batch import ForwardBatch, IntArray


def rows_between(batch: ForwardBatch, page_starts: IntArray, first: int, stop: int) -> HostRows:
    """Return rows first .. stop - 1."""
    query_starts = batch.host_query_starts[first : stop + 1]
    return HostRows(
        query_starts=query_starts,
        page_starts=page_starts[first : stop + 1],
        context_lens=batch.host_context_lens[first:stop],
        num_tokens=int(query_starts[-1] - query_starts[0]),
        is_captured=batch.bucket is not None,
        is_causal=batch.tree is None,
    )


def num_verified_rows(batch: ForwardBatch) -> int:
    """Return how many rows a verify bucket is planned with: as many as tokens, so that a block of threads
    takes the queries of a short row. Most have none."""
    assert batch.bucket is not None
    return max(batch.bucket.size, batch.num_rows)


def verified_rows(batch: ForwardBatch, page_starts: IntArray) -> HostRows:
    """Return a verify bucket's rows, filled up with rows of no tokens; pads among them, but for trees, whose
    masks have no room for these."""
    assert batch.bucket is not None
    num_rows = num_verified_rows(batch)
    stop = batch.num_rows if batch.tree is None else batch.num_real_rows
    return HostRows(
        query_starts=_filled_up(batch.host_query_starts[: stop + 1], num_rows + 1),
        page_starts=_filled_up(page_starts[: stop + 1], num_rows + 1),
        context_lens=_filled_up(batch.host_context_lens[:stop], num_rows, 0),
        num_tokens=batch.bucket.size,
        is_captured=True,
        is_causal=batch.tree is None,
    )


def captured_rows(batch: ForwardBatch, page_starts: IntArray) -> tuple[HostRows, HostRows]:
    """Return a mixed bucket's rows of one token and those of more, each filled up with rows of none.

    rows  | one token each | more tokens | pads |
          0                num_short     num_real
    """
    assert batch.bucket is not None
    starts, lens = batch.host_query_starts, batch.host_context_lens
    num_real = batch.num_real_rows
    num_short = int((np.diff(starts[: num_real + 1]) == 1).sum())
    max_short, max_long = batch.num_rows - 1, max_long_rows(batch)
    return (
        HostRows(
            query_starts=_filled_up(starts[: num_short + 1], max_short + 1),
            page_starts=_filled_up(page_starts[: num_short + 1], max_short + 1),
            context_lens=_filled_up(lens[:num_short], max_short, 0),
            num_tokens=max_short,
            is_captured=True,
        ),
        HostRows(
            query_starts=_filled_up(starts[num_short : num_real + 1], max_long + 1),
            page_starts=_filled_up(page_starts[num_short : num_real + 1], max_long + 1),
            context_lens=_filled_up(lens[num_short:num_real], max_long, 0),
            num_tokens=batch.bucket.size,
            is_captured=True,
        ),
    )


def max_long_rows(batch: ForwardBatch) -> int:
    """Return how many rows of two tokens or more a mixed bucket holds."""
    assert batch.bucket is not None
    return max(1, min(batch.num_rows - 1, batch.bucket.size // 2))


def _filled_up(values: IntArray, length: int, value: int | None = None) -> IntArray:
    """Return `values` and, up to `length`, the last of them or `value`."""
    filled = np.full(length, values[-1] if value is None else value, dtype=np.int32)
    filled[: len(values)] = values
    return filled
