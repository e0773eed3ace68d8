"""Two nodes under random traffic and bad luck: pages come and go on both while one fetches from the other."""

import threading
import time

from cache_service.config import CacheConfig
from cache_service.messages import FetchStatus
from tests.unit.cache_nodes import BUNDLE_BYTES, eventually
from tests.unit.peer_nodes import TIMEOUT_S, PeerNode

NUM_SLOTS = 24
CONFIG = CacheConfig(
    host_cache_gb=(NUM_SLOTS + 4) * BUNDLE_BYTES / 2**30,
    eviction="lru",
    min_free_ratio=0.0,
    target_free_ratio=0.0,
)
CHAIN = 3


class PeerTraffic:
    """`chance` decides; `flips`: bits flip on the wire now and then. Raises AssertionError by name."""

    def __init__(self, network, folder, safety, chance, flips):
        self.chance, self.flips = chance, flips
        self.owner = PeerNode(network, folder / "owner", "owner", CONFIG, safety=safety)
        self.reader = PeerNode(network, folder / "reader", "reader", CONFIG, safety=safety)
        for node in (self.owner, self.reader):
            node.attach()
        self.reader.transfer.on_wire = self._disturb
        self.num_chains = 0
        self.waits = []
        self.statuses = set()

    def _disturb(self, data):
        if self.flips and self.chance.random() < 0.2:
            data[self.chance.randrange(len(data))] ^= 1 << self.chance.randrange(8)

    def act(self):
        """Do one thing at random."""
        actions = {
            self.store: 6,
            self.flood: 2,
            self.fetch: 6,
            self.slow: 3,
            self.pause: 4,
            self.go_on: 2,
            self.lose_reader: 1,
            self.finish: 2,
        }
        self.chance.choices(list(actions), list(actions.values()))[0]()
        self.check()

    def store(self):
        """Store a chain that may be fetched."""
        self.num_chains += 1
        self.owner.commit_what_fits([f"{self.num_chains}-{place}" for place in range(CHAIN)])

    def flood(self):
        """Store pages on a node until all that can go has gone."""
        self.flood_node(self.chance.choice([self.owner, self.reader]))

    def flood_node(self, node):
        stem = self.chance.random()
        for place in range(NUM_SLOTS):
            node.commit_what_fits([f"{stem}-{place}"])

    def fetch(self):
        """Begin to fetch a chain, seldom with time enough for a read that waits."""
        if self.num_chains and len(self.waits) < 4:
            self.begin(self.chance.choice([0.05, TIMEOUT_S]))

    def slow(self):
        """Fetch a chain so slowly that on both nodes everything else has gone when it arrives."""
        self.finish()
        self.store()
        self.pause()
        num_reads = self.reader.transfer.num_reads
        gives_up = self.chance.random() < 0.5
        self.begin(0.05 if gives_up else TIMEOUT_S)
        end_s = time.monotonic() + 0.1
        while self.reader.transfer.num_reads == num_reads and time.monotonic() < end_s:
            time.sleep(0.002)
        if gives_up:
            self.statuses.update(self.waits.pop()())
        self.flood_node(self.owner)
        self.flood_node(self.reader)
        self.finish()

    def begin(self, timeout_s):
        """Begin to fetch one of the last chains."""
        stem = self.chance.randint(max(1, self.num_chains - 2), self.num_chains)
        names = [f"{stem}-{place}" for place in range(CHAIN)]
        self.waits.append(self.reader.begin_fetch(names, self.owner, timeout_s))

    def pause(self):
        """Keep bytes from arriving."""
        self.reader.transfer.go.clear()

    def go_on(self):
        """Let them arrive."""
        self.reader.transfer.go.set()

    def lose_reader(self):
        """Have the owner lose the reader's connection, as after a cut link."""
        done = threading.Event()

        def lose():
            leases = self.owner.core._peers.leases
            for lease in list(leases._leases.values()):
                leases.lost(lease.identity)
            done.set()

        self.owner.core._inbox.put(lose)
        assert done.wait(TIMEOUT_S)

    def finish(self):
        """Let all fetches end."""
        self.end_fetches()
        assert self.flips or FetchStatus.CORRUPT not in self.statuses, (
            "lease: a page went while a peer read it, and was read all the same"
        )

    def end_fetches(self):
        self.go_on()
        for wait in self.waits:
            self.statuses.update(wait())
        self.waits.clear()

    def check(self):
        """Look at every readable page, and at the books, in the server's own thread."""
        for node in (self.owner, self.reader):
            found, done = [], threading.Event()

            def look(node=node, found=found, done=done):
                for page_key, slot in node.store._index.items():
                    if node.arena.slot_data(slot) != page_key * (BUNDLE_BYTES // 16):
                        found.append(slot)
                done.set()

            node.core._inbox.put(look)
            assert done.wait(TIMEOUT_S)
            assert not found, f"bytes: slots {found} are readable and hold what their keys do not say"
        self.reader.check()
        self.owner.check()

    def close(self):
        self.end_fetches()
        for node in (self.owner, self.reader):
            node.stop()

    def settle(self):
        """Let everything end well: no lease, grant or slot is left behind."""
        self.finish()
        eventually(lambda: self.reader.stats().num_lingering == self.reader.stats().num_writing == 0)
        eventually(lambda: self.owner.core._peers.leases.num_slots == 0)
