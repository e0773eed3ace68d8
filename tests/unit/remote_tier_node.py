"""A RemoteTier over a small arena and a store in memory, driven by a test's thread and clock."""

import itertools
from collections import Counter

from cache_service.arena_user import ArenaAccess
from cache_service.inbox import Inbox
from cache_service.lease_row import LeaseRow
from cache_service.remote import PageBuffer
from cache_service.remote_tier import RemoteTier
from tests.unit.arenas import new_store, store_chain
from tests.unit.cache_nodes import eventually
from tests.unit.fake_store import ADDRESS, FakeOpener
from tests.unit.relocation_index import RelocationIndex

GROUP, ROW, TIMEOUT_S = 9, 3, 20.0


class Node:
    """A tier over a small arena, driven by the test's thread and clock."""

    def __init__(self, folder, address=ADDRESS, begins=True, limits=None):
        self.owned, self.store, self.changes = new_store(folder, num_slots=32)
        self.arena = self.owned.arena
        self.opener = FakeOpener()
        self.inbox = Inbox()
        self.counts = Counter()
        self.now_s = 0.0
        self.names = itertools.count()
        self.leases = LeaseRow(self.arena, ROW)
        self.tier = RemoteTier(
            address,
            "10.0.0.1",
            self.inbox,
            self.changes,
            self.counts,
            open_store=self.opener,
            limits=limits,
            clock=lambda: self.now_s,
        )
        if begins:
            self.begin()

    def begin(self):
        self.tier.begin(ArenaAccess(self.arena, self.store, GROUP, self.leases))

    def turn(self):
        self.inbox.run()
        has_more = self.tier.tick(self.now_s)
        self.store.check()
        return has_more

    def until(self, holds):
        return eventually(lambda: (self.turn(), holds())[1])

    def attached(self):
        self.until(lambda: self.tier.address)
        return self.opener.store

    def commit(self, num_pages=1):
        keys = store_chain(self.store, self.arena, [next(self.names) for _ in range(num_pages)])
        self.tier.offer(keys)
        return keys

    def ask(self, begin, *arguments):
        """Begin an attach or a detach; return the list that its answer goes into."""
        told = []
        begin(*arguments, told.append)
        return told

    def answer(self, told):
        self.until(lambda: told)
        (answer,) = told
        return answer

    def get(self, keys, timeout_s=TIMEOUT_S):
        buffers = [PageBuffer(page_key, memoryview(bytearray(256))) for page_key in keys]
        batch = self.tier.source.get(buffers, timeout_s)
        self.turn()
        return [result.status for result in batch.results]

    def heard(self):
        """Return what a listener knows that has heard every change."""
        index = RelocationIndex()
        index.apply(self.changes)
        return index

    def close(self):
        self.opener.goes_on.set()
        assert self.tier.end()
        assert self.tier.close(TIMEOUT_S)
        self.turn()
        assert self.leases.num_leased == 0
        assert all(store.is_closed for store in self.opener.stores)
        self.inbox.close()
        self.owned.close()
