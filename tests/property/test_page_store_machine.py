"""Any sequence of grants, commits, leases, drops, deaths and restarts leaves store and users right."""

import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from cache_service.page_store import PageStoreOptions
from tests.property.arena_node import GROUPS, NAMES, OPTIONS, ArenaNode

groups, names, numbers = st.sampled_from(GROUPS), st.integers(0, NAMES - 1), st.integers(0, 60)


class PageStoreMachine(RuleBasedStateMachine):
    """ArenaNode's actions as rules."""

    node: ArenaNode | None = None

    @initialize(policy=st.sampled_from(["s3fifo", "lru"]), is_shared_out=st.booleans())
    def begin(self, policy, is_shared_out):
        self.folder = tempfile.TemporaryDirectory()
        shares = {} if is_shared_out else {"tenant_ratio": 1.0, "pinned_ratio": 0.0}
        ratios = {"tenant_ratio": OPTIONS.tenant_ratio, "pinned_ratio": OPTIONS.pinned_ratio} | shares
        options = PageStoreOptions(
            eviction=policy,
            min_free_ratio=OPTIONS.min_free_ratio,
            target_free_ratio=OPTIONS.target_free_ratio,
            **ratios,
        )
        self.node = ArenaNode(Path(self.folder.name), options=options)

    @rule(group=groups, count=st.integers(1, 5))
    def grant(self, group, count):
        self.node.grant(group, count)

    @rule(group=groups, name=names, num_ranks=st.sampled_from([1, 2, 2, 2]), tenant=st.integers(0, 1))
    def commit(self, group, name, num_ranks, tenant):
        self.node.commit(group, name, num_ranks, tenant)

    @rule(group=groups, names=st.lists(names, max_size=4))
    def commit_some(self, group, names):
        for name in sorted(names):
            self.node.commit(group, name)

    @rule(group=groups, number=numbers, name=names)
    def commit_anothers(self, group, number, name):
        self.node.commit_anothers(group, number, name)

    @rule(group=groups)
    def abort(self, group):
        self.node.abort(group)

    @rule(group=groups)
    def die(self, group):
        self.node.die(group)

    @rule(reader=st.integers(0, 1), number=numbers)
    def acquire(self, reader, number):
        self.node.acquire(reader, number)

    @rule(number=numbers)
    def release(self, number):
        self.node.release(number)

    @rule(name=names)
    def touch(self, name):
        self.node.touch(name)

    @rule(number=numbers)
    def drop(self, number):
        self.node.drop(number)

    @rule(name=names, is_pinned=st.booleans())
    def pin(self, name, is_pinned):
        (self.node.pin if is_pinned else self.node.unpin)(name)

    @rule(count=st.integers(0, 5))
    def maintain(self, count):
        self.node.maintain(count)

    @rule()
    def prefault(self):
        self.node.prefault()

    @rule()
    def clear(self):
        self.node.clear()

    @rule(dead=groups)
    def restart(self, dead):
        self.node.restart(dead)

    @invariant()
    def everything_agrees(self):
        if self.node is not None:
            self.node.check()

    def teardown(self):
        if self.node is not None:
            self.node.close()
            self.folder.cleanup()


TestPageStoreMachine = PageStoreMachine.TestCase
TestPageStoreMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
