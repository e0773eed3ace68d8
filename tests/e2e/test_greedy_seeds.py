"""Greedy tokens are the oracle's whatever a seed draws: policies, sources, restarts, delays, losses, drafts.

Half of the seeds serve with a draft. Whatever befalls its pages, all that a perfect one guesses is right.

A few seeds run in `make test`, as many as `--seeds` says in `make test-slow`. A failure's name has its seed:
`pytest tests/e2e/test_greedy_seeds.py -k 'random_model and seed-17-'`.
"""

import pytest

from tests.followers import Followers
from tests.oracle.make_oracle import read_records
from tests.scenario import Case, Comparison
from tests.tier_seeds import TierSeed, TookPlace
from tests.tiny_oracle import make_tiny
from tests.unit.mooncake_master import MooncakeMaster, has_mooncake

NUM_QUICK = 6
PLACES = ("host", "host", "peer", "peer", "disk")
RECORDS = [Case(record.prompt_ids, record.token_ids, record.margins) for record in read_records()]
ENOUGH = 60
"""Seeds that do all of this among them."""
MUST_HAPPEN = (
    "prefix: host",
    "prefix: peer",
    "prefix: remote",
    "saved",
    "loaded",
    "node: evicted",
    "node: recovered",
    "node: puts stored",
    "node: puts corrupt",
    "load failed: corrupt",
    "load failed: io",
    "load failed: stale",
    "save failed: io",
    "commit: no_parent",
    "fetch failed: peer corrupt",
    "fetch failed: peer failed",
    "fetch failed: remote corrupt",
    "fetch failed: remote failed",
    "attached again",
    "restarts seen",
    "call sent lost",
    "call sent twice",
    "call heard lost",
    "call heard late",
    "call: commit timeout",
    "peer call sent lost",
    "peer call heard lost",
    "peer call heard late",
    "broadcast heard lost",
    "broadcast heard late",
    "duplicates",
    "gaps",
    "undecodable",
    "drafts accepted: self",
    "drafts rejected: random-eagle3",
    "prefix with a draft: host",
    "prefix with a draft: peer",
    "prefix with a draft: remote",
)


def pytest_generate_tests(metafunc):
    """Of the costly arms, one seed in twenty."""
    if "seed" not in metafunc.fixturenames:
        return
    num_seeds = metafunc.config.getoption("seeds")
    is_costly = "random_model" not in metafunc.definition.name or "mooncake" in metafunc.definition.name
    seeds = []
    for seed in range(num_seeds // 20 if is_costly else num_seeds):
        is_slow = is_costly or seed >= NUM_QUICK
        seeds.append(pytest.param(seed, id=f"seed-{seed}-", marks=[pytest.mark.slow] if is_slow else []))
    metafunc.parametrize("seed", seeds)


@pytest.fixture(scope="module")
def followers():
    with Followers(1) as followers:
        yield followers


@pytest.fixture(scope="module")
def comparison():
    comparison = Comparison()
    yield comparison
    comparison.finish()


@pytest.fixture(scope="module")
def took_place():
    took_place = TookPlace()
    yield took_place
    if took_place.num_seeds >= ENOUGH:
        missing = [name for name in MUST_HAPPEN if not took_place.counts[name]]
        assert not missing, f"in {took_place.num_seeds} seeds never: {missing}; {took_place.counts}"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return str(folder), make_tiny(folder, (14, 23, 30, 36, 36), common_len=9, seed=2)


@pytest.fixture(scope="module")
def mooncake(tmp_path_factory):
    """A master, a member whose memory holds the records, and what took place over them."""
    if not has_mooncake():
        pytest.skip("Mooncake cannot be imported: no wheel or no libibverbs1")
    from tests.unit.test_mooncake_store import SegmentOwner

    master = MooncakeMaster(tmp_path_factory.mktemp("mooncake") / "master.log")
    owner = SegmentOwner(master).store
    took_place = TookPlace()
    yield master.endpoint, owner, took_place
    owner.close()
    master.kill()
    if took_place.num_seeds >= 10:
        missing = [name for name in ("node: puts stored", "prefix: remote") if not took_place.counts[name]]
        assert not missing, f"in {took_place.num_seeds} seeds never: {missing}; {took_place.counts}"


@pytest.mark.timeout(120)
def test_a_random_model_answers_like_the_oracle(seed, tiny, tmp_path, followers, comparison, took_place):
    model, cases = tiny
    draw = TierSeed.draw(seed, PLACES, page_sizes=(2, 4, 8))
    draw.play(cases, tmp_path, followers, comparison, took_place, model=model)


@pytest.mark.timeout(120)
def test_a_random_model_answers_like_the_oracle_over_mooncake(
    seed, mooncake, tiny, tmp_path, followers, comparison
):
    master, owner, took_place = mooncake
    model, cases = tiny
    owner.remove_all(True)
    draw = TierSeed.draw(seed, ["store"], page_sizes=(2, 4, 8))
    store = f"mooncake:{master}?segment_gb=0"
    draw.play(cases, tmp_path, followers, comparison, took_place, store, model=model)


@pytest.mark.timeout(120)
def test_smollm2_answers_like_the_oracle(seed, tmp_path, followers, comparison):
    cases = [case.cut(4) for case in RECORDS if len(case.prompt_ids) < 50][3 * seed % 30 :][:3]
    draw = TierSeed.draw(seed, PLACES, page_sizes=(8, 16))
    draw.play(cases, tmp_path, followers, comparison, TookPlace())
