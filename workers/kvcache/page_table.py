"""PageTable: which page holds which part of each running request, on one rank. The engine's thread only.

Rows change by the plan's ops alone. Token locations are derived from it when inputs are staged and kept by
nobody (I4). It lies in host memory: what a forward pass reads is a staged copy (I3).
"""

import numpy as np
import numpy.typing as npt

from workers.kvcache.kv_pool import DUMMY_PAGE
from workers.plan import CloseSlot, SetRow


class PageTableError(RuntimeError):
    """An index outside the legal range: a bug of ours, never clamped; the replica stops."""


class PageTable:
    """`rows` int32 [max_slots + 1, pages_per_row]; row `dummy_slot`, the last, is all dummy pages.

    `checked` verifies the index of every token and row that is staged; ops are verified always.
    """

    def __init__(
        self, max_slots: int, pages_per_row: int, page_size: int, num_pages: int, checked: bool
    ) -> None:
        assert page_size.bit_count() == 1, f"page_size {page_size} is no power of two"
        self.rows: npt.NDArray[np.int32] = np.zeros((max_slots + 1, pages_per_row), dtype=np.int32)
        self.max_slots = max_slots
        self.dummy_slot = max_slots
        self.page_size = page_size
        self.num_pages = num_pages
        self._checked = checked
        self._shift = page_size.bit_length() - 1

    @property
    def pages_per_row(self) -> int:
        """Count the pages of the longest possible request."""
        return int(self.rows.shape[1])

    def set_row(self, op: SetRow) -> None:
        """Apply rows[slot, first : first + len(pages)] = pages."""
        self._check_slot(op.slot)
        stop = op.first + len(op.pages)
        if op.first < 0 or stop > self.pages_per_row:
            raise PageTableError(
                f"slot {op.slot}: pages {op.first} .. {stop - 1} of a row of {self.pages_per_row};"
                " the request is longer than max_context_len"
            )
        if op.pages and (min(op.pages) <= DUMMY_PAGE or max(op.pages) > self.num_pages):
            raise PageTableError(f"slot {op.slot}: pages {op.pages}; allowed are 1 .. {self.num_pages}")
        self.rows[op.slot, op.first : stop] = op.pages

    def close_slot(self, op: CloseSlot) -> None:
        """Turn the slot's row into dummy pages."""
        self._check_slot(op.slot)
        self.rows[op.slot] = DUMMY_PAGE

    def held(self) -> dict[int, list[int]]:
        """Return the pages of every slot that has some."""
        rows = self.rows[: self.max_slots]
        return {slot: np.trim_zeros(row, "b").tolist() for slot, row in enumerate(rows) if row.any()}

    def stage_rows(self, slots: npt.NDArray[np.int64], out: npt.NDArray[np.int32]) -> None:
        """Copy the first out.shape[1] pages of each slot's row to `out` [len(slots), pages]."""
        if self._checked:
            self._check_range("slot", slots, self.dummy_slot + 1)
        np.take(self.rows[:, : out.shape[1]], slots, axis=0, out=out)

    def stage_locations(
        self,
        slots: npt.NDArray[np.int64],
        positions: npt.NDArray[np.int64],
        out: npt.NDArray[np.int64],
    ) -> None:
        """Write page * page_size + offset of each token to `out` [tokens]; `slots` is per token.

        In checked mode a token on the dummy page raises: only padded rows go there, and not through here.
        """
        columns = positions >> self._shift
        if self._checked:
            self._check_range("slot", slots, self.max_slots)
            self._check_range("position", positions, self.pages_per_row * self.page_size)
        out[:] = self.rows[slots, columns]  # widened to 64 bits before the product
        out <<= self._shift
        out += positions & (self.page_size - 1)
        if self._checked and (on_dummy := np.flatnonzero(out < self.page_size)).size:
            token = int(on_dummy[0])
            raise PageTableError(
                f"slot {slots[token]} has no page for position {positions[token]}: found the dummy page;"
                " pages are reserved (SetRow) before the step that writes them"
            )

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < self.max_slots:
            raise PageTableError(f"slot {slot}; allowed are 0 .. {self.max_slots - 1}")

    @staticmethod
    def _check_range(what: str, found: npt.NDArray[np.int64], stop: int) -> None:
        bad = found[(found < 0) | (found >= stop)]
        if bad.size:
            raise PageTableError(f"{what} {bad[0]}; allowed are 0 .. {stop - 1}")
