"""Each mechanism that keeps moved pages right, switched off alone, is caught by a check that has its name."""

from dataclasses import replace

import pytest

from cache_service.arena_safety import ArenaSafety
from tests.unit.engine_plans import generate, tiny_engine
from tests.unit.tier_plans import Gate, TierLog
from tests.unit.tiers import Tier, eventually
from workers.engine.engine import Engine
from workers.engine.mechanisms import ALL_ON, Mechanisms
from workers.kvcache.moves import MoveInjection
from workers.kvcache.sanitizer import SanitizerError
from workers.move_board import MoveStatus

PROMPT = list(range(30, 47))  # four whole pages and a token
ENQUEUED, TORN, CORRUPT = MoveStatus.ENQUEUED, MoveStatus.FAILED_TORN, MoveStatus.FAILED_CORRUPT


class Tiered:
    """An engine over a tier that holds PROMPT's four pages, and the engine does not."""

    def __init__(self, folder, mechanisms=ALL_ON, safety=None, injection=None, gate=None, num_slots=4):
        self.gate = gate
        self.engine: Engine = tiny_engine(mechanisms)
        self.tier = Tier(
            folder,
            [self.engine.pool],
            num_slots=num_slots,
            safety=safety,
            injection=gate.injection if gate else injection,
            mechanisms=mechanisms,
            num_threads=4,
        )
        self.engine.attach(self.tier.mover)
        self.log = TierLog(self.tier)
        self.log.open(0, PROMPT)
        self.log.run(self.engine, s0=17)
        self.log.keep(self.engine, 0)
        self.log.run(self.engine)

    def start_load(self):
        self.log.open(1, PROMPT)
        op = self.log.load(1, 4)
        self.log.run(self.engine)
        return op

    def statuses(self, op) -> list[MoveStatus]:
        return [self.tier.board.status(op.first_move + place) for place in range(len(op.pages))]

    def answer(self, op) -> list[int]:
        """Once all may be read: six tokens, the first from a step that reads every loaded page."""
        eventually(lambda: all(status >= ENQUEUED for status in self.statuses(op)))
        self.log.use(1, op)
        for _ in range(6):
            self.log.run(self.engine, s1=1)
        return self.log.tokens[1][17:]

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self.gate:
            self.gate.opened.set()
        self.tier.close()


@pytest.fixture(scope="module")
def expected() -> list[int]:
    return generate(tiny_engine(graphs=False), [PROMPT], 6)[0]


def load_while_the_copy_is_delayed(folder, mechanisms: Mechanisms) -> list[int]:
    gate = Gate()
    with Tiered(folder, mechanisms, gate=gate) as tiered:
        gate.opened.clear()
        op = tiered.start_load()
        if mechanisms.waits_for_loads:
            gate.open_after(0.1)
        return tiered.answer(op)


def test_a_step_waits_for_its_loads_or_the_sanitizer_says_it_did_not(tmp_path, expected) -> None:
    assert load_while_the_copy_is_delayed(tmp_path, ALL_ON) == expected
    mutant = replace(ALL_ON, waits_for_loads=False)
    with pytest.raises(SanitizerError, match=r"page_loaded: slot 1, .* a LOAD that is done, found ENQUEUED"):
        load_while_the_copy_is_delayed(tmp_path, mutant)


def load_a_flipped_bit(folder, mechanisms: Mechanisms) -> None:
    with Tiered(folder, mechanisms) as tiered:
        tiered.tier.arena.bundle(tiered.log.locations[tiered.log.names_of(PROMPT)[2]].slot, 0)[9] ^= 16
        op = tiered.start_load()
        if mechanisms.verifies_loads:
            assert tiered.tier.outcome(op)[2] is CORRUPT
            raise ValueError("told before anything was read")
        tiered.answer(op)


def test_a_flipped_bit_is_found_before_the_copy_or_by_the_sanitizer(tmp_path) -> None:
    with pytest.raises(ValueError, match="told before anything was read"):
        load_a_flipped_bit(tmp_path, ALL_ON)
    mutant = replace(ALL_ON, verifies_loads=False)
    with pytest.raises(SanitizerError, match=r"loaded_bytes: slot 1, .* after a LOAD that is DONE"):
        load_a_flipped_bit(tmp_path, mutant)


def evict_within_the_copy(folder, safety: ArenaSafety) -> list[int]:
    """The server needs a slot while pages are copied out of the arena: all four are in use."""

    def during(move) -> None:
        if move.kind == "load" and move.number == 5:
            numbers = range(5, 9)
            eventually(lambda: all(tiered.tier.board.status(number) >= ENQUEUED for number in numbers))
            tiered.tier.give_to_another(move.slot)

    with Tiered(folder, safety=safety, injection=MoveInjection(0, during_copy=during)) as tiered:
        op = tiered.start_load()
        try:
            return tiered.answer(op)
        finally:
            assert (tiered.statuses(op)[0] is TORN) == (not safety.leases)


def test_an_evictor_respects_leases_or_the_sanitizer_sees_foreign_bytes(tmp_path, expected) -> None:
    assert evict_within_the_copy(tmp_path, ArenaSafety()) == expected
    mutant = ArenaSafety(leases=False)
    with pytest.raises(SanitizerError, match=r"loaded_bytes: slot 1, .* after a LOAD that is FAILED_TORN"):
        evict_within_the_copy(tmp_path, mutant)


def free_a_page_that_is_being_saved(folder, is_leased: bool) -> None:
    """What rank 0's leases on the pages of SAVEs are for (I6)."""
    gate = Gate("save")
    with Tiered(folder, gate=gate, num_slots=12) as tiered:
        tiered.tier.store.clear()
        log, engine = tiered.log, tiered.engine
        log.open(1, PROMPT)
        log.run(engine, s1=17)
        log.complete(1)
        gate.opened.clear()
        op = log.start_save(1)
        log.run(engine)
        eventually(lambda: len(gate.stopped) == 4)
        if is_leased:
            gate.open_after(0.1)
            log.commit_save(op)
        log.close(1)
        log.run(engine)


def test_a_page_stays_until_its_save_is_over_or_the_sanitizer_says_it_did_not(tmp_path) -> None:
    free_a_page_that_is_being_saved(tmp_path, is_leased=True)
    with pytest.raises(SanitizerError, match=r"free_save: .* expected move \d+ over, found PENDING"):
        free_a_page_that_is_being_saved(tmp_path, is_leased=False)


def test_a_page_stays_until_its_load_is_over_or_the_sanitizer_says_it_did_not(tmp_path) -> None:
    gate = Gate()
    with Tiered(tmp_path, gate=gate) as tiered:
        gate.opened.clear()
        op = tiered.start_load()
        eventually(lambda: len(gate.stopped) == 4)
        tiered.log.give_back(op.pages)
        with pytest.raises(SanitizerError, match=r"free_load: .* expected move \d+ over, found ENQUEUED"):
            tiered.log.run(tiered.engine)


def save_a_page(folder, is_written: bool) -> None:
    """A SAVE begins before the step that writes its page's last token, or after it (I6)."""
    with Tiered(folder, num_slots=12) as tiered:
        log, engine = tiered.log, tiered.engine
        tiered.tier.store.clear()
        log.open(1, PROMPT)
        log.run(engine, s1=17 if is_written else 15)
        log.num_computed[1] = 17
        log.complete(1)
        op = log.start_save(1)
        log.num_computed[1] = 17 if is_written else 15
        log.run(engine, s1=1 if is_written else 2)
        log.commit_save(op)


def test_a_save_comes_after_its_page_is_written_or_the_sanitizer_says_it_did_not(tmp_path) -> None:
    save_a_page(tmp_path, is_written=True)
    with pytest.raises(SanitizerError, match=r"complete_written: .* page \d+"):
        save_a_page(tmp_path, is_written=False)


def load_a_page(folder, is_fresh: bool) -> None:
    """A LOAD's target is a page that no step writes, or one that a running request may (I6)."""
    with Tiered(folder) as tiered:
        log, engine = tiered.log, tiered.engine
        log.open(1, PROMPT)
        log.run(engine, s1=2)
        pages = log.own(1)[0] if is_fresh else log.pages[1][:1]
        name = log.names_of(PROMPT)[0]
        log.ops.append(tiered.tier.load_op(pages, [log.locations[name]], [name]))
        log.run(engine, s1=2)


def test_a_load_comes_after_its_page_s_writers_or_the_sanitizer_says_it_did_not(tmp_path) -> None:
    load_a_page(tmp_path, is_fresh=True)
    with pytest.raises(SanitizerError, match=r"load_untouched: .*page \d+"):
        load_a_page(tmp_path, is_fresh=False)
