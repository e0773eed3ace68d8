"""Trees of drafts: the answers are those without, at every width, and what was right is where it belongs.

`self`, the target as its own draft, is right at its first choice; `second`, the same with first and second
choice exchanged, is wrong there and right beside it.
"""

import pytest
import torch
from pydantic import ValidationError

from tests.e2e.test_speculation import PROMPTS, SAMPLINGS, answers
from tests.harness import Harness, tiny_config, write_tiny_model
from workers.kvcache.kv_pool import KVPool
from workers.kvcache.page_pool import Safety
from workers.kvcache.page_table import PageTableError
from workers.models.eagle_draft import Eagle3Draft
from workers.models.self_draft import SelfDraft
from workers.plan import CompletePages
from workers.speculative.speculator import Speculator
from workers.speculative.tree import DEPTH, PARENT, VISIBLE

LIKED = 17


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def second(monkeypatch):
    """Make `self` a draft whose second choice is right and nearly as likely as its first; all else is far."""

    def exchange(logits):
        def exchanged(self, hidden):
            found = logits(self, hidden)
            best = found.topk(2, dim=-1).indices
            likely = torch.tensor([[0.0, 0.1]]).expand(len(found), 2)
            return torch.full_like(found, -20.0).scatter_(1, best, likely)

        return exchanged

    monkeypatch.setattr(SelfDraft, "logits", exchange(SelfDraft.logits))
    return "self"


@pytest.fixture
def of_one_mind(monkeypatch):
    """Make `random-eagle3` guess the token that a bias makes the target choose."""
    logits = Eagle3Draft.logits

    def biased(self, hidden):
        found = logits(self, hidden)
        own_id = int((self.target_ids(torch.arange(found.shape[1])) == LIKED).nonzero()[0])
        found[:, own_id] += 100.0
        return found

    monkeypatch.setattr(Eagle3Draft, "logits", biased)
    return {"logit_bias": [(LIKED, 100.0)]}


def lengths(harness):
    return {length: count for (_, length), count in harness.scheduler.stats.accept_lengths.items()}


@pytest.mark.parametrize("draft", ["self", "random-eagle3"])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_answers_are_those_without_a_draft(model, draft, sampling):
    _, expected = answers(model, sampling=SAMPLINGS[sampling])
    harness, found = answers(model, sampling=SAMPLINGS[sampling], draft=draft, draft_topk=3)
    for answer, wanted in zip(found, expected, strict=True):
        assert answer.token_ids == wanted.token_ids
        assert answer.finish_reason == wanted.finish_reason
        for own, theirs in zip(answer.logprobs, wanted.logprobs, strict=True):
            assert own.top_ids == theirs.top_ids
            assert own.logprob == pytest.approx(theirs.logprob, abs=1e-4)
    assert draft == "random-eagle3" or max(lengths(harness)) > 1


@pytest.mark.parametrize("topk", [2, 4])
def test_a_draft_that_is_always_right_is_believed(model, topk):
    """As a chain of its depth: three tokens and one more for each step that verifies, whatever is beside."""
    options = {"draft": "self", "draft_topk": topk, "prompts": PROMPTS[2:3], "max_tokens": 21}
    harness, found = answers(model, graph_batch_sizes=(1, 2), **options)
    assert harness.engine.graph_steps["verify", "replay"] == 5
    assert all(plan.num_drafts in ([], [3 * topk]) for plan in harness.plans)
    assert harness.scheduler.stats.accept_lengths == {("computed", 4): 5}
    assert len(found[0].token_ids) == 21


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_what_is_right_beside_the_chain_is_found(model, second, backend):
    options = {"attention_backend": backend, "prompts": PROMPTS[2:3], "max_tokens": 21}
    _, expected = answers(model, **options)
    chain, found = answers(model, draft=second, **options)
    assert found[0].token_ids == expected[0].token_ids
    assert lengths(chain) == {1: 20}
    for topk in (2, 3):
        harness, found = answers(model, draft=second, draft_topk=topk, **options)
        assert found[0].token_ids == expected[0].token_ids
        assert min(lengths(harness)) >= 2 and max(lengths(harness)) <= 4
        assert sum(length * count for length, count in lengths(harness).items()) >= 20


@pytest.mark.parametrize("draft", ["self", "random-eagle3"])
@pytest.mark.parametrize("page_size", [1, 2, 8])
@pytest.mark.parametrize(("topk", "draft_tokens"), [(2, 1), (2, 5), (5, 3)])
def test_any_page_size_width_and_length(model, draft, page_size, topk, draft_tokens):
    """Prompts in chunks beside rows that decode, prefix hits, a pool in which requests have to give way."""
    _, expected = answers(model, page_size=page_size, num_pages=1024 // page_size)
    options = {
        "draft": draft,
        "draft_topk": topk,
        "draft_tokens": draft_tokens,
        "page_size": page_size,
        "num_pages": 112 // page_size,
        "max_tokens_per_step": 40,
    }
    harness, found = answers(model, prompts=PROMPTS + PROMPTS, **options)
    assert harness.scheduler.stats.num_preemptions > 0
    assert any(plan.num_drafts for plan in harness.plans)
    assert all(plan.mode == "verify" for plan in harness.plans if plan.num_drafts)
    goes_on = [plan for plan in harness.plans if len(plan.sampled) < len(plan.slots)]
    assert goes_on and not any(plan.draft_len for plan in goes_on)
    for answer, wanted in zip(found, expected + expected, strict=True):
        assert answer.token_ids == wanted.token_ids


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_a_draft_that_says_no_numbers_changes_no_answer(model, monkeypatch, value):
    """As one in float16 whose sums overflow: of some tokens nothing, or only which one is the first."""
    logits, random = SelfDraft.logits, torch.Generator().manual_seed(3)

    def broken(self, hidden):
        found = logits(self, hidden).clone()
        best = found.argmax(dim=-1, keepdim=True)
        is_broken = torch.rand(len(found), 1, generator=random) < 0.5
        others = torch.full_like(found, value).scatter_(1, best, found.gather(1, best))
        return torch.where(is_broken, others, found)

    _, expected = answers(model)
    monkeypatch.setattr(SelfDraft, "logits", broken)
    harness, found = answers(model, draft="self", draft_topk=3)
    assert [answer.token_ids for answer in found] == [answer.token_ids for answer in expected]
    assert any(plan.num_drafts for plan in harness.plans)


def pages_of(model, page_size, sampling=None, **options):
    """Answer a prompt; return the keys of the pages that it completes, all their parts, and its tokens."""
    config = tiny_config(model, page_size=page_size, attention_backend="native", **options)
    with Harness(config) as harness:
        harness.submit("r", PROMPTS[2], max_tokens=30, ignore_eos=True, **sampling or {})
        harness.run()
        ops = [op for plan in harness.plans for op in plan.ops if isinstance(op, CompletePages)]
        pool = harness.engine.pool
        pages = torch.tensor([page for op in ops for page in op.pages])
        layers = [half[pages].clone() for index in range(pool.num_layers) for half in pool.layer(index)]
        parts = [*layers, pool.tails[pages].clone()]
        return [key for op in ops for key in op.keys], parts, harness.answers["r"].token_ids


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("draft", ["self", "random-eagle3"])
def test_pages_hold_what_a_chain_leaves_in_them(model, draft, page_size):
    """All of a bundle, the draft's entries and tails too: a function of the tokens alone."""
    keys, parts, tokens = pages_of(model, page_size, draft=draft)
    own_keys, own_parts, own_tokens = pages_of(model, page_size, draft=draft, draft_topk=3)
    assert own_tokens == tokens and own_keys == keys and len(keys) > 30 // page_size
    for own, theirs in zip(own_parts, parts, strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-5)


def test_entries_that_are_not_moved_are_found_out(model, monkeypatch):
    _, expected = answers(model)
    monkeypatch.setattr(KVPool, "move_entries", lambda self, sources, targets: None)
    _, found = answers(model, draft="self", draft_topk=3)
    assert [answer.token_ids for answer in found] != [answer.token_ids for answer in expected]


def test_entries_that_are_written_before_all_are_read_are_found_out(model, monkeypatch, second):
    """Node 2 goes to place 1, and what stood there, node 1's, would go on to another."""
    move = KVPool.move_entries

    def one_by_one(self, sources, targets):
        for at in reversed(range(len(sources))):
            move(self, sources[at : at + 1], targets[at : at + 1])

    _, expected = answers(model)
    monkeypatch.setattr(KVPool, "move_entries", one_by_one)
    _, found = answers(model, draft=second, draft_topk=2, draft_tokens=5)
    assert [answer.token_ids for answer in found] != [answer.token_ids for answer in expected]


def spoil(monkeypatch, field, value):
    """Let a field of all nodes be the same while they are put into a batch."""
    grow = Speculator._grow

    def spoilt(self, batch, index):
        kept = self._state.fields.clone()
        self._state.fields[:, field] = value
        batch = grow(self, batch, index)
        self._state.fields.copy_(kept)
        return batch

    monkeypatch.setattr(Speculator, "_grow", spoilt)


@pytest.mark.parametrize(("field", "value"), [(DEPTH, 1), (VISIBLE, -1)])
def test_nodes_that_are_elsewhere_or_see_siblings_are_found_out(model, monkeypatch, second, field, value):
    _, expected = answers(model)
    spoil(monkeypatch, field, value)
    _, found = answers(model, draft=second, draft_topk=3)
    assert [answer.token_ids for answer in found] != [answer.token_ids for answer in expected]


def test_nodes_of_other_parents_are_found_out(model, monkeypatch, of_one_mind):
    """By the draft's part of pages: the target computes nothing from features."""
    options = {"draft": "random-eagle3", "draft_topk": 2, "sampling": of_one_mind}
    keys, parts, tokens = pages_of(model, 4, **options)
    assert set(tokens) == {LIKED}
    own_keys, own_parts, _ = pages_of(model, 4, **options)
    assert own_keys == keys and all(torch.equal(*each) for each in zip(own_parts, parts, strict=True))
    spoil(monkeypatch, PARENT, 0)
    own_keys, own_parts, _ = pages_of(model, 4, **options)
    assert own_keys == keys
    num_target_parts = len(parts) - 3  # of one draft layer keys and values, and tails
    for number, each in enumerate(zip(own_parts, parts, strict=True)):
        assert torch.equal(*each) == (number < num_target_parts or number == len(parts) - 1)


@pytest.mark.parametrize("sanitizer", [False, True])
def test_trees_without_places_reserved_for_them_are_found_out(model, sanitizer):
    config = tiny_config(
        model, draft="random-eagle3", draft_topk=4, page_size=1, checked=True, kv_sanitizer=sanitizer
    )
    with Harness(config, safety=Safety(reserves_ahead=False)) as harness:
        harness.submit("r", PROMPTS[2], max_tokens=20, ignore_eos=True)
        with pytest.raises(PageTableError, match="has no page for position"):
            harness.run()


@pytest.mark.parametrize(("topk", "draft_tokens"), [(8, 8), (4, 16)])
def test_a_tree_that_is_too_large_is_refused(model, topk, draft_tokens):
    with pytest.raises(ValidationError, match=f"draft_topk: found {topk} with draft_tokens={draft_tokens}"):
        tiny_config(model, draft="self", draft_topk=topk, draft_tokens=draft_tokens)


def test_auto_chooses_how_deep_a_tree_is(model):
    """Drafts cost nothing for half of the steps, then more than they bring: trees of several depths are
    verified by steps that draft others, or none."""
    _, expected = answers(model, max_tokens=120)
    config = tiny_config(model, draft="self", draft_topk=2, draft_tokens="auto", max_tokens_per_step=64)
    with Harness(config) as harness:
        for number, prompt in enumerate(PROMPTS):
            harness.submit(f"r{number}", prompt, max_tokens=120, ignore_eos=True)
        while harness.scheduler.has_requests:
            num_steps = len(harness.plans)
            harness.step()
            for plan in harness.plans[num_steps:]:
                cost = 0.0 if num_steps < 15 else 9.0
                harness.scheduler.stepped(plan, 0.01 * (1 + cost * plan.draft_len), now_s=0.01 * plan.step)
    assert [answer.token_ids for answer in harness.answers.values()] == [each.token_ids for each in expected]
    assert len({plan.draft_len for plan in harness.plans} - {0}) > 1
    verified = {(num, plan.draft_len) for plan in harness.plans for num in plan.num_drafts}
    assert all(num % 2 == 0 for num, _ in verified)
    assert any(num and 0 < length != num // 2 for num, length in verified), "another depth is drafted"
    assert any(num and not length for num, length in verified), "it turns itself off"
