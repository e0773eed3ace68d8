"""KVSanitizer: proves on each step that attention reads what the tree says and writes what its row owns.

Shadow metadata of pages and rows follows the plan's ops; the staged inputs are then held against it, and
freed pages are poisoned with NaN. Owned by the Engine, in its thread; it reads what the device really holds.
Of pages that a SAVE or LOAD may touch its MoveShadow knows.
"""

from collections.abc import Callable
from typing import NoReturn

import numpy as np
import numpy.typing as npt
import torch

from workers.engine.forward_batch import ForwardBatch
from workers.kvcache.kv_pool import DUMMY_PAGE, KVPool
from workers.kvcache.move_shadow import MoveShadow, MoveWitness
from workers.kvcache.sanitizer_error import SanitizerError
from workers.plan import (
    CloseSlot,
    CompletePages,
    FreePages,
    LoadPages,
    OpenSlot,
    OwnPages,
    PlanOp,
    SavePages,
    SetRow,
)

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]

_FREE, _OWNED, _LOADING, _COMPLETE, _DUMMY = range(5)
_STATE_NAMES = ("free", "owned", "loading", "complete", "dummy")
_NOBODY = -1
"""No slot, in an array of slots: the checks compare whole arrays with slots, and no slot is negative."""


class KVSanitizer:
    """Shadow of one rank's pool and page table. `poisons_pages` is false in mutation tests only.

    `checks_bytes` off, the mode `checked`, leaves every check of an index, its owner and its order; the bytes
    of pages, logits and copies are nobody's. `check_peers` raises where the device has computed without some
    rank: what then looks wrong is not.
    """

    def __init__(
        self,
        pool: KVPool,
        max_slots: int,
        pages_per_row: int,
        poisons_pages: bool = True,
        *,
        checks_bytes: bool = True,
        check_peers: Callable[[], None] = lambda: None,
    ) -> None:
        num_pages = pool.num_pages + 1
        rows = (max_slots + 1, pages_per_row)
        self.num_steps = 0
        self._pool = pool
        self._page_size = pool.page_size
        self._dummy_slot = max_slots
        self._checks_bytes = checks_bytes
        self._check_peers = check_peers
        self._poisons_pages = poisons_pages = poisons_pages and checks_bytes
        # A page: its state, its id's generation, the tokens written from its first place on, the slot that
        # may write it and, once it is complete, its key.
        self._state = np.full(num_pages, _FREE, dtype=np.int8)
        self._state[DUMMY_PAGE] = _DUMMY
        self._generation = np.zeros(num_pages, dtype=np.int64)  # the pool's generations count from 1
        self._num_written = np.zeros(num_pages, dtype=np.int64)
        self._owner = np.full(num_pages, _NOBODY, dtype=np.int64)
        self._key = np.zeros((num_pages, 2), dtype=np.uint64)
        # A row's entry: the page the plan put there, its generation and, for a shared prefix, its key.
        self._row_page = np.zeros(rows, dtype=np.int64)
        self._row_generation = np.zeros(rows, dtype=np.int64)
        self._row_is_shared = np.zeros(rows, dtype=np.bool_)
        self._row_key = np.zeros((*rows, 2), dtype=np.uint64)
        self._written: tuple[IntArray, IntArray] | None = None
        self._moves: MoveShadow | None = None
        if poisons_pages:
            pool.poison_all()

    def watch(self, mover: MoveWitness | None) -> None:
        """Follow SAVEs and LOADs, as carried out by `mover`, from the next plan on."""
        self._moves = MoveShadow(mover, self._checks_bytes) if mover else None

    def apply(self, ops: list[PlanOp]) -> None:
        """Follow a plan's ops, in order; its moves begin after that.

        Raises SanitizerError where an op does not fit the page's state.
        """
        freed: list[int] = []
        if self._moves:
            self._moves.settle()
        for op in ops:
            match op:
                case OwnPages():
                    self._own(op)
                case CompletePages():
                    self._complete(op)
                case SetRow():
                    self._set_row(op)
                case FreePages():
                    self._free(op)
                    freed += op.pages
                case CloseSlot():
                    self._row_page[op.slot] = DUMMY_PAGE
                    self._row_is_shared[op.slot] = False
                case SavePages():
                    self._save(op)
                case LoadPages():
                    self._load(op)
                case OpenSlot():
                    pass
        if freed:
            self._check_unreferenced(freed)

    def check_inputs(self, batch: ForwardBatch, slots: IntArray, is_draft: bool = False) -> None:
        """Hold a staged batch against the shadow; `slots` [rows] is the plan's, the dummy slot for pads.

        `is_draft`: a pass of the draft, which goes ahead of what the target has written.
        """
        # A sanitizer may wait for the device.
        if self._checks_bytes and self._pool.data[DUMMY_PAGE].any().item():
            raise SanitizerError("dummy_page_zero", None, DUMMY_PAGE, "zeros", "other bytes")
        # What the forward pass will read, not what we meant to stage: on CUDA these copies wait.
        page_rows = batch.page_rows.cpu().numpy().astype(np.int64)
        context_lens = batch.context_lens.cpu().numpy().astype(np.int64)
        query_starts = batch.query_starts.cpu().numpy().astype(np.int64)
        locations = batch.out_locations.cpu().numpy()
        self._check_pads(batch.num_real_rows, slots, page_rows, context_lens, query_starts, locations)

        num_rows = batch.num_real_rows
        slots, context_lens = slots[:num_rows], context_lens[:num_rows]
        query_starts = query_starts[: num_rows + 1]
        starts = context_lens - np.diff(query_starts)
        self._check_reads(slots, page_rows[:num_rows], starts, context_lens, is_draft)
        written = self._check_writes(slots, starts, query_starts, locations[: query_starts[-1]])
        if not is_draft:
            self._written = written
            self.num_steps += 1

    def check_outputs(self, logits: torch.Tensor | None, slots: list[int]) -> None:
        """Take the batch's writes as done; `logits` [samples, vocab], of `slots`, must be finite."""
        if self._written is not None:
            pages, ends = self._written
            np.maximum.at(self._num_written, pages, ends)
            self._written = None
        if logits is None or not self._checks_bytes:
            return
        finite = torch.isfinite(logits).all(dim=-1)
        if not finite.all().item():  # a sanitizer may wait for the device
            self._check_peers()
            slot = slots[int((~finite).nonzero()[0].item())]
            raise SanitizerError(
                "finite_logits", slot, int(self._row_page[slot, 0]), "finite logits", "inf or NaN"
            )

    def rewind(self, slot: int, num_tokens: int) -> None:
        """Take what a slot has beyond its first `num_tokens` tokens as not written: wrong drafts."""
        first = num_tokens // self._page_size
        pages = self._row_page[slot, first:]
        pages = pages[(self._owner[pages] == slot) & (self._state[pages] == _OWNED)]
        limits = np.zeros(len(pages), dtype=np.int64)
        if len(pages) and pages[0] == self._row_page[slot, first]:
            limits[0] = num_tokens - first * self._page_size
        self._num_written[pages] = np.minimum(self._num_written[pages], limits)

    def _own(self, op: OwnPages) -> None:
        pages = np.asarray(op.pages, dtype=np.int64)
        self._require_state("own_free", pages, (_FREE,))
        generations = np.asarray(op.generations, dtype=np.int64)
        if (stale := np.flatnonzero(generations <= self._generation[pages])).size:
            page = int(pages[stale[0]])
            raise SanitizerError(
                "generation_rises", None, page, f"> {self._generation[page]}", str(generations[stale[0]])
            )
        for page in op.pages if self._checks_bytes else ():
            if not self._pool.is_poisoned(page):
                raise SanitizerError(
                    "free_page_untouched", None, page, "the poison of a free page", "other bytes"
                )
        self._state[pages] = _OWNED
        self._generation[pages] = generations
        self._num_written[pages] = 0
        self._owner[pages] = _NOBODY

    def _complete(self, op: CompletePages) -> None:
        pages = np.asarray(op.pages, dtype=np.int64)
        self._require_state("complete_owned", pages, (_OWNED, _LOADING))
        if (partial := pages[self._num_written[pages] < self._page_size]).size:
            page = int(partial[0])
            raise SanitizerError(
                "complete_written",
                None,
                page,
                f"{self._page_size} tokens written",
                str(self._num_written[page]),
            )
        for page, key in zip(op.pages, op.keys, strict=True):
            if self._moves and self._state[page] == _LOADING:
                self._moves.check_completed(page, key)
        self._check_whole(pages[self._state[pages] == _OWNED])
        self._state[pages] = _COMPLETE
        self._owner[pages] = _NOBODY
        self._key[pages] = _key_words(op.keys)

    def _check_whole(self, pages: IntArray) -> None:
        """Hold what the device has of pages that are written against their poison, the draft's part too."""
        bare = self._pool.unwritten(pages.tolist()) if self._poisons_pages and len(pages) else None
        if bare is not None:
            page, section = bare
            raise SanitizerError("complete_parts", None, page, "all of it written", f"poison in {section}")

    def _save(self, op: SavePages) -> None:
        pages = np.asarray(op.pages, dtype=np.int64)
        self._require_state("save_complete", pages, (_COMPLETE,))
        wrong = np.flatnonzero((self._key[pages] != _key_words(op.keys)).any(axis=1))
        if wrong.size:
            page, key = op.pages[wrong[0]], op.keys[wrong[0]]
            raise SanitizerError("save_key", None, page, key.hex(), self._key[page].tobytes().hex())
        assert self._moves is not None, "moves without a mover"
        self._moves.begin(op)

    def _load(self, op: LoadPages) -> None:
        pages = np.asarray(op.pages, dtype=np.int64)
        self._require_state("load_owned", pages, (_OWNED,))
        for page in op.pages:
            if self._owner[page] != _NOBODY or (self._checks_bytes and not self._pool.is_poisoned(page)):
                raise SanitizerError(
                    "load_untouched",
                    None,
                    page,
                    "a page nobody may write, poisoned",
                    f"slot {self._owner[page]}'s" if self._owner[page] != _NOBODY else "other bytes",
                )
        self._state[pages] = _LOADING
        self._num_written[pages] = self._page_size
        assert self._moves is not None, "moves without a mover"
        self._moves.begin(op)

    def _set_row(self, op: SetRow) -> None:
        columns = slice(op.first, op.first + len(op.pages))
        self._row_page[op.slot, columns] = op.pages
        self._row_generation[op.slot, columns] = op.generations
        self._row_is_shared[op.slot, columns] = bool(op.keys)
        if op.keys:
            self._row_key[op.slot, columns] = _key_words(op.keys)
        else:
            self._owner[op.pages] = op.slot

    def _free(self, op: FreePages) -> None:
        pages = np.asarray(op.pages, dtype=np.int64)
        self._require_state("free_owned", pages, (_OWNED, _LOADING, _COMPLETE))
        if self._moves:
            for page in op.pages:
                self._moves.check_freed(page)
        self._state[pages] = _FREE
        self._owner[pages] = _NOBODY
        if self._poisons_pages:
            self._pool.poison(op.pages)

    def _check_unreferenced(self, freed: list[int]) -> None:
        held = np.isin(self._row_page, [page for page in freed if self._state[page] == _FREE])
        if held.any():
            slot, column = np.argwhere(held)[0]
            raise SanitizerError(
                "freed_page_in_row",
                int(slot),
                int(self._row_page[slot, column]),
                "no row that refers to a freed page",
                f"column {column} of the slot's row",
            )

    def _check_pads(
        self,
        num_real_rows: int,
        slots: IntArray,
        page_rows: IntArray,
        context_lens: IntArray,
        query_starts: IntArray,
        locations: IntArray,
    ) -> None:
        first_token = query_starts[num_real_rows]
        stray_rows = (
            (slots[num_real_rows:] != self._dummy_slot)
            | (page_rows[num_real_rows:] != DUMMY_PAGE).any(axis=1)
            | (context_lens[num_real_rows:] != np.diff(query_starts[num_real_rows:]))
        )
        pages = locations[first_token:] // self._page_size
        if stray_rows.any():
            row = num_real_rows + int(np.flatnonzero(stray_rows)[0])
            self._refuse_pads(f"row {row}: context_len {context_lens[row]}, pages {page_rows[row, :4]} ...")
        if (pages != DUMMY_PAGE).any():
            token = int(np.flatnonzero(pages != DUMMY_PAGE)[0])
            self._refuse_pads(f"token {first_token + token} on page {pages[token]}")

    def _refuse_pads(self, found: str) -> NoReturn:
        raise SanitizerError("pad_rows", None, DUMMY_PAGE, "tokens on the dummy page, nothing before", found)

    def _check_reads(
        self,
        slots: IntArray,
        page_rows: IntArray,
        starts: IntArray,
        context_lens: IntArray,
        is_draft: bool = False,
    ) -> None:
        #   column c of a row holds positions c * page_size .. (c + 1) * page_size - 1
        #   | written by earlier steps | written by this one |
        #   0                        start              context_len
        num_columns = min(int(-(-context_lens.max() // self._page_size)), page_rows.shape[1])
        firsts = np.arange(num_columns) * self._page_size
        read = firsts < context_lens[:, None]  # [rows, columns]
        pages = self._row_page[slots, :num_columns]
        staged = page_rows[:, :num_columns]
        self._require("staged_row", read & (staged != pages), slots, pages, pages, staged)
        state = self._state[pages]
        self._require(
            "page_owned", read & (state != _OWNED) & (state != _COMPLETE), slots, pages, "owned", state
        )
        generation = self._generation[pages]
        wanted = self._row_generation[slots, :num_columns]
        self._require("generation", read & (generation != wanted), slots, pages, wanted, generation)
        is_shared = self._row_is_shared[slots, :num_columns]
        self._require(
            "page_complete", read & is_shared & (state != _COMPLETE), slots, pages, "complete", state
        )
        key, wanted_key = self._key[pages], self._row_key[slots, :num_columns]
        differs = (key != wanted_key).any(axis=2)
        self._require("page_key", read & is_shared & differs, slots, pages, wanted_key, key)
        needed = np.zeros_like(pages) if is_draft else np.clip(starts[:, None] - firsts, 0, self._page_size)
        written = self._num_written[pages]
        self._require("page_written", read & (written < needed), slots, pages, needed, written)
        if self._moves:
            self._moves.check_reads(slots, pages, read)

    def _check_writes(
        self, slots: IntArray, starts: IntArray, query_starts: IntArray, locations: IntArray
    ) -> tuple[IntArray, IntArray]:
        """Return each token's page, and how much of it is written with that token."""
        lens = np.diff(query_starts)
        slot = np.repeat(slots, lens)  # [tokens]
        positions = np.arange(len(slot)) + np.repeat(starts - query_starts[:-1], lens)
        pages = self._row_page[slot, positions // self._page_size]
        offsets = positions % self._page_size
        wanted = pages * self._page_size + offsets
        self._require("write_location", locations != wanted, slot, pages, wanted, locations)
        state = self._state[pages]
        self._require("write_owned", state != _OWNED, slot, pages, "owned, not complete", state)
        owner = self._owner[pages]
        self._require("write_owner", owner != slot, slot, pages, slot, owner)
        return pages, offsets + 1

    def _require(
        self,
        check: str,
        broken: BoolArray,
        slots: IntArray,
        pages: IntArray,
        expected: npt.NDArray[np.generic] | str,
        found: npt.NDArray[np.generic],
    ) -> None:
        """Raise SanitizerError for the first place where `broken`; arrays are [rows, ...] like it."""
        if not broken.any():
            return
        place = tuple(np.argwhere(broken)[0])
        value = found[place]
        raise SanitizerError(
            check,
            int(slots[place[0]]),
            int(pages[place]),
            expected if isinstance(expected, str) else str(expected[place]),
            _STATE_NAMES[int(value)] if value.dtype == np.int8 else str(value),
        )

    def _require_state(self, check: str, pages: IntArray, allowed: tuple[int, ...]) -> None:
        outside = pages[(pages < DUMMY_PAGE) | (pages > self._pool.num_pages)]
        if outside.size:
            allowed_pages = f"1 .. {self._pool.num_pages}"
            raise SanitizerError("page_in_pool", None, int(outside[0]), allowed_pages, check)
        wrong = pages[~np.isin(self._state[pages], allowed)]
        if wrong.size:
            names = " or ".join(_STATE_NAMES[state] for state in allowed)
            raise SanitizerError(check, None, int(wrong[0]), names, _STATE_NAMES[int(self._state[wrong[0]])])


def _key_words(keys: list[bytes]) -> npt.NDArray[np.uint64]:
    """Return 128-bit keys as [keys, 2] words, to be compared at once."""
    return np.frombuffer(b"".join(keys), dtype=np.uint64).reshape(-1, 2)
