"""Simulated drafting computes, for every place at once, what drafting from there over paged KV computes."""

from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.unit.draft_models import CPU, planned, pool_for, some_tokens, tiny_card, tiny_decoder
from workers.attention.reference import ReferenceAttention
from workers.draft_card import RANDOM_DRAFT, read_draft_card
from workers.draft_training.batches import Batch, batches_from, epoch_batches, make_batch
from workers.draft_training.corpus import Sample
from workers.draft_training.padded_attention import PaddedAttention, simulation_mask
from workers.draft_training.rounds import rounds
from workers.draft_training.simulation import draft_and_compare, simulate, view_target
from workers.draft_training.trainer import learning_rate_ratio
from workers.draft_training.vocabulary import DraftVocabulary, count_tokens, coverage, most_frequent
from workers.models.draft_weights import load_draft
from workers.models.eagle_draft import Eagle3Draft
from workers.parallel import TPGroup

NUM_STEPS = 4
LENS, PROMPT_LENS = (13, 9), (4, 3)


@pytest.fixture
def models(tmp_path: Path):
    group = TPGroup.single()
    card = tiny_card(tmp_path, num_hidden_layers=6)
    decoder = tiny_decoder(card, group)
    draft_card = read_draft_card(RANDOM_DRAFT, card)
    return decoder, load_draft(
        draft_card, decoder, group=group, device=CPU, dtype=torch.float32, seed=4
    ).model


def samples() -> list[Sample]:
    return [
        Sample(some_tokens(length, seed=place).numpy(), prompt_len)
        for place, (length, prompt_len) in enumerate(zip(LENS, PROMPT_LENS, strict=True))
    ]


def drafted_from(decoder, draft, token_ids: torch.Tensor, place: int) -> list[torch.Tensor]:
    """Draft on from `place` as a serving engine does: extend over what is known, then entry by entry."""
    known = token_ids[: place + 1]
    attention = ReferenceAttention(pool_for(decoder))
    _, taps = decoder.forward_tapped(known, planned(attention, len(known)), attention, draft.feature_layers)
    features = draft.feature(taps)
    before = torch.cat([torch.zeros_like(features[:1]), features[:-1]])
    hidden = draft.forward(known, before, planned(attention, len(known)), attention)[-1:]
    found = [hidden]
    for step in range(1, NUM_STEPS):
        if place + step >= len(token_ids):
            break
        positions = planned(attention, 1, place + step)
        hidden = draft.forward(
            token_ids[place + step : place + step + 1], draft.next_feature(hidden), positions, attention
        )
        found.append(hidden)
    return found


def test_every_place_drafts_as_the_engine_would_from_there(models) -> None:
    decoder, draft = models
    batch = make_batch(samples(), max_len=64, device=CPU)
    attention = PaddedAttention(*batch.token_ids.shape)
    _, taps = decoder.forward_tapped(
        batch.token_ids.view(-1), batch.positions, attention, draft.feature_layers
    )
    length = batch.token_ids.shape[1]
    simulated = [hidden.view(len(LENS), length, -1) for hidden in simulate(draft, batch, taps, NUM_STEPS)]
    num_compared = 0
    for row, size in enumerate(LENS):
        token_ids = batch.token_ids[row, :size]
        for place in range(size):
            for step, hidden in enumerate(drafted_from(decoder, draft, token_ids, place)):
                torch.testing.assert_close(
                    simulated[step][row, place + step], hidden[0], rtol=2e-4, atol=2e-4
                )
                num_compared += 1
    assert num_compared == sum(NUM_STEPS * size - 6 for size in LENS)


@pytest.mark.parametrize("prompt_len", [1, 4])
def test_without_the_first_entry_nobody_behind_it_sees_it(models, prompt_len) -> None:
    """As if a sequence began at its second token, with the feature of the first."""
    decoder, draft = models
    token_ids = some_tokens(13, seed=3)
    batch = make_batch([Sample(token_ids.numpy(), prompt_len)], max_len=64, device=CPU)
    attention = PaddedAttention(*batch.token_ids.shape)
    _, taps = decoder.forward_tapped(
        batch.token_ids.view(-1), batch.positions, attention, draft.feature_layers
    )
    found = simulate(draft, batch, taps, NUM_STEPS, has_first_entry=False)
    paged = ReferenceAttention(pool_for(decoder))
    features = draft.feature(taps)[:12]
    positions = planned(paged, 12)
    later = draft.forward(token_ids[1:], features, positions, paged)  # RoPE looks at distances alone
    torch.testing.assert_close(found[0][1:13], later, rtol=2e-4, atol=2e-4)
    with_it = simulate(draft, batch, taps, NUM_STEPS)
    assert all(not torch.allclose(one[5:13], other[5:13]) for one, other in zip(with_it, found, strict=True))
    assert all(hidden.isfinite().all() for hidden in found)


def test_the_mask_is_that_of_an_explicit_walk() -> None:
    length = 7
    for step in range(4):
        seen = simulation_mask(length, step, CPU).view(length, step + 1, length)
        for place in range(step, length):
            keys = {(0, before) for before in range(place - step + 1)}
            keys |= {(later, place - step + later) for later in range(1, step + 1)}
            assert {tuple(key) for key in seen[place].nonzero().tolist()} == keys
        assert seen.flatten(1).any(dim=1).all(), "an entry that sees nothing is NaN"


def test_a_sliding_window_holds_in_padded_batches(tmp_path: Path) -> None:
    card = tiny_card(tmp_path, architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=4)
    decoder = tiny_decoder(card)
    tokens = some_tokens(11)
    paged = ReferenceAttention(pool_for(decoder))
    wanted = decoder.forward(tokens, planned(paged, 11), paged)
    found = decoder.forward(tokens, torch.arange(11), PaddedAttention(1, 11))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_draft_is_asked_where_the_engine_asks_it() -> None:
    batch = make_batch(samples(), max_len=64, device=CPU)
    # the first entry behind the prompt up to the last but one token, which guesses the last
    assert batch.asked.tolist() == [*range(4, 12), *range(16 + 3, 16 + 8)]
    assert batch.behind.tolist() == [*range(8), *range(5)]
    cut = make_batch(samples(), max_len=6, device=CPU)
    assert cut.token_ids.shape == (2, 16)
    assert cut.asked.tolist() == [4, 16 + 3, 16 + 4]


def test_what_is_right_is_what_the_target_would_choose(models) -> None:
    decoder, draft = models
    vocabulary = DraftVocabulary.of(draft.target_ids(torch.arange(draft.draft_vocab_size)), 300)
    batch = make_batch(samples(), max_len=64, device=CPU)
    target = view_target(decoder, batch, draft.feature_layers, vocabulary)
    simulated = draft_and_compare(draft, batch, target, vocabulary, NUM_STEPS)
    asked = 0
    for row, (size, prompt_len) in enumerate(zip(LENS, PROMPT_LENS, strict=True)):
        token_ids = batch.token_ids[row, :size]
        paged = ReferenceAttention(pool_for(decoder))
        choices = decoder.logits(decoder.forward(token_ids, planned(paged, size), paged)).argmax(-1)
        for place in range(prompt_len, size - 1):
            assert target.best[asked] == choices[place]
            for step in range(min(NUM_STEPS, place - prompt_len + 1)):
                hidden = drafted_from(decoder, draft, token_ids, place - step)[step]
                guess = draft.target_ids(draft.logits(hidden).argmax(-1))
                assert bool(simulated.right[step, asked]) == bool(guess == choices[place])
            asked += 1
    assert asked == len(batch.asked)


def test_no_step_is_right_before_it_could_have_been_reached(models) -> None:
    decoder, draft = models
    vocabulary = DraftVocabulary.of(draft.target_ids(torch.arange(draft.draft_vocab_size)), 300)
    batch = make_batch(samples(), max_len=64, device=CPU)
    target = view_target(decoder, batch, draft.feature_layers, vocabulary)
    for step, hidden in enumerate(simulate(draft, batch, target.taps, NUM_STEPS)):
        guesses = draft.target_ids(draft.logits(hidden[batch.asked]).argmax(-1))
        agreeing = replace(target, best=guesses)
        right = draft_and_compare(draft, batch, agreeing, vocabulary, NUM_STEPS).right
        assert right[step].tolist() == [behind >= step for behind in batch.behind.tolist()]


def test_rounds_go_as_far_as_drafts_are_right() -> None:
    right = np.array([[1, 1, 0, 1, 1], [0, 1, 0, 0, 1], [0, 0, 1, 0, 0]], dtype=bool)
    # from place 0 all three are right, at places 0, 1 and 2; on from 4, with room for one
    assert rounds(right) == [(3, 3), (1, 1)]
    assert rounds(np.zeros((3, 4), dtype=bool)) == [(3, 0), (3, 0), (2, 0), (1, 0)]


def test_the_vocabulary_is_the_most_frequent_tokens_and_its_tables_lead_there() -> None:
    found = [Sample(np.array([9, 9, 9, 5, 5, 7, 2, 5, 7]), 3)]
    counts = count_tokens(found, 12)
    assert counts[9] == 0, "prompts are no answers"
    ids = most_frequent(counts, 2)
    assert ids.tolist() == [5, 7]
    assert coverage(counts, ids) == pytest.approx(5 / 6)
    tables = DraftVocabulary.of(torch.from_numpy(ids), 12).tables()
    assert (torch.arange(2) + tables["d2t"]).tolist() == [5, 7]
    assert tables["t2d"].nonzero().flatten().tolist() == [5, 7]


def test_an_epoch_has_every_sample_once_and_any_step_can_be_begun_from() -> None:
    lens = [5 + 7 * place % 40 for place in range(50)]
    epochs = [epoch_batches(lens, 128, 64, seed=3, epoch=epoch) for epoch in range(2)]
    assert all(sorted(chain(*epoch)) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    for batch in epochs[0]:
        longest = -(-max(lens[place] for place in batch) // 16) * 16
        assert len(batch) == 1 or len(batch) * longest <= 128
    order = list(chain(*epochs))
    for first in (0, 3, len(epochs[0]), len(epochs[0]) + 1):
        found = batches_from(lens, 128, 64, 3, first)
        assert [next(found) for _ in range(3)] == order[first : first + 3]


def test_the_learning_rate_rises_then_falls() -> None:
    ratios = [learning_rate_ratio(step, 100) for step in range(101)]
    assert ratios[:4] == [0.25, 0.5, 0.75, 1.0]
    assert all(later <= sooner for sooner, later in pairwise(ratios[4:]))
    assert ratios[-1] == pytest.approx(0.02)


def test_gradients_reach_all_of_the_draft_and_nothing_of_the_target(models) -> None:
    decoder, draft = models
    assert isinstance(draft, Eagle3Draft)
    placements = draft.placements()
    for placement in placements.values():
        placement.parameter.requires_grad_(True)
    vocabulary = DraftVocabulary.of(draft.target_ids(torch.arange(draft.draft_vocab_size)), 300)
    batch: Batch = make_batch(samples(), max_len=64, device=CPU)
    target = view_target(decoder, batch, draft.feature_layers, vocabulary)
    draft_and_compare(draft, batch, target, vocabulary, 2).loss.backward()
    assert all(p.parameter.grad is not None and p.parameter.grad.any() for p in placements.values())
    assert all(parameter.grad is None for parameter in decoder.parameters())
