"""TenantPages: how many pages each tenant has, and which of them it used longest ago."""

from cache_service.slot_queues import SlotQueues


class TenantPages:
    """Pages by tenant; a tenant may have at most `max_pages`, of which its oldest make room for new ones."""

    def __init__(self, num_slots: int, max_pages: int) -> None:
        self._max_pages = max_pages
        self._queues = SlotQueues(num_slots)  # one queue a tenant

    def add(self, slot: int, tenant: int) -> None:
        """Charge a page to a tenant."""
        self._queues.push(tenant, slot)

    def touch(self, slot: int) -> None:
        """Put a used page last among its tenant's."""
        tenant = self._queues.queue_of(slot)
        assert tenant is not None, f"slot {slot} is charged to nobody"
        self._queues.move(slot, tenant)

    def remove(self, slot: int) -> None:
        """Discharge a page."""
        self._queues.remove(slot)

    def count(self, tenant: int) -> int:
        """Return how many pages a tenant has."""
        return self._queues.count(tenant)

    def is_full(self, tenant: int) -> bool:
        """Tell whether a tenant has its share."""
        return self._queues.count(tenant) >= self._max_pages

    def oldest(self, tenant: int) -> int | None:
        """Return the page that a tenant used longest ago."""
        return self._queues.front(tenant)

    def check(self, charged: dict[int, list[int]]) -> None:
        """Prove that the slots `charged` to each tenant, and no others, are in its queue."""
        for tenant, slots in charged.items():
            queued = self._queues.slots(tenant)
            assert sorted(queued) == sorted(slots), f"tenant {tenant} is charged {queued}, has {slots}"
            assert len(slots) <= self._max_pages, (
                f"tenant {tenant} has {len(slots)} pages of {self._max_pages}"
            )
        assert self._queues.num_queues == len(charged), "a tenant without pages is charged some"
