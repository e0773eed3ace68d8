"""Attention over padded batches, without pages: what training hands to the models' layers in place of a
backend over the KV pool. Rows begin at their left; what pads them on the right is seen by padding alone.
"""

import torch
from torch import Tensor
from torch.nn import functional

from workers.attention.backend import AttentionLayer
from workers.engine.forward_batch import ForwardBatch
from workers.plan import Mode


class PaddedAttention:
    """Causal attention of rows [num_rows, length], all computed at once: an AttentionBackend for targets."""

    captured_modes: frozenset[Mode] = frozenset()

    def __init__(self, num_rows: int, length: int) -> None:
        self._num_rows = num_rows
        self._length = length

    def plan(self, batch: ForwardBatch) -> None:
        """Refuse: padded batches need no plan."""
        raise AssertionError("padded batches are not planned")

    def begin(self) -> None:
        """Do nothing."""

    def forward(self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See AttentionBackend; tokens are the rows' one after another, padding included."""
        q, k, v = (self._heads(x) for x in (q, k, v))
        window = layer.sliding_window
        if window is None or window >= self._length:
            attended = functional.scaled_dot_product_attention(
                q, *_repeated(layer, k, v), is_causal=True, scale=layer.scale
            )
        else:
            place = torch.arange(self._length, device=q.device)
            distance = place[:, None] - place
            mask = (distance >= 0) & (distance < window)
            attended = functional.scaled_dot_product_attention(
                q, *_repeated(layer, k, v), attn_mask=mask, scale=layer.scale
            )
        return self._tokens(attended)

    def _heads(self, x: Tensor) -> Tensor:
        """[tokens, heads, head_dim] -> [rows, heads, length, head_dim]"""
        return x.reshape(self._num_rows, self._length, *x.shape[1:]).transpose(1, 2)

    def _tokens(self, x: Tensor) -> Tensor:
        """[rows, heads, length, head_dim] -> [tokens, heads * head_dim]"""
        return x.transpose(1, 2).reshape(self._num_rows * self._length, -1)


class SimulatedAttention(PaddedAttention):
    """The draft's, while every place of every row drafts on at once: an AttentionBackend whose `forward` is
    called once a step, with gradients.

    In step s the entry at place i has been drafted from place i - s on. It sees the keys that draft-extend
    wrote up to there, and one of each step since:

        place            0 .. i-s   i-s+1   i-s+2   ...   i
        key of step          0        1       2           s

    Without `has_first_entry` nobody behind place 0 sees the key there, which published heads never had.
    """

    def __init__(self, num_rows: int, length: int, *, has_first_entry: bool = True) -> None:
        super().__init__(num_rows, length)
        self._has_first_entry = has_first_entry
        self._keys: dict[int, list[Tensor]] = {}
        """By layer."""
        self._values: dict[int, list[Tensor]] = {}

    def forward(self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See AttentionBackend; the keys of a layer's earlier calls are those of earlier steps."""
        q, k, v = (self._heads(x) for x in (q, k, v))
        known, seen = self._keys.setdefault(layer.index, []), self._values.setdefault(layer.index, [])
        known.append(k)
        seen.append(v)
        keys, values = torch.cat(known, dim=2), torch.cat(seen, dim=2)
        if len(known) == 1 and self._has_first_entry:
            attended = functional.scaled_dot_product_attention(
                q, *_repeated(layer, keys, values), is_causal=True, scale=layer.scale
            )
        else:
            mask = simulation_mask(self._length, len(known) - 1, q.device)
            if not self._has_first_entry:
                mask[1:, 0] = False  # place 0 sees itself: of use to nobody, but never nothing
            attended = functional.scaled_dot_product_attention(
                q, *_repeated(layer, keys, values), attn_mask=mask, scale=layer.scale
            )
        return self._tokens(attended)


def simulation_mask(length: int, step: int, device: torch.device) -> Tensor:
    """Return which keys [length, (step + 1) * length] the entries of a step see, by key's step and place.

    Places before `step` cannot have been drafted so far; what they see is of no use, but never nothing.
    """
    place = torch.arange(length, device=device)
    behind = place[:, None] - place  # by how many places a key lies behind the entry
    #        keys of step 0:  i - s and before  | of step j: at i - s + j
    parts = [behind >= step, *[behind == step - later for later in range(1, step + 1)]]
    return torch.cat(parts, dim=1)


def _repeated(layer: AttentionLayer, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys and values with a head for each query head."""
    ratio = layer.num_heads // layer.num_kv_heads
    if ratio == 1:
        return k, v
    return k.repeat_interleave(ratio, dim=1), v.repeat_interleave(ratio, dim=1)
