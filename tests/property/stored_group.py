"""A FakeGroup whose arena holds a text's first pages and whose device does not; nothing moves by itself."""

from cache_service.keys import page_keys
from tests.property.fake_group import NAMESPACE, FakeGroup, RankMaker
from tests.property.fake_tier import TierOptions
from workers.kvcache.page_pool import Safety
from workers.protocol import SamplingParams

TEXT = [1, 2, 3, 4, 5, 6, 7, 8, 9]
PAGE_SIZE = 2
KEYS = page_keys(NAMESPACE, TEXT, PAGE_SIZE)


def stored_group(num_pages: int, safety: Safety, make_rank: RankMaker, num_ranks: int = 1) -> FakeGroup:
    """A group whose arena holds TEXT's first pages, and whose device does not; nothing moves by itself."""
    group = FakeGroup(
        num_pages=12,
        page_size=PAGE_SIZE,
        num_ranks=num_ranks,
        max_tokens_per_step=2 * PAGE_SIZE,
        max_context_len=24,
        safety=safety,
        runs_checks=False,
        make_rank=make_rank,
        tier=TierOptions(num_slots=32, speeds=(0.0, 0.0), news_ratio=0.0),
    )
    deliver(group)
    group.submit(TEXT[: num_pages * PAGE_SIZE], SamplingParams(max_tokens=1))
    save_all(group)
    group.submit([9] * 23, SamplingParams(max_tokens=1, ignore_eos=True))
    save_all(group)
    while group.scheduler.has_moves:  # pages that wait for grants
        save_all(group)
    assert [key for key in KEYS if key in group.tier.client.view] == KEYS[:num_pages]
    assert group.indexed.isdisjoint(KEYS)
    return group


def save_all(group: FakeGroup) -> None:
    group.run()
    group.step()
    advance(group, 0, 1)
    group.step()
    deliver(group)


def deliver(group: FakeGroup) -> None:
    for _ in range(8):
        group.tier.client.deliver(8)


def advance(group: FakeGroup, *ranks: int) -> None:
    for rank in ranks[: len(group.ranks)]:
        group.tier.movers[rank].advance(1.0)


def corrupt(group: FakeGroup, key: bytes) -> None:
    """Change what rank 0 saved of a page."""
    slot = group.tier.arena.slots[group.tier.client.view[key].slot]
    tokens, data = slot.parts[0]
    slot.parts[0] = (tokens[::-1], data[::-1])
