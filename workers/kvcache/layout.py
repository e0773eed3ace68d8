"""BundleLayout: where the parts of one KV page lie inside its contiguous run of bytes.

The same layout holds on the device, in host memory and on the wire; its fingerprint says so. No torch:
the engine, the cache service's headers and tests all compute it from the same few numbers.
"""

import hashlib
import math
from dataclasses import asdict, dataclass
from typing import Literal

import msgspec

from cache_service.keys import LAYOUT_VERSION

SectionName = Literal["target", "draft", "index", "tail"]
ElementType = Literal["float32", "bfloat16", "float16", "uint8"]

SECTION_NAMES: tuple[SectionName, ...] = ("target", "draft", "index", "tail")
ELEMENT_BYTES: dict[ElementType, int] = {"float32": 4, "bfloat16": 2, "float16": 2, "uint8": 1}

SECTION_ALIGNMENT = 256
BUNDLE_ALIGNMENT = 4096
MAX_PADDING_RATIO = 0.10


class LayoutError(ValueError):
    """Sections that make no legal bundle."""


@dataclass(frozen=True)
class SectionShape:
    """What one section of a page holds, on one rank; a shape containing 0 is an empty section.

    target and draft: [layers, 2 (K, V), page_size, kv_heads, head_dim]; index: [layers, page_size, dim];
    tail: [feature], the draft's input feature of the page's last token.
    """

    name: SectionName
    dtype: ElementType
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Count the section's bytes, without padding."""
        return math.prod(self.shape) * ELEMENT_BYTES[self.dtype]


@dataclass(frozen=True)
class Section(SectionShape):
    """A section at its place: bytes offset .. offset + num_bytes - 1 of the bundle."""

    offset: int


@dataclass(frozen=True)
class BundleLayout:
    """All sections of a page, in the order of SECTION_NAMES, and the bundle's padded size."""

    page_size: int
    sections: tuple[Section, ...]
    bundle_bytes: int

    @classmethod
    def of(cls, page_size: int, shapes: tuple[SectionShape, ...]) -> "BundleLayout":
        """Place `shapes`, one per section name, at aligned offsets and pad the total.

        Raises LayoutError where a section is missing, out of order or negative, or where all are empty.
        """
        #   | target | gap | draft | gap | index | gap | tail | padding |
        #   0        each section starts on a multiple of 256           bundle_bytes (of 4,096; of 256 if
        #                                                               that would pad more than a tenth)
        sections: list[Section] = []
        offset = 0
        for shape in shapes:
            offset = _round_up(offset, SECTION_ALIGNMENT)
            sections.append(Section(shape.name, shape.dtype, shape.shape, offset))
            offset += shape.num_bytes
        padded = _round_up(offset, BUNDLE_ALIGNMENT)
        if padded - offset > MAX_PADDING_RATIO * padded:
            padded = _round_up(offset, SECTION_ALIGNMENT)
        layout = cls(page_size, tuple(sections), padded)
        layout.check()
        return layout

    def section(self, name: SectionName) -> Section:
        """Return the section called `name`; every layout has all four."""
        return self.sections[SECTION_NAMES.index(name)]

    def fingerprint(self) -> str:
        """Return 128 bits of hex: equal exactly where two bundles' bytes mean the same."""
        canonical = msgspec.json.encode([LAYOUT_VERSION, sorted(asdict(self).items())])
        return hashlib.sha256(canonical).hexdigest()[:32]

    def check(self) -> None:
        """Raise LayoutError unless the sections are complete, aligned, disjoint and inside the bundle."""
        names = tuple(section.name for section in self.sections)
        if names != SECTION_NAMES:
            raise LayoutError(f"sections are {names}; a bundle has exactly {SECTION_NAMES}, in this order")
        end = 0
        for section in self.sections:
            if any(size < 0 for size in section.shape):
                raise LayoutError(f"section {section.name} has shape {section.shape}; sizes are >= 0")
            if section.offset % SECTION_ALIGNMENT or section.offset < end:
                raise LayoutError(
                    f"section {section.name} starts at byte {section.offset}; allowed is a multiple of"
                    f" {SECTION_ALIGNMENT} from {end} on"
                )
            end = section.offset + section.num_bytes
        if end == 0:
            raise LayoutError("all sections are empty; a page must hold something")
        if self.bundle_bytes < end or self.bundle_bytes % SECTION_ALIGNMENT:
            raise LayoutError(
                f"bundle_bytes is {self.bundle_bytes}; allowed is a multiple of {SECTION_ALIGNMENT} >= {end}"
            )


@dataclass(frozen=True)
class DraftShape:
    """What a draft adds to a page on one rank: its layers' KV, and the feature [feature_size] of the last
    token."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    feature_size: int


def target_only(
    num_layers: int, page_size: int, num_kv_heads: int, head_dim: int, dtype: ElementType
) -> BundleLayout:
    """Return the layout of a model without draft, sparse index and tail: those sections are empty."""
    no_draft = DraftShape(0, num_kv_heads, head_dim, 0)
    return with_draft(num_layers, page_size, num_kv_heads, head_dim, dtype, no_draft)


def with_draft(
    num_layers: int,
    page_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: ElementType,
    draft: DraftShape,
) -> BundleLayout:
    """Return the layout of a model with a draft beside it, and without sparse index."""
    draft_kv = (draft.num_layers, 2, page_size, draft.num_kv_heads, draft.head_dim)
    return BundleLayout.of(
        page_size,
        (
            SectionShape("target", dtype, (num_layers, 2, page_size, num_kv_heads, head_dim)),
            SectionShape("draft", dtype, draft_kv),
            SectionShape("index", dtype, (0, page_size, 0)),
            SectionShape("tail", dtype, (draft.feature_size,)),
        ),
    )


def _round_up(num_bytes: int, alignment: int) -> int:
    return -(-num_bytes // alignment) * alignment
