"""PageTable: rows follow the ops, locations are derived, nothing is clamped."""

import numpy as np
import pytest

from workers.kvcache.page_table import PageTable, PageTableError
from workers.plan import CloseSlot, SetRow


def table(checked: bool = True) -> PageTable:
    return PageTable(max_slots=3, pages_per_row=5, page_size=4, num_pages=20, checked=checked)


def set_row(slot: int, first: int, pages: list[int]) -> SetRow:
    return SetRow(slot, first, pages, [1] * len(pages), [])


def locations(of: PageTable, slots: list[int], positions: list[int]) -> list[int]:
    out = np.full(len(slots), -1, dtype=np.int64)
    of.stage_locations(np.array(slots), np.array(positions), out)
    return out.tolist()


def test_rows_follow_the_ops() -> None:
    rows = table()
    rows.set_row(set_row(1, 0, [7, 8]))
    rows.set_row(set_row(1, 2, [20]))
    rows.set_row(set_row(2, 0, [3]))
    rows.set_row(set_row(1, 1, [9]))
    assert rows.rows.tolist() == [[0] * 5, [7, 9, 20, 0, 0], [3, 0, 0, 0, 0], [0] * 5]
    rows.close_slot(CloseSlot(1))
    assert rows.rows[1].tolist() == [0] * 5
    assert rows.rows[2].tolist() == [3, 0, 0, 0, 0]


def test_locations_are_page_times_page_size_plus_offset() -> None:
    rows = table()
    rows.set_row(set_row(0, 0, [7, 2]))
    rows.set_row(set_row(2, 0, [20]))
    assert locations(rows, [0, 0, 0, 2], [0, 3, 4, 1]) == [28, 31, 8, 81]


def test_staged_rows_are_copies() -> None:
    rows = table()
    rows.set_row(set_row(0, 0, [7, 2]))
    out = np.full((2, 3), -1, dtype=np.int32)
    rows.stage_rows(np.array([rows.dummy_slot, 0]), out)
    rows.close_slot(CloseSlot(0))
    assert out.tolist() == [[0, 0, 0], [7, 2, 0]]


def test_the_last_legal_page_and_position_are_legal() -> None:
    rows = table()
    rows.set_row(set_row(0, 0, [1, 2, 3, 4, 20]))
    assert locations(rows, [0], [19]) == [20 * 4 + 3]


@pytest.mark.parametrize(
    ("op", "message"),
    [
        (set_row(3, 0, [1]), r"slot 3; allowed are 0 \.\. 2"),
        (set_row(-1, 0, [1]), "slot -1"),
        (set_row(0, 4, [1, 2]), r"pages 4 \.\. 5 of a row of 5"),
        (set_row(0, -1, [1]), "pages -1"),
        (set_row(0, 0, [0]), r"allowed are 1 \.\. 20"),
        (set_row(0, 0, [1, 21]), r"allowed are 1 \.\. 20"),
    ],
)
@pytest.mark.parametrize("checked", [True, False])
def test_illegal_ops_are_refused_and_change_nothing(op: SetRow, message: str, checked: bool) -> None:
    rows = table(checked)
    with pytest.raises(PageTableError, match=message):
        rows.set_row(op)
    assert not rows.rows.any()


@pytest.mark.parametrize(
    ("slot", "position", "message"),
    [
        (0, 20, r"position 20; allowed are 0 \.\. 19"),
        (0, -1, "position -1"),
        (3, 0, r"slot 3; allowed are 0 \.\. 2"),
        (-1, 0, "slot -1"),
        (0, 8, "no page for position 8"),
    ],
)
def test_checked_mode_names_an_index_outside_the_range(slot: int, position: int, message: str) -> None:
    rows = table()
    rows.set_row(set_row(0, 0, [7, 2]))
    with pytest.raises(PageTableError, match=message):
        locations(rows, [0, slot], [0, position])


def test_checked_mode_names_a_row_outside_the_range() -> None:
    with pytest.raises(PageTableError, match="slot 4"):
        table().stage_rows(np.array([4]), np.zeros((1, 5), dtype=np.int32))
