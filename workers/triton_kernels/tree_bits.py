"""pack_tree: what tokens of trees see, from a word each, as one bit for each token and place of its row.

One launch at the beginning of a pass, for attention kernels that read masks. It overlaps with nothing: they
read what it writes before they wait for those in front of them.
"""

import torch
import triton
import triton.language as tl

_BLOCK_BYTES = 256


@triton.jit
def _pack_kernel(
    visible,
    query_starts,
    context_lens,
    bits,
    num_before,
    row_bytes,
    BLOCK_BYTES: tl.constexpr,
):
    # bits of a row   | token 0's places | token 1's | ... |
    # of a token      | places before its row's numbers: seen | as its word says |
    row = tl.program_id(0)
    first_token = tl.load(query_starts + row)
    num_tokens = tl.load(query_starts + row + 1) - first_token
    context_len = tl.load(context_lens + row)
    num_bits = num_tokens.to(tl.int64) * context_len
    first_byte = tl.program_id(1).to(tl.int64) * BLOCK_BYTES
    # What does not fit is a row of pads, which nobody attends.
    if (first_byte * 8 < num_bits) & (num_bits <= row_bytes.to(tl.int64) * 8):
        byte = first_byte + tl.arange(0, BLOCK_BYTES)
        packed = tl.zeros([BLOCK_BYTES], dtype=tl.int32)
        first_number = context_len - num_tokens - num_before
        for place in tl.static_range(8):
            bit = byte * 8 + place
            token = bit // context_len
            number = bit - token * context_len - first_number
            inside = bit < num_bits
            word = tl.load(visible + first_token + token, mask=inside, other=0)
            shift = tl.minimum(tl.maximum(number, 0), 63)
            is_seen = (number < 0) | ((number < 64) & (((word >> shift) & 1) != 0))
            packed |= (is_seen & inside).to(tl.int32) << place
        tl.store(bits + row.to(tl.int64) * row_bytes + byte, packed.to(tl.uint8), mask=byte * 8 < num_bits)


def pack_tree(
    visible: torch.Tensor,
    query_starts: torch.Tensor,
    context_lens: torch.Tensor,
    num_before: int,
    bits: torch.Tensor,
    row_bytes: int,
) -> None:
    """Write to `bits`, row_bytes of uint8 a row, what visible [tokens] int64 says; see TokenTree, TreeMask.

    query_starts [rows + 1] and context_lens [rows] int32. Rows that do not fit are left out.
    """
    num_rows = context_lens.shape[0]
    assert len(bits) >= num_rows * row_bytes and visible.dtype == torch.int64, (len(bits), visible.dtype)
    _pack_kernel[(num_rows, triton.cdiv(row_bytes, _BLOCK_BYTES))](
        visible, query_starts, context_lens, bits, num_before, row_bytes, BLOCK_BYTES=_BLOCK_BYTES
    )
