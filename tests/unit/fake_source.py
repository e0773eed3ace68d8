"""A Source whose answers a test decides, page by page; and what pages it wrote look like."""

import threading

from cache_service.arena_format import bundle_checksum
from cache_service.remote import GetResult, GetStatus
from cache_service.remote_worker import Batch


def write_page(data, page_key, num_ranks=1):
    """Fill a slot with a page as its writer would; return the checksums."""
    data[:] = page_key * (len(data) // len(page_key))
    size = len(data) // max(1, num_ranks)
    return tuple(
        bundle_checksum(data[rank * size : (rank + 1) * size], page_key, rank) for rank in range(num_ranks)
    )


class FakeSource:
    """Answers at once, or once `go` is set. `statuses` says what becomes of a key that is not found."""

    def __init__(self, num_ranks=1):
        self.num_ranks = num_ranks
        self.statuses = {}
        self.go = threading.Event()
        self.go.set()
        self.is_quiet = True
        self.asked = []
        self.batches = []
        self.buffers = []

    def get(self, pages, timeout_s):
        self.asked.append([page.key for page in pages])
        self.buffers.append(pages)
        assert self.go.wait(20)
        batch = Batch(len(pages))
        for page in pages:
            status = self.statuses.get(page.key, GetStatus.FOUND)
            if status is GetStatus.FOUND:
                batch.results.append(GetResult(status, 16, write_page(page.data, page.key, self.num_ranks)))
            else:
                batch.results.append(GetResult(status))
        if self.is_quiet:
            batch.quiet.set()
        self.batches.append(batch)
        return batch
