"""A tiny target, a pool with room for a draft's layers behind the target's, and rows to run on them."""

import math
from pathlib import Path

import numpy as np
import torch

from tests.unit.model_files import write_directory
from workers.attention.reference import ReferenceAttention
from workers.card import ModelCard, load_card
from workers.engine.forward_batch import ForwardBatch
from workers.kvcache.kv_pool import KVPool
from workers.kvcache.layout import target_only
from workers.models.decoder import Decoder
from workers.models.weights import load_model
from workers.parallel import TPGroup

CPU = torch.device("cpu")
PAGE_SIZE = 4
NUM_PAGES = 12
NUM_DRAFT_LAYERS = 4
"""Room in each pool: as many as a four-layer target has, for a draft that is the target itself."""


def tiny_card(folder: Path, **changes) -> ModelCard:
    """Write a target's metadata to `folder` and read it."""
    settings = {"num_hidden_layers": 4, "torch_dtype": "float32"} | changes
    return load_card(str(write_directory(folder, **settings)))


def tiny_decoder(card: ModelCard, group: TPGroup | None = None, seed: int = 1) -> Decoder:
    """Return the card's model with random float32 weights."""
    group = group or TPGroup.single()
    return load_model(card, group=group, device=CPU, dtype="float32", load_format="dummy", seed=seed).decoder


def pool_for(decoder: Decoder, num_draft_layers: int = NUM_DRAFT_LAYERS) -> KVPool:
    """Return a poisoned pool whose target section has room for a draft's layers as well."""
    layer = decoder.attention_layers[0]
    num_layers = decoder.config.num_layers + num_draft_layers
    layout = target_only(num_layers, PAGE_SIZE, layer.num_kv_heads, layer.head_dim, "float32")
    pool = KVPool(layout, NUM_PAGES, CPU)
    pool.poison_all()
    return pool


def one_row(num_tokens: int, first: int = 0) -> ForwardBatch:
    """Return a row of `num_tokens` tokens that begins at position `first`, on pages of no order."""
    stop = first + num_tokens
    pages = np.random.default_rng(5).permutation(np.arange(1, NUM_PAGES + 1)).astype(np.int32)
    pages = pages[None, : math.ceil(stop / PAGE_SIZE)]
    places = np.arange(first, stop)
    locations = pages[0, places // PAGE_SIZE].astype(np.int64) * PAGE_SIZE + places % PAGE_SIZE
    starts = np.array([0, num_tokens], dtype=np.int32)
    lens = np.array([stop], dtype=np.int32)
    return ForwardBatch(
        mode="mixed",
        bucket=None,
        num_real_rows=1,
        num_samples=1,
        token_ids=torch.zeros(num_tokens, dtype=torch.int64),
        positions=torch.from_numpy(places.astype(np.int64)),
        page_rows=torch.from_numpy(pages),
        num_columns=torch.tensor(pages.shape[1:], dtype=torch.int32),
        max_columns=pages.shape[1],
        query_starts=torch.from_numpy(starts),
        slots=torch.arange(len(starts) - 1),
        context_lens=torch.from_numpy(lens),
        out_locations=torch.from_numpy(locations),
        sample_indices=torch.tensor([num_tokens - 1]),
        host_query_starts=starts,
        host_context_lens=lens,
    )


def planned(attention: ReferenceAttention, num_tokens: int, first: int = 0) -> torch.Tensor:
    """Plan `attention` for a row and return its positions."""
    batch = one_row(num_tokens, first)
    attention.plan(batch)
    attention.begin()
    return batch.positions


def some_tokens(num_tokens: int, seed: int = 0) -> torch.Tensor:
    """Return tokens of the tiny vocabulary."""
    return torch.randint(3, 300, (num_tokens,), generator=torch.Generator().manual_seed(seed))
