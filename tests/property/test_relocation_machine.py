"""A state machine loses, repeats, reorders and delays what owner and follower say; the owner restarts.

At every moment the replica is the owner's index as it was at the replica's version, which never goes back;
once it is quiet, it is the owner's index.
"""

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from cache_service.keys import PageKey
from cache_service.relocation import Changes, RelocationLog, Snapshot, Version
from cache_service.relocation_follower import (
    ALL_ON,
    PATIENCE_S,
    FollowerSafety,
    RelocationFollower,
    ResyncTicket,
)
from cache_service.relocation_records import Removed, Stored
from tests.unit.relocation_index import RelocationIndex

KEYS = [PageKey(bytes([number]) * 16) for number in range(4)]
LOG_CHANGES = 4
places = st.integers(0, 1_000)


class RelocationMachine(RuleBasedStateMachine):
    safety: FollowerSafety = ALL_ON

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.num_epochs = 0
        self.births: list[int] = []
        self.history: dict[Version, dict[PageKey, Stored]] = {}
        self.stored: dict[PageKey, Stored] = {}
        self.broadcasts: list[Changes] = []
        self.questions: list[tuple[int, ResyncTicket, Version | None]] = []
        self.answers: list[tuple[Changes | Snapshot, ResyncTicket]] = []
        self.be_born(incarnation=7)
        self.join()

    # The owner.

    def be_born(self, incarnation: int) -> None:
        self.births.append(incarnation)
        self.log = RelocationLog(incarnation, LOG_CHANGES)
        self.sent = self.log.version
        self.remember()

    def remember(self) -> None:
        self.history[self.log.version] = dict(self.stored)

    @rule(key=st.sampled_from(KEYS))
    def store(self, key: PageKey) -> None:
        self.remove(key)
        self.num_epochs += 2
        self.stored[key] = Stored(key, None, self.num_epochs % 5, self.num_epochs)
        self.log.append(self.stored[key])
        self.remember()

    @rule(key=st.sampled_from(KEYS))
    def remove(self, key: PageKey) -> None:
        if key in self.stored:
            entry = self.stored.pop(key)
            self.log.append(Removed(key, entry.slot, entry.epoch))
            self.remember()

    @rule()
    def flush(self) -> None:
        version = self.log.version
        changes = self.log.changes_since(self.sent) or Changes(version.incarnation, version.counter, [])
        self.broadcasts.append(changes)
        self.sent = version

    @precondition(lambda self: len(self.births) < 4)
    @rule(incarnation=st.integers(0, 20), survivors=st.sets(st.sampled_from(KEYS)))
    def restart(self, incarnation: int, survivors: set[PageKey]) -> None:
        if incarnation not in self.births:
            self.stored = {key: entry for key, entry in self.stored.items() if key in survivors}
            self.be_born(incarnation)

    @precondition(lambda self: self.questions)
    @rule(place=places)
    def answer(self, place: int) -> None:
        incarnation, ticket, version = self.questions.pop(place % len(self.questions))
        if incarnation == self.log.version.incarnation:  # else asked of a dead one
            self.answers.append((self.log.resync(version, self.stored.values()), ticket))

    # The wire.

    @precondition(lambda self: self.broadcasts)
    @rule(place=places, is_repeated=st.booleans())
    def hear(self, place: int, is_repeated: bool) -> None:
        broadcast = self.broadcasts[place % len(self.broadcasts)]
        if not is_repeated:
            self.broadcasts.remove(broadcast)
        self.follower.receive(broadcast, self.now_s)

    @precondition(lambda self: self.broadcasts)
    @rule(place=places)
    def lose_broadcast(self, place: int) -> None:
        self.broadcasts.pop(place % len(self.broadcasts))

    @precondition(lambda self: self.answers)
    @rule(place=places)
    def hear_answer(self, place: int) -> None:
        self.follower.resynced(*self.answers.pop(place % len(self.answers)), self.now_s)

    # The subscriber.

    @rule()
    def join(self) -> None:
        self.index = RelocationIndex()
        self.follower = RelocationFollower(self.index, max_pending=3, safety=self.safety)
        self.questions, self.answers = [], []
        self.seen: tuple[int, int] = (0, 0)

    @precondition(lambda self: len(self.questions) + len(self.answers) < 4)
    @rule()
    def ask(self) -> None:
        incarnation = self.log.version.incarnation
        self.questions.append((incarnation, self.follower.begin_resync(), self.follower.applied))

    @rule()
    def wait(self) -> None:
        self.now_s += 2 * PATIENCE_S

    @rule(loses_all=st.booleans())
    def become_quiet(self, loses_all: bool) -> None:
        """From here on the wire works, and the owner has nothing new but heartbeats."""
        self.flush()
        while self.broadcasts:
            broadcast = self.broadcasts.pop(0)
            if not loses_all:
                self.follower.receive(broadcast, self.now_s)
        self.questions, self.answers = [], []
        for _ in range(3):
            self.flush()
            self.follower.receive(self.broadcasts.pop(), self.now_s)
            self.wait()
            if self.follower.needs_resync(self.now_s):
                self.ask()
                self.answer(0)
                self.hear_answer(0)
        assert not self.follower.needs_resync(self.now_s), "quiet: the replica still asks"
        assert self.follower.lag == 0, "quiet: the replica lags"
        assert self.index.entries() == self.stored, "quiet: the replica is not the owner's index"

    @invariant()
    def is_what_was(self) -> None:
        applied = self.follower.applied
        if applied is None:
            assert not self.index.entries()
            return
        assert applied in self.history, f"{applied} never was"
        assert self.index.entries() == self.history[applied], f"the replica is not what was at {applied}"
        seen = (self.births.index(applied.incarnation), applied.counter)
        assert seen >= self.seen, f"the replica goes back from {self.seen} to {seen}"
        self.seen = seen


def test_replica_is_true_whatever_the_wire_does():
    run_state_machine_as_test(
        RelocationMachine,
        settings=settings(
            max_examples=150, stateful_step_count=40, deadline=None, database=None, derandomize=True
        ),
    )


def lose_a_change(machine: RelocationMachine) -> None:
    machine.store(KEYS[0])
    machine.flush()
    machine.lose_broadcast(0)
    machine.store(KEYS[1])
    machine.flush()
    machine.hear(0, is_repeated=False)


def lose_the_last_change(machine: RelocationMachine) -> None:
    machine.store(KEYS[0])
    machine.become_quiet(loses_all=True)


def repeat_an_old_change(machine: RelocationMachine) -> None:
    machine.store(KEYS[0])
    machine.flush()
    machine.hear(0, is_repeated=True)
    machine.remove(KEYS[0])
    machine.flush()
    machine.hear(1, is_repeated=False)
    machine.hear(0, is_repeated=False)


def hear_the_successor(machine: RelocationMachine) -> None:
    machine.store(KEYS[0])
    machine.become_quiet(loses_all=False)
    machine.restart(3, set())
    machine.store(KEYS[1])
    machine.store(KEYS[2])
    machine.flush()
    machine.hear(0, is_repeated=False)


def overtake_a_snapshot(machine: RelocationMachine) -> None:
    machine.join()
    for _ in range(2):
        machine.ask()
        machine.answer(0)
    machine.hear_answer(0)
    machine.store(KEYS[0])
    machine.flush()
    machine.hear(0, is_repeated=False)
    machine.is_what_was()
    machine.hear_answer(0)


def answer_after_the_successor(machine: RelocationMachine) -> None:
    machine.join()
    machine.ask()
    machine.answer(0)
    machine.restart(3, set())
    machine.ask()
    machine.answer(0)
    machine.hear_answer(1)
    machine.is_what_was()
    machine.hear_answer(0)


@pytest.mark.parametrize(
    ("switch", "scenario", "check"),
    [
        ("gaps", lose_a_change, "is not what was at"),
        ("heartbeats", lose_the_last_change, "quiet: the replica is not the owner's index"),
        ("duplicates", repeat_an_old_change, "is not what was at"),
        ("incarnations", hear_the_successor, "never was|is not what was at"),
        ("snapshots", overtake_a_snapshot, "goes back"),
        ("tickets", answer_after_the_successor, "goes back"),
    ],
)
def test_a_mechanism_switched_off_is_noticed(switch, scenario, check):
    def play(safety: FollowerSafety) -> None:
        machine = type("Machine", (RelocationMachine,), {"safety": safety})()
        machine.become_quiet(loses_all=False)
        machine.is_what_was()
        scenario(machine)
        machine.is_what_was()

    play(ALL_ON)
    with pytest.raises(AssertionError, match=check):
        play(replace(ALL_ON, **{switch: False}))
