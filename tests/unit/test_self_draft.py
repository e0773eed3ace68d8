"""Taps of the target's residual stream, and the target as its own draft."""

from pathlib import Path

import pytest
import torch

from tests.unit.draft_models import planned, pool_for, some_tokens, tiny_card, tiny_decoder
from workers.attention.reference import ReferenceAttention
from workers.layers.rotary import rotate
from workers.models.decoder import Decoder
from workers.models.self_draft import SelfDraft


@pytest.fixture
def decoder(tmp_path: Path) -> Decoder:
    return tiny_decoder(tiny_card(tmp_path))


def stream_after(decoder: Decoder, num_layers: int, token_ids: torch.Tensor) -> torch.Tensor:
    """Compute the residual stream after the first layers alone."""
    attention = ReferenceAttention(pool_for(decoder))
    positions = planned(attention, len(token_ids))
    hidden, delta = decoder.embedding(token_ids), torch.zeros(())
    for layer in list(decoder.layers)[:num_layers]:
        hidden, delta = layer(hidden + delta, None, *decoder.rotary(positions), attention)
    return hidden + delta


@pytest.mark.parametrize("layers", [(), (0,), (4,), (2, 0, 3), (1, 4, 1)])
def test_taps_are_the_stream_before_each_layer_in_the_order_asked(decoder: Decoder, layers) -> None:
    token_ids = some_tokens(7)
    attention = ReferenceAttention(pool_for(decoder))
    hidden, taps = decoder.forward_tapped(token_ids, planned(attention, 7), attention, layers)
    plain = ReferenceAttention(pool_for(decoder))
    assert torch.equal(hidden, decoder.forward(token_ids, planned(plain, 7), plain))
    assert len(taps) == len(layers)
    for layer, tap in zip(layers, taps, strict=True):
        torch.testing.assert_close(tap, stream_after(decoder, layer, token_ids))


class RotatingAttention(ReferenceAttention):
    """The reference, rotating keys itself."""

    def forward_unrotated(self, layer, q, k, v, cos, sin):
        return self.forward(layer, rotate(q, cos, sin), rotate(k, cos, sin), v)


@pytest.mark.parametrize("backend", [ReferenceAttention, RotatingAttention])
def test_the_target_as_its_own_draft_drafts_what_the_target_says(decoder: Decoder, backend) -> None:
    draft = SelfDraft(decoder)
    pool = pool_for(decoder)
    attention = backend(pool)
    tokens = some_tokens(6)
    _, taps = decoder.forward_tapped(tokens, planned(attention, 6), attention, draft.feature_layers)
    features = draft.feature(taps)
    assert features.shape == (6, draft.feature_size) and not features.any()
    targets_kv = [pool.layer(index)[0].clone() for index in range(4)]
    hidden = draft.forward(tokens, features, planned(attention, 6), attention)[-1:]
    for length in range(6, 12):
        alone = backend(pool_for(decoder))
        wanted = decoder.logits(decoder.forward(tokens, planned(alone, length), alone)[-1:])
        torch.testing.assert_close(draft.logits(hidden), wanted)
        token = draft.target_ids(draft.logits(hidden).argmax(-1))
        tokens = torch.cat([tokens, token])
        feature = draft.next_feature(hidden)
        hidden = draft.forward(token, feature, planned(attention, 1, length), attention)
    for index, kept in enumerate(targets_kv):
        torch.testing.assert_close(pool.layer(index)[0], kept, rtol=0, atol=0, equal_nan=True)


def test_its_layers_follow_the_targets_and_are_shaped_alike(decoder: Decoder) -> None:
    layers = SelfDraft(decoder).attention_layers
    assert [layer.index for layer in layers] == [4, 5, 6, 7]
    for own, theirs in zip(layers, decoder.attention_layers, strict=True):
        assert (own.num_kv_heads, own.head_dim, own.scale) == (
            theirs.num_kv_heads,
            theirs.head_dim,
            theirs.scale,
        )
