import pytest

from cache_service.keys import PageKey
from workers.kvcache.page_pool import PagePool, PageState
from workers.kvcache.radix_cache import Node, RadixCache


def build(tree: RadixCache, pool: PagePool, keys: bytes) -> list[Node]:
    """Run a request along `keys`, a byte a page: lock what is there, insert the rest."""
    path = tree.match(key(name) for name in keys)
    tree.lock(path)
    for name in keys[len(path) :]:
        (page,) = pool.allocate(1)
        path.append(tree.insert(key(name), page, path[-1] if path else None))
    return path


def key(name: int) -> PageKey:
    return PageKey(bytes([name]) * 16)


def names(nodes: list[Node]) -> bytes:
    return bytes(node.key[0] for node in nodes)


@pytest.fixture
def pool() -> PagePool:
    return PagePool(8)


@pytest.fixture
def tree(pool: PagePool) -> RadixCache:
    return RadixCache(pool)


def evict_all(tree: RadixCache) -> bytes:
    tree.take_events()
    while tree.evict():
        tree.check()
    return b"".join(name[:1] for event in tree.take_events() for name in event.keys)


def test_match_returns_the_longest_known_prefix(tree, pool):
    build(tree, pool, b"abc")
    build(tree, pool, b"abd")
    assert names(tree.match(map(key, b"abdx"))) == b"abd"
    assert names(tree.match(map(key, b"xab"))) == b""
    assert tree.num_pages == 4
    tree.check()


def test_nothing_is_evicted_while_a_request_is_on_it(tree, pool):
    short, long = build(tree, pool, b"ab"), build(tree, pool, b"abcd")
    assert not tree.evict()
    tree.unlock(long, last_step=0)
    assert tree.num_unlocked == 2
    assert evict_all(tree) == b"dc"
    assert pool.state(short[1].page) is PageState.OWNED
    tree.check()


def test_the_leaf_unused_for_longest_goes_first(tree, pool):
    for keys in (b"ab", b"ac", b"d"):
        tree.unlock(build(tree, pool, keys), last_step=0)
    tree.unlock(build(tree, pool, b"ab"), last_step=0)  # used again
    assert evict_all(tree) == b"cdba"
    assert pool.num_free == 8


def test_a_match_alone_is_no_use(tree, pool):
    for keys in (b"a", b"b"):
        tree.unlock(build(tree, pool, keys), last_step=0)
    tree.match([key(ord("a"))])
    assert evict_all(tree) == b"ab"


def test_an_evicted_page_waits_for_the_steps_of_those_who_read_it(tree, pool):
    (node,) = path = build(tree, pool, b"a")
    tree.unlock(path, last_step=3)
    assert not tree.evict(only_idle=True)
    assert tree.evict()
    assert pool.state(node.page) is PageState.QUIESCING
    pool.completed(3)
    assert pool.state(node.page) is PageState.FREE


def test_a_key_is_inserted_once(tree, pool):
    build(tree, pool, b"a")
    (page,) = pool.allocate(1)
    with pytest.raises(AssertionError, match="the key is in the tree"):
        tree.insert(key(ord("a")), page, None)


def test_events_tell_the_tree(tree, pool):
    tree.unlock(build(tree, pool, b"ab"), last_step=0)
    tree.evict()
    tree.unlock(build(tree, pool, b"ac"), last_step=0)
    events = [(event.kind, b"".join(name[:1] for name in event.keys)) for event in tree.take_events()]
    assert events == [("stored", b"ab"), ("removed", b"b"), ("stored", b"c")]
    assert tree.take_events() == []
    assert b"".join(name[:1] for name in tree.snapshot()) == b"ac"


def test_check_finds_a_lease_that_somebody_else_took_back(tree, pool):
    (node,) = build(tree, pool, b"a")
    tree.check()
    pool.release(node.page)
    with pytest.raises(AssertionError, match="1 leases, 1 locks"):
        tree.check()
