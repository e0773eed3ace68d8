"""BundleLayout: places, padding, fingerprint and refusals."""

import dataclasses

import pytest

from workers.kvcache.layout import (
    BUNDLE_ALIGNMENT,
    SECTION_ALIGNMENT,
    BundleLayout,
    LayoutError,
    Section,
    SectionShape,
    target_only,
)


def shapes(
    target: tuple[int, ...] = (2, 2, 4, 2, 8), tail: tuple[int, ...] = (24,)
) -> tuple[SectionShape, ...]:
    return (
        SectionShape("target", "bfloat16", target),
        SectionShape("draft", "bfloat16", (1, 2, 4, 2, 8)),
        SectionShape("index", "uint8", (2, 4, 5)),
        SectionShape("tail", "float32", tail),
    )


def test_sections_follow_each_other_at_aligned_places() -> None:
    layout = BundleLayout.of(4, shapes())
    target, draft, index, tail = layout.sections
    assert (target.offset, target.num_bytes) == (0, 512)
    assert (draft.offset, draft.num_bytes) == (512, 256)
    assert (index.offset, index.num_bytes) == (768, 40)
    assert (tail.offset, tail.num_bytes) == (1024, 96)
    assert layout.section("index") is index


def test_small_bundles_are_padded_to_256_bytes_and_large_ones_to_4096() -> None:
    assert BundleLayout.of(4, shapes()).bundle_bytes == 1280
    # SmolLM2-135M: 30 layers, K and V, 16 tokens, 3 heads of 64, bf16.
    layout = target_only(30, 16, 3, 64, "bfloat16")
    assert layout.section("target").num_bytes == 368_640
    assert layout.bundle_bytes == 368_640  # a multiple of 4,096 by itself
    assert target_only(3, 16, 3, 64, "bfloat16").bundle_bytes == 36_864
    odd = target_only(31, 16, 3, 63, "bfloat16")
    assert odd.bundle_bytes % BUNDLE_ALIGNMENT == 0
    assert 0 <= odd.bundle_bytes - odd.section("target").num_bytes < BUNDLE_ALIGNMENT


@pytest.mark.parametrize("page_size", [1, 2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("num_layers", [1, 2, 7, 30])
def test_padding_never_exceeds_a_tenth_where_256_would_do(page_size: int, num_layers: int) -> None:
    layout = target_only(num_layers, page_size, 3, 64, "bfloat16")
    padding = layout.bundle_bytes - layout.section("target").num_bytes
    assert padding < SECTION_ALIGNMENT or padding <= 0.10 * layout.bundle_bytes


def test_empty_sections_take_no_bytes() -> None:
    layout = target_only(2, 4, 2, 8, "float32")
    assert [section.num_bytes for section in layout.sections] == [1024, 0, 0, 0]
    layout.check()


def test_fingerprints_differ_wherever_bytes_mean_something_else() -> None:
    layouts = [
        BundleLayout.of(4, shapes()),
        BundleLayout.of(4, shapes(tail=(12,))),
        BundleLayout.of(4, shapes(target=(2, 2, 4, 1, 16))),
        target_only(2, 4, 2, 8, "bfloat16"),
        target_only(2, 4, 2, 8, "float16"),
        target_only(2, 8, 1, 8, "bfloat16"),
        target_only(2, 8, 2, 4, "bfloat16"),
    ]
    assert len({layout.fingerprint() for layout in layouts}) == len(layouts)
    assert layouts[0].fingerprint() == BundleLayout.of(4, shapes()).fingerprint()
    assert len(layouts[0].fingerprint()) == 32


def test_the_fingerprint_does_not_depend_on_the_process() -> None:
    assert target_only(2, 4, 2, 8, "bfloat16").fingerprint() == "1a14eb1ba4dd2c8c7ed22305f993111a"


def test_illegal_bundles_are_refused_by_name() -> None:
    with pytest.raises(LayoutError, match="sections are"):
        BundleLayout.of(4, shapes()[:3])
    with pytest.raises(LayoutError, match="sections are"):
        BundleLayout.of(4, shapes()[::-1])
    with pytest.raises(LayoutError, match="tail has shape"):
        BundleLayout.of(4, shapes(tail=(-1,)))
    with pytest.raises(LayoutError, match="all sections are empty"):
        target_only(0, 4, 2, 8, "bfloat16")


def test_check_finds_overlap_misplacement_and_a_short_bundle() -> None:
    layout = BundleLayout.of(4, shapes())
    target, draft, *rest = layout.sections
    for offset in (256, 513):
        moved = Section(draft.name, draft.dtype, draft.shape, offset)
        with pytest.raises(LayoutError, match="draft starts at byte"):
            dataclasses.replace(layout, sections=(target, moved, *rest)).check()
    for num_bytes in (1024, 1281):
        with pytest.raises(LayoutError, match="bundle_bytes"):
            dataclasses.replace(layout, bundle_bytes=num_bytes).check()
