"""one_shot sums: every rank sends its part to every other and adds up all of them itself, in one kernel.

A message carries its own proof of arrival, so that a sum takes one trip over the link and no barrier:

    word      [ number of the sum : 32 | two elements of the part : 32 ]   written and read as one
    inbox     [ parity of that number | row | sender | words ]             on each rank

A program owns one row and counts the sums of that row itself, in `epochs`, so that a captured launch may be
replayed at any time. Why the next sum but one may write over an inbox: a rank sends sum n + 1 once its whole
kernel of sum n is over, and nobody begins sum n + 2 before every rank's sum n + 1 has come. Parts are added
in the order of the ranks, in float32: the result is the same on all of them. A rank that stopped waiting for
a part sends nothing from then on: what it computes from there is no peer's to add.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

from workers.triton_kernels.launching import await_inputs, launch_options, let_next_begin

DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

_LOOKS_AT_ONCE: tl.constexpr = tl.constexpr(1024)
"""Looks at an inbox between two at the host's word and the clock, which are slow to read."""


@dataclass(frozen=True)
class OneShotMemory:
    """What the sums of one rank work on. `inboxes`: the addresses at which every rank's inbox, once zeros, is
    mapped here; `epochs` [max_rows] int32, once zeros: sums that each row's program has made."""

    rank: int
    inboxes: tuple[int, ...]
    epochs: torch.Tensor
    max_words: int
    """Of a row, a power of two"""
    is_over: torch.Tensor
    """[1] int32 of the host's, where the device can read it: not 0 once no part is to be waited for"""
    has_left: torch.Tensor
    """[1] int32, once 0: not 0 once a part was not waited for"""
    timeout_s: float
    """A part that has not come by then ends the kernel, and the process's use of the device, with an error;
    0: never."""

    @property
    def max_rows(self) -> int:
        """Of a sum."""
        return len(self.epochs)


def inbox_bytes(num_ranks: int, max_rows: int, max_words: int) -> int:
    """Return how long a rank's inbox is."""
    return 2 * max_rows * num_ranks * max_words * 8


@triton.jit
def _low(words, DTYPE: tl.constexpr):
    return (words & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def _high(words, DTYPE: tl.constexpr):
    return (words >> 16).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def _words(low, high, DTYPE: tl.constexpr):
    first = low.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32)
    second = high.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32)
    return (second << 16) | (first & 0xFFFF)


@triton.jit
def _have_come(found, inside, epoch):
    return tl.min(tl.where(inside, ((found >> 32).to(tl.int32) == epoch).to(tl.int32), 1), axis=0)


@triton.jit
def _receive(places, inside, epoch, is_over_at, has_left, timeout_ns, TIMED: tl.constexpr):
    """Return the words of a part, once all have come; whatever is there once the sums are over."""
    found = tl.load(places, mask=inside, other=0, volatile=True)
    # One thread looks for all: they leave together.
    first = tl.arange(0, places.shape[0]) == 0
    is_over = 0
    num_looks = 0
    begun = tl.full([], 0, tl.int64)
    while (_have_come(found, inside, epoch) == 0) & (is_over == 0):
        found = tl.load(places, mask=inside, other=0, volatile=True)
        num_looks += 1
        if num_looks % _LOOKS_AT_ONCE == 0:
            words_at = is_over_at.to(tl.pointer_type(tl.int32)) + tl.zeros(places.shape, tl.int32)
            is_over = tl.max(tl.load(words_at, mask=first, other=0, volatile=True), axis=0)
            if TIMED:
                now = globaltimer()
                if begun == 0:
                    begun = now
                if now - begun > timeout_ns:
                    tl.inline_asm_elementwise(
                        "trap; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
                    )
    if is_over != 0:
        tl.store(has_left, 1)
    return found.to(tl.int32)


@triton.jit(do_not_specialize=["is_over_at", "timeout_ns"])
def _sum_kernel(
    part,
    x,
    weight,
    total,
    out,
    inboxes,
    epochs,
    eps,
    num_words,
    is_over_at,
    has_left,
    timeout_ns,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    MAX_ROWS: tl.constexpr,
    MAX_WORDS: tl.constexpr,
    WORDS: tl.constexpr,
    NORMS: tl.constexpr,
    DTYPE: tl.constexpr,
    TIMED: tl.constexpr,
    PDL: tl.constexpr,
):
    # every matrix is one of words: two elements of DTYPE side by side
    let_next_begin(PDL)
    row = tl.program_id(0)
    word = tl.arange(0, WORDS)
    inside = word < num_words
    place = row.to(tl.int64) * num_words + word
    await_inputs(PDL)
    epoch = tl.load(epochs + row) + 1
    sends = tl.load(has_left) == 0
    own = tl.load(part + place, mask=inside, other=0)
    slot = ((epoch & 1) * MAX_ROWS + row) * RANKS
    message = (epoch.to(tl.int64) << 32) | (own.to(tl.int64) & 0xFFFFFFFF)
    for peer in tl.static_range(RANKS):
        if peer != RANK:
            inbox = inboxes[peer].to(tl.pointer_type(tl.int64))
            tl.store(inbox + (slot + RANK).to(tl.int64) * MAX_WORDS + word, message, mask=inside & sends)
    if NORMS:  # on their way while the parts are
        stream = tl.load(x + place, mask=inside, other=0)
        scale = tl.load(weight + word, mask=inside, other=0)
    inbox = inboxes[RANK].to(tl.pointer_type(tl.int64))
    low = tl.zeros([WORDS], tl.float32)
    high = tl.zeros([WORDS], tl.float32)
    for peer in tl.static_range(RANKS):
        if peer == RANK:
            low += _low(own, DTYPE)
            high += _high(own, DTYPE)
        else:
            places = inbox + (slot + peer).to(tl.int64) * MAX_WORDS + word
            words = _receive(places, inside, epoch, is_over_at, has_left, timeout_ns, TIMED)
            low += _low(words, DTYPE)
            high += _high(words, DTYPE)
    summed = _words(low, high, DTYPE)
    if NORMS:
        # As two kernels would: rounded where the sum is, and where the stream is.
        summed = _words(
            _low(summed, DTYPE) + _low(stream, DTYPE), _high(summed, DTYPE) + _high(stream, DTYPE), DTYPE
        )
        low, high = _low(summed, DTYPE), _high(summed, DTYPE)
        # 1.0 / sqrt, not rsqrt: the approximation would round otherwise than torch's
        factor = 1.0 / tl.sqrt_rn(tl.sum(low * low + high * high, axis=0) / (2 * num_words) + eps)
        normal = _words(low * factor, high * factor, DTYPE)
        scaled = _words(
            _low(normal, DTYPE) * _low(scale, DTYPE), _high(normal, DTYPE) * _high(scale, DTYPE), DTYPE
        )
        tl.store(out + place, scaled, mask=inside)
    tl.store(total + place, summed, mask=inside)
    tl.store(epochs + row, epoch)


@triton.jit(do_not_specialize=["is_over_at", "timeout_ns"])
def _best_kernel(
    keys,
    ids,
    inboxes,
    epochs,
    is_over_at,
    has_left,
    timeout_ns,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    MAX_ROWS: tl.constexpr,
    MAX_WORDS: tl.constexpr,
    TIMED: tl.constexpr,
    PDL: tl.constexpr,
):
    # keys [rows, 2] int32 words, the lower first
    let_next_begin(PDL)
    row = tl.program_id(0)
    word = tl.arange(0, 2)
    inside = word < 2
    await_inputs(PDL)
    epoch = tl.load(epochs + row) + 1
    sends = tl.load(has_left) == 0
    own = tl.load(keys + row * 2 + word)
    slot = ((epoch & 1) * MAX_ROWS + row) * RANKS
    message = (epoch.to(tl.int64) << 32) | (own.to(tl.int64) & 0xFFFFFFFF)
    for peer in tl.static_range(RANKS):
        if peer != RANK:
            inbox = inboxes[peer].to(tl.pointer_type(tl.int64))
            tl.store(inbox + (slot + RANK).to(tl.int64) * MAX_WORDS + word, message, mask=inside & sends)
    inbox = inboxes[RANK].to(tl.pointer_type(tl.int64))
    best = _whole(own, word)
    for peer in tl.static_range(RANKS):
        if peer != RANK:
            places = inbox + (slot + peer).to(tl.int64) * MAX_WORDS + word
            best = tl.maximum(
                best, _whole(_receive(places, inside, epoch, is_over_at, has_left, timeout_ns, TIMED), word)
            )
    tl.store(ids + row, 0xFFFFFFFF - (best & 0xFFFFFFFF))
    tl.store(epochs + row, epoch)


@triton.jit
def _whole(words, word):
    wide = words.to(tl.int64)
    return tl.sum(tl.where(word == 0, wide & 0xFFFFFFFF, wide << 32), axis=0)


def takes(memory: OneShotMemory, part: torch.Tensor) -> bool:
    """Tell whether parts of this shape and dtype can be summed here."""
    rows, size = part.shape
    return (
        part.dtype in DTYPES
        and size % 2 == 0
        and triton.next_power_of_2(size // 2) <= memory.max_words
        and rows <= memory.max_rows
    )


def sum_parts(memory: OneShotMemory, part: torch.Tensor, *, pdl: bool) -> torch.Tensor:
    """Return the sum of all ranks' `part` [rows, size], contiguous. All ranks call it together."""
    total = torch.empty_like(part)
    _launch(memory, part, None, None, 0.0, total, None, pdl)
    return total


def sum_add_rms_norm(
    memory: OneShotMemory,
    x: torch.Tensor,
    part: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    pdl: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x + the sum of all ranks' `part`, and that normalised; all [rows, size] contiguous."""
    assert x.is_contiguous() and x.shape == part.shape, (x.stride(), x.shape, part.shape)
    total, out = torch.empty_like(x), torch.empty_like(x)
    _launch(memory, part, x, weight, eps, total, out, pdl)
    return total, out


def best_ids(memory: OneShotMemory, keys: torch.Tensor, *, pdl: bool) -> torch.Tensor:
    """Return the token ids in the largest of all ranks' `keys`, [rows] int64 each, of at most max_rows."""
    rows = len(keys)
    assert rows <= memory.max_rows and keys.is_contiguous(), (rows, keys.stride())
    ids = torch.empty_like(keys)
    if rows:
        _best_kernel[(rows,)](
            keys.view(torch.int32),
            ids,
            memory.inboxes,
            memory.epochs,
            memory.is_over.data_ptr(),
            memory.has_left,
            int(memory.timeout_s * 1e9),
            RANK=memory.rank,
            RANKS=len(memory.inboxes),
            MAX_ROWS=memory.max_rows,
            MAX_WORDS=memory.max_words,
            TIMED=memory.timeout_s > 0,
            PDL=pdl,
            num_warps=1,
            **launch_options(pdl),
        )
    return ids


def _launch(
    memory: OneShotMemory,
    part: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    total: torch.Tensor,
    out: torch.Tensor | None,
    pdl: bool,
) -> None:
    assert part.is_contiguous() and takes(memory, part), (part.shape, part.stride(), part.dtype)
    rows, num_words = part.shape[0], part.shape[1] // 2
    if rows == 0:
        return
    words = triton.next_power_of_2(num_words)
    _sum_kernel[(rows,)](
        *(None if each is None else each.view(torch.int32) for each in (part, x, weight, total, out)),
        memory.inboxes,
        memory.epochs,
        eps,
        num_words,
        memory.is_over.data_ptr(),
        memory.has_left,
        int(memory.timeout_s * 1e9),
        RANK=memory.rank,
        RANKS=len(memory.inboxes),
        MAX_ROWS=memory.max_rows,
        MAX_WORDS=memory.max_words,
        WORDS=words,
        NORMS=out is not None,
        DTYPE=DTYPES[part.dtype],
        TIMED=memory.timeout_s > 0,
        PDL=pdl,
        num_warps=min(max(words // 64, 1), 32),
        **launch_options(pdl),
    )
