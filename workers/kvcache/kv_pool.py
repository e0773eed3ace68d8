"""KVPool: the device bytes of all KV pages of one rank, page by page. Owned by the rank's Engine."""

import math
from collections.abc import Sequence

import torch

from workers.config import WorkerConfig
from workers.kvcache.layout import BundleLayout, ElementType, Section, SectionName
from workers.kvcache.pool_size import GIB, PoolSizeError, is_measured

DUMMY_PAGE = 0
"""Padded rows read and write this page; no request owns it; between steps it holds zeros."""
POISON = 0xFF
"""Every byte of a poisoned page: NaN in float32, bfloat16, float16 and fp8."""

TORCH_DTYPES: dict[ElementType, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "uint8": torch.uint8,
}


class KVPool:
    """`data` uint8 [num_pages + 1, bundle_bytes]: bundles side by side, page 0 the dummy page."""

    def __init__(self, layout: BundleLayout, num_pages: int, device: torch.device) -> None:
        layout.check()
        assert num_pages >= 1, num_pages
        self.layout = layout
        self.num_pages = num_pages
        self.page_size = layout.page_size
        # calloc on the CPU: pages cost resident memory only once they are written.
        self.data = torch.zeros((num_pages + 1, layout.bundle_bytes), dtype=torch.uint8, device=device)
        #   target and draft [num_pages + 1, num_layers, 2, page_size, num_kv_heads, head_dim]
        self._sections = [self._section_view(layout.section(name)) for name in ("target", "draft")]
        self._layers = [(kv[:, i, 0], kv[:, i, 1]) for kv in self._sections for i in range(kv.shape[1])]
        self.tails = self._section_view(layout.section("tail"))
        """Each page's draft feature of its last token, [num_pages + 1, feature_size]; 0 without a draft."""

    @property
    def num_layers(self) -> int:
        """Count the layers, the target's and then the draft's."""
        return len(self._layers)

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return layer `index`'s K and V: views [num_pages + 1, page_size, num_kv_heads, head_dim].

        The draft's layers follow the target's. All have the strides (bundle, num_kv_heads * head_dim,
        head_dim, 1), in elements. Page index times the first stride passes 2^32 on real pools: kernels
        compute it in 64 bits.
        """
        return self._layers[index]

    def move_entries(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Copy tokens' entries of all layers, target's and draft's, from sources [n] to targets [n]: int64,
        page * page_size + offset. All are gathered before any is written; no two go to one target, but for
        equal ones."""
        source_pages, source_offsets = sources // self.page_size, sources % self.page_size
        target_pages, target_offsets = targets // self.page_size, targets % self.page_size
        for kv in self._sections:
            if kv.shape[1]:
                #   [n, layers, 2, kv_heads, head_dim]
                entries = kv[source_pages, :, :, source_offsets]
                kv[target_pages, :, :, target_offsets] = entries

    def poison(self, pages: Sequence[int]) -> None:
        """Fill `pages` with NaN bytes, so that reading what nobody wrote shows in the logits."""
        assert DUMMY_PAGE not in pages, "the dummy page is never poisoned"
        for first, stop in _runs(pages):
            self.data[first:stop].fill_(POISON)

    def poison_all(self) -> None:
        """Poison every page but the dummy page."""
        self.data[DUMMY_PAGE + 1 :].fill_(POISON)

    def is_poisoned(self, page: int) -> bool:
        """Tell whether every byte of `page` still is the poison's. Waits for the device."""
        return bool((self.data[page] == POISON).all().item())  # a sanitizer's question: may wait

    def unwritten(self, pages: Sequence[int]) -> tuple[int, SectionName] | None:
        """Return one of the poisoned `pages` of which some token's KV in some layer, or the tail, was never
        written since, and the section where; None: all of them are whole. Waits for the device."""
        data = self.data[list(pages)]
        for section in self.layout.sections:
            if not section.num_bytes:
                continue
            # A line is written at once: a token's K or V in a layer, the tail: [pages, lines, bytes]
            num_lines = math.prod(section.shape[:-2])
            lines = data[:, section.offset : section.offset + section.num_bytes]
            is_bare = (lines.view(len(data), num_lines, -1) == POISON).all(dim=2).any(dim=1)
            if is_bare.any().item():  # a sanitizer's question: may wait
                return pages[int(is_bare.nonzero()[0].item())], section.name
        return None

    def zero_dummy_page(self) -> None:
        """Clear what padded rows wrote."""
        self.data[DUMMY_PAGE].zero_()

    def _section_view(self, section: Section) -> torch.Tensor:
        """Return the section of every page: [num_pages + 1, *section.shape]."""
        flat = self.data[:, section.offset : section.offset + section.num_bytes]
        return flat.view(TORCH_DTYPES[section.dtype]).view(len(flat), *section.shape)


def allocate_pool(config: WorkerConfig, layout: BundleLayout, num_pages: int, device: torch.device) -> KVPool:
    """Return a pool of the size `pool_size` found; raises PoolSizeError where the memory is gone by now."""
    try:
        return KVPool(layout, num_pages, device)
    except RuntimeError as error:  # torch's out-of-memory errors, of every device
        option = (
            "num_pages"
            if config.num_pages is not None
            else "device_memory_ratio"
            if is_measured(config)
            else "kv_gb"
        )
        raise PoolSizeError(
            f"{(num_pages + 1) * layout.bundle_bytes / GIB:.2f} GiB of KV pages could not be allocated beside"
            f" the weights ({error}); lower {option}"
        ) from error


def _runs(pages: Sequence[int]) -> list[tuple[int, int]]:
    """Return `pages` as half-open ranges of neighbours: freed pages mostly come in runs."""
    runs: list[tuple[int, int]] = []
    for page in sorted(pages):
        if runs and runs[-1][1] == page:
            runs[-1] = (runs[-1][0], page + 1)
        else:
            runs.append((page, page + 1))
    return runs
