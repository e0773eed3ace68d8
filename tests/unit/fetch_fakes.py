"""Pages elsewhere as a Prefetcher sees them: tests decide what comes of each FETCH."""

from cache_service.fetch_calls import FetchAnswer
from cache_service.keys import NamespaceDigest
from cache_service.messages import FetchResult, FetchStatus
from cache_service.page_records import Location
from workers.kvcache.arrivals import Arrivals
from workers.kvcache.fetch_costs import FetchCosts, FirstGuesses
from workers.kvcache.prefetcher import Prefetcher, PrefetchOptions, Reach
from workers.kvcache.rows import KeyedTokens

PAGE_SIZE = 4
PAGE_BYTES = 1000
NAMESPACE = NamespaceDigest(b"n" * 16)
GUESSES = FirstGuesses(
    peer_bytes_per_s=100_000,
    remote_bytes_per_s=50_000,
    peer_latency_s=0.01,
    remote_latency_s=0.02,
    prefill_tokens_per_s=40,
)
"""A page takes 0.01 s from a peer, 0.02 s from the store and 0.1 s to compute."""


class FakeRemote:
    """RemotePages: notes what is asked for, answers when told."""

    def __init__(self):
        self.remote = set()
        self.asked = []
        self.answers = []

    def is_remote(self, key):
        return key in self.remote

    def fetch(self, pages, peer, timeout_s):
        self.asked.append((list(pages), peer, timeout_s))
        return len(self.asked)

    def take_fetched(self):
        answers, self.answers = self.answers, []
        return answers

    def keys(self, number):
        return [page.key for page in self.asked[number - 1][0]]

    def answer(self, number, outcome=FetchStatus.FETCHED, seconds=0.1, num_first=None):
        """Every page gets this status, or the first few do, the others TIMED_OUT; or there is no result."""
        if isinstance(outcome, FetchStatus):
            count = len(self.asked[number - 1][0])
            num_first = count if num_first is None else num_first
            statuses = [outcome] * num_first + [FetchStatus.TIMED_OUT] * (count - num_first)
            is_here = (FetchStatus.FETCHED, FetchStatus.PRESENT)
            outcome = [
                FetchResult(status, Location(100 * number + place, 2) if status in is_here else None)
                for place, status in enumerate(statuses)
            ]
        self.answers.append(FetchAnswer(number, outcome, seconds))


class Desk:
    """A Prefetcher with a device and an arena that are sets of keys; what it fetches is in the arena."""

    def __init__(self, safety=None, guesses=GUESSES, **options):
        self.remote = FakeRemote()
        self.device = set()
        self.stored = set()
        self.arrivals = Arrivals()
        costs = FetchCosts(PAGE_BYTES, PAGE_SIZE, guesses)
        self.prefetcher = Prefetcher(
            self.remote, self.reach, self.arrivals, costs, PAGE_SIZE, PrefetchOptions(**options), safety
        )
        self.stats = self.prefetcher.stats

    def reach(self, keys):
        def leading(is_there):
            return next((place for place, key in enumerate(keys) if not is_there(key)), len(keys))

        num_stored = leading(lambda key: key in self.stored or self.arrivals.location(key) is not None)
        return Reach(max(num_stored, leading(lambda key: key in self.device)), num_stored)

    def begin(self, tokens, hints=(), now_s=0.0):
        return self.prefetcher.begin(tokens, len(tokens.token_ids) // PAGE_SIZE, list(hints), now_s)


def prompt(num_pages, first=0):
    return KeyedTokens(list(range(first, first + num_pages * PAGE_SIZE)), NAMESPACE, PAGE_SIZE, 7)
