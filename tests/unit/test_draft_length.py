"""The draft's length follows what drafts bring and what steps take: long, short or off, and back again."""

from collections import Counter
from random import Random

import pytest

from workers.plan import BatchPlan, RelocationVersion
from workers.scheduler import draft_length
from workers.scheduler.accept_rates import AcceptRates
from workers.scheduler.draft_costs import DraftCosts, kind_of
from workers.scheduler.draft_length import FIRST_PROBE_STEPS, MAX_PROBE_STEPS, DraftLength

LENGTHS = (1, 2, 3, 5)


def memory_bound(num_rows, num_tokens, draft_len):
    """A step reads the weights, whatever its rows; each drafted token is a pass of a small model."""
    return 10e-3 + 0.05e-3 * num_tokens + 0.4e-3 * draft_len


def compute_bound(num_rows, num_tokens, draft_len):
    return 1e-3 * num_tokens + 0.1e-3 * num_rows * draft_len


class Decoding:
    """Rows that decode for ever, on a simulated clock; `rate` of the drafts at each place are right."""

    def __init__(self, num_rows, rate, seconds_of=memory_bound, *, noise_ratio=0.0, max_tokens=4096):
        self.length = DraftLength(LENGTHS, max_tokens)
        self.num_rows, self.rate, self.seconds_of = num_rows, rate, seconds_of
        self._noise_ratio = noise_ratio
        self._random = Random(1)
        self._drafted = []
        self.chosen = []
        self.num_tokens = self.seconds = 0.0

    def run(self, num_steps):
        """Return the lengths of these steps."""
        for _ in range(num_steps):
            self._step()
        return self.chosen[-num_steps:]

    def _step(self):
        rows = self.num_rows
        verified = (self._drafted + [0] * rows)[:rows]
        draft_len = self.length.choose(rows)
        lens = [1 + num_drafts for num_drafts in verified]
        num_drafts = verified if any(verified) else []
        slots = list(range(rows))
        version = RelocationVersion(1, 0)
        plan = BatchPlan(1, version, [], slots, [9] * rows, lens, [5] * rows, slots, 0, num_drafts, draft_len)
        for count in num_drafts:
            num_right = 0
            while num_right < count and self._random.random() < self.rate:
                num_right += 1
            self.num_tokens += num_right
            self.length.verified(count, num_right)
        noise = 1 + self._noise_ratio * self._random.uniform(-1, 1)
        seconds = self.seconds_of(rows, sum(lens), draft_len) * noise
        self.length.stepped(plan, seconds)
        self.num_tokens += rows
        self.seconds += seconds
        self._drafted = [draft_len] * rows
        self.chosen.append(draft_len)

    def speed(self, num_steps):
        """Return the tokens a second of so many steps more."""
        tokens, seconds = self.num_tokens, self.seconds
        self.run(num_steps)
        return (self.num_tokens - tokens) / (self.seconds - seconds)


def most(lengths):
    return Counter(lengths).most_common(1)[0][0]


def test_drafts_that_are_right_are_long_for_a_single_request():
    decoding = Decoding(1, 0.95)
    decoding.run(200)
    assert most(decoding.run(200)) == 5


def test_drafts_that_are_often_wrong_are_shorter():
    decoding = Decoding(1, 0.3)
    decoding.run(300)
    assert most(decoding.run(300)) in (1, 2, 3)


@pytest.mark.parametrize("num_rows", [1, 8, 64])
def test_drafts_that_are_never_right_are_given_up_but_for_probes(num_rows):
    decoding = Decoding(num_rows, 0.0)
    decoding.run(300)
    lengths = decoding.run(3000)
    assert 0 < sum(map(bool, lengths)) < 0.04 * len(lengths)
    assert set(lengths) == {0, 1}
    assert decoding.length.switches["off", "loss"] == 1


def test_a_batch_whose_tokens_cost_is_not_drafted_for_and_one_request_is():
    """By the same drafts; each batch size keeps what was chosen for it."""

    def seconds_of(num_rows, num_tokens, draft_len):
        return max(10e-3, 0.5e-3 * num_tokens) + 0.3e-3 * draft_len

    decoding = Decoding(1, 0.7, seconds_of)
    decoding.run(200)
    assert most(decoding.run(100)) >= 2
    decoding.num_rows = 64
    decoding.run(200)
    assert most(decoding.run(200)) == 0
    for num_rows, is_on in ((1, True), (64, False), (1, True)):
        decoding.num_rows = num_rows
        assert (most(decoding.run(30)[1:]) > 0) == is_on, "it is known by now"


def test_in_between_drafts_are_shorter():
    def seconds_of(num_rows, num_tokens, draft_len):
        return 8e-3 + 0.2e-3 * num_tokens + 0.1e-3 * draft_len

    found = {}
    for num_rows in (1, 16, 256):
        decoding = Decoding(num_rows, 0.8, seconds_of)
        decoding.run(300)
        found[num_rows] = most(decoding.run(300))
    assert found[1] > found[16] > found[256], found


@pytest.mark.parametrize("seconds_of", [memory_bound, compute_bound])
@pytest.mark.parametrize("rate", [0.0, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("num_rows", [1, 8, 32])
def test_it_is_about_as_fast_as_the_best_fixed_length(num_rows, rate, seconds_of):
    decoding = Decoding(num_rows, rate, seconds_of, noise_ratio=0.1)
    decoding.run(500)
    best = max(
        num_rows
        * sum(rate**place for place in range(length + 1))
        / seconds_of(num_rows, num_rows * (1 + length), length)
        for length in (0, *LENGTHS)
    )
    assert decoding.speed(4000) > 0.96 * best


def test_drafts_come_back_when_texts_change():
    decoding = Decoding(1, 0.0)
    decoding.run(3000)
    assert most(decoding.run(200)) == 0
    decoding.rate = 0.9
    decoding.run(3 * MAX_PROBE_STEPS)
    assert most(decoding.run(200)) >= 3
    assert decoding.length.switches["on", "gain"] == 1


def test_without_probes_drafts_never_come_back(monkeypatch):
    monkeypatch.setattr(DraftLength, "_begin_probe", lambda *_: None)
    decoding = Decoding(1, 0.0)
    decoding.run(3000)
    decoding.rate = 0.9
    assert set(decoding.run(3 * MAX_PROBE_STEPS)) == {0}


def test_a_machine_that_changes_is_found_out_by_probes_of_no_drafts():
    """What steps without drafts take is not seen while all draft."""
    decoding = Decoding(8, 0.6)
    decoding.run(500)
    assert most(decoding.run(100)) > 0
    decoding.seconds_of = compute_bound
    decoding.run(3 * MAX_PROBE_STEPS)
    assert most(decoding.run(200)) == 0


def test_a_machine_whose_speed_changes_does_not_turn_useless_drafts_on():
    """Steps without drafts may have been measured while it was slow, probes of drafts while it was fast."""
    decoding, slowness = Decoding(1, 0.0), Random(0)
    decoding.run(300)
    lengths = []
    for _ in range(20):
        slow = slowness.uniform(0.5, 1.0)
        decoding.seconds_of = lambda *step, slow=slow: slow * memory_bound(*step)
        lengths += decoding.run(150)
    assert sum(map(bool, lengths)) < 0.05 * len(lengths)


def on_two_cores(num_rows, num_tokens, draft_len):
    return 7e-3 + 0.25e-3 * num_tokens + 0.35e-3 * draft_len


def dear(num_rows, num_tokens, draft_len):
    return 1.2e-3 + 6e-6 * num_tokens + (0.8e-3 if num_tokens > num_rows else 0.0) + 50e-6 * draft_len


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("num_rows", "rate", "seconds_of"), [(1, 0.75, on_two_cores), (64, 0.1, dear)])
def test_what_was_measured_on_a_busy_machine_does_not_mislead(num_rows, rate, seconds_of, seed):
    """It is up to three times slower for a while; time counts as on an idle one."""
    decoding, busy = Decoding(num_rows, rate, seconds_of, noise_ratio=0.1), Random(seed)
    num_tokens = seconds = 0.0
    for number in range(60):
        slowness = busy.choice((1, 1, 1, 1.5, 2, 3))
        decoding.seconds_of = lambda *step, slowness=slowness: slowness * seconds_of(*step)
        tokens_before, seconds_before = decoding.num_tokens, decoding.seconds
        decoding.run(busy.randrange(10, 200))
        if number >= 8:
            num_tokens += decoding.num_tokens - tokens_before
            seconds += (decoding.seconds - seconds_before) / slowness
    best = max(
        num_rows
        * sum(rate**place for place in range(length + 1))
        / seconds_of(num_rows, num_rows * (1 + length), length)
        for length in (0, *LENGTHS)
    )
    assert num_tokens / seconds > 0.985 * best


def even(num_rows, num_tokens, draft_len):
    """With 0.5 of drafts right, one token drafted brings nothing, more lose."""
    return 10e-3 * (1 + 0.5 * draft_len)


def num_changes(decoding):
    return decoding.length.switches["on", "gain"] + decoding.length.switches["off", "loss"]


def test_noise_does_not_switch_it_on_and_off():
    decoding = Decoding(32, 0.5, even, noise_ratio=0.02)
    decoding.run(10_000)
    assert num_changes(decoding) <= 20


def test_without_hysteresis_noise_does(monkeypatch):
    monkeypatch.setattr(draft_length, "LEAST_GAIN_RATIO", 1.0)
    monkeypatch.setattr(draft_length, "SETTLED_STEPS", 0)
    decoding = Decoding(32, 0.5, even, noise_ratio=0.02)
    decoding.run(10_000)
    assert num_changes(decoding) > 50


def test_a_step_without_tokens_for_drafts_has_none():
    decoding = Decoding(4, 0.9, max_tokens=8)
    assert set(decoding.run(100)) <= {0, 1}
    decoding.num_rows = 5
    assert set(decoding.run(10)) == {0}
    assert decoding.length.switches["off", "no_room"] == 1
    decoding.num_rows = 4
    assert most(decoding.run(10)) == 1


def test_it_decides_alike_on_like_news():
    found = [Decoding(8, 0.6, noise_ratio=0.2).run(500) for _ in range(2)]
    assert found[0] == found[1]


def test_a_step_that_samples_nothing_drafts_nothing():
    assert DraftLength(LENGTHS, 256).choose(0) == 0


def test_the_first_probe_comes_soon():
    """Until then nothing is known of steps without drafts."""
    lengths = Decoding(1, 0.9).run(FIRST_PROBE_STEPS + 4)
    assert lengths[0] > 0 and 0 in lengths


def test_rates_are_those_of_places_that_were_reached():
    rates = AcceptRates(3)
    for _ in range(1000):
        rates.verified(3, 3)
        rates.verified(3, 1)
        rates.stepped()
    #   place 1: always; 2: every other time; 3: always, if 2 was
    assert rates.expected_tokens([0, 1, 2, 3]) == pytest.approx([1, 2, 2.5, 3], abs=0.1)


def test_a_place_that_was_not_reached_is_taken_for_as_good_as_the_one_before():
    rates = AcceptRates(3)
    for _ in range(1000):
        rates.verified(1, 1)
    assert rates.expected_tokens([3])[0] == pytest.approx(4, abs=0.1)


def test_costs_not_measured_are_told_from_those_that_were():
    costs = DraftCosts()
    costs.measured(8, 0, 10.0, 1)
    assert costs.seconds(8, 2) > 10.0
    costs.measured(8, 2, 14.0, 2)
    assert [costs.seconds(8, length) for length in (0, 1, 2, 5)] == [10.0, 12.0, 14.0, 20.0]
    costs.measured(6, 0, 10.0, 2)
    costs.measured(6, 1, 9.0, 2)
    assert costs.seconds(6, 1) > 10.0, "a token more takes some time"
    costs.measured(12, 0, 20.0, 3)
    assert costs.seconds(12, 2) == pytest.approx(28.0), "as much longer as with eight rows"
    assert costs.measured_at(12, 0) == 3 and costs.measured_at(12, 1) == -1


def test_a_step_that_was_held_up_does_not_count():
    costs = DraftCosts()
    for step, seconds in enumerate([1.0, 1.0, 50.0, 1.0]):
        costs.measured(1, 0, seconds, step)
    assert costs.seconds(1, 0) == 1.0


def test_kinds_are_half_an_octave_apart():
    assert [kind_of(num_rows) for num_rows in (1, 2, 3, 4, 5, 7, 9, 100, 256)] == [
        1, 2, 3, 4, 6, 8, 12, 128, 256,
    ]  # fmt: skip
