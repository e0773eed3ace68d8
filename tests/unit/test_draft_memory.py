"""What a draft takes of a device is known before its pool is sized: no less than it is, and not much more."""

import pytest
import torch

from tests.harness import tiny_config, write_tiny_model
from workers.attention.row_pages import RowPages
from workers.attention.tree_mask import TreeMask, row_bytes
from workers.card import load_card
from workers.draft_card import read_draft_card
from workers.engine.copies import InlineCopies
from workers.engine.device_memory import draft_bytes, measured_pool_size, work_bytes
from workers.engine.sampler import greedy_tokens
from workers.kvcache.kv_pool import KVPool
from workers.kvcache.layout import DraftShape, with_draft
from workers.kvcache.page_table import PageTable
from workers.parallel import TPGroup
from workers.speculative.draft_loop import DraftLoop
from workers.speculative.draft_state import DraftState
from workers.speculative.loop_inputs import LoopParts
from workers.speculative.loop_sizes import loop_bytes, loop_sizes

CPU = torch.device("cpu")
FEATURE_SIZE, VOCAB_SIZE = 48, 200


def held_bytes(config, context_len):
    """Make all loops of a rank, and the room that kernels want for their pages; return what they hold."""
    pages_per_row = -(-(context_len + config.draft_window) // config.page_size)
    layout = with_draft(1, config.page_size, 1, 1, "float32", DraftShape(1, 1, 1, FEATURE_SIZE))
    pool = KVPool(layout, 4, CPU)
    max_slots = config.max_running_requests
    table = PageTable(max_slots, pages_per_row, config.page_size, 4, checked=True)
    rooms = {}

    def pass_attention(batch):
        shape = (batch.num_rows, batch.max_columns)
        if batch.tree is not None:
            of_row = row_bytes(1 + config.max_drafts, batch.max_columns * config.page_size)
            bits = torch.empty(max_slots * of_row, dtype=torch.uint8)
            rooms.setdefault("mask", TreeMask.room(max_slots, of_row, bits))
        return rooms.setdefault(shape, RowPages.room(*shape, CPU))

    state = DraftState(pool, max_slots, config.max_drafts, VOCAB_SIZE, config.draft_topk)
    parts = LoopParts(
        None, state, pool, table, TPGroup.single(), InlineCopies(), pass_attention, greedy_tokens
    )
    loops = [DraftLoop(size, parts) for size in loop_sizes(max_slots)]
    parts_of = [each for loop in loops for each in (loop, loop.inputs, loop._passes)] + list(rooms.values())
    tensors = [value for each in parts_of for value in vars(each).values() if isinstance(value, torch.Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


@pytest.mark.parametrize(
    ("page_size", "context_len", "draft_tokens", "draft_topk"),
    [(1, 4096, 3, 1), (16, 4096, 7, 1), (64, 500, "auto", 1), (4, 60, 1, 1), (16, 4096, 3, 8), (4, 60, 2, 3)],
)
def test_loops_take_what_was_foretold(tmp_path, page_size, context_len, draft_tokens, draft_topk):
    config = tiny_config(
        tmp_path,
        draft="self",
        draft_tokens=draft_tokens,
        draft_topk=draft_topk,
        page_size=page_size,
        max_running_requests=40,
    )
    held = held_bytes(config, context_len)
    foretold = loop_bytes(config, context_len, 4 * FEATURE_SIZE)
    plans = foretold - held
    assert 0 <= plans < 0.2 * held + (1 << 20), (held, foretold)


def test_the_last_loop_holds_any_step_s_rows():
    for max_slots in (1, 7, 256, 300, 1000):
        sizes = loop_sizes(max_slots)
        assert sizes[-1] == max_slots and list(sizes) == sorted(set(sizes))


def test_long_contexts_of_small_pages_and_many_rows_cost_a_draft_room(tmp_path):
    model = write_tiny_model(tmp_path / "long", max_position_embeddings=131_072)
    card = load_card(str(model))
    found = {}
    for draft in ("self", "random-eagle3"):
        for page_size in (1, 16):
            config = tiny_config(model, draft=draft, page_size=page_size, max_running_requests=256)
            found[draft, page_size] = draft_bytes(config, card, read_draft_card(draft, card))
        # 131,072 pages of 4 bytes, twice, for each row of each loop
        assert found[draft, 1] - found[draft, 16] > 256 * 131_072 * 8 * 15 // 16
    short = tiny_config(model, draft="self", page_size=1, max_running_requests=256, max_context_len=2048)
    assert draft_bytes(short, card, read_draft_card("self", card)) < found["self", 1] / 10


def test_every_draft_that_is_verified_has_logits(tmp_path):
    card = load_card(str(write_tiny_model(tmp_path / "wide", vocab_size=100_000)))

    def logits_bytes(max_tokens_per_step=2048, **draft):
        config = tiny_config(
            tmp_path / "wide", max_running_requests=100, max_tokens_per_step=max_tokens_per_step, **draft
        )
        return work_bytes(config, card)

    chain, tree = {"draft": "self", "draft_tokens": 5}, {"draft": "self", "draft_topk": 3, "draft_tokens": 5}
    own = 4 * 100 * 100_000  # float32, of each request's own token
    assert logits_bytes(**chain) - logits_bytes() >= 5 * own
    assert logits_bytes(**tree) - logits_bytes() >= 15 * own
    # But a step has no more tokens than it may have.
    assert logits_bytes(200, **tree) - logits_bytes(200) < 4 * own


def test_a_tree_wants_room_for_what_is_said_of_all_that_it_follows(tmp_path):
    model = write_tiny_model(tmp_path / "wide", vocab_size=100_000)
    card, found = load_card(str(model)), {}
    for topk, tp_size in ((1, 1), (4, 1), (4, 4)):
        config = tiny_config(
            model,
            draft="self",
            draft_topk=topk,
            draft_tokens=3,
            max_running_requests=100,
            max_context_len=64,
            tp_size=tp_size,
        )
        found[topk, tp_size] = draft_bytes(config, card, read_draft_card("self", card))
    assert found[4, 1] - found[1, 1] > (4 + 8) * 4 * 100 * 100_000
    # Each of four ranks says it of a quarter of the vocabulary.
    assert found[4, 1] - found[4, 4] == (4 + 4 + 8) * 3 * 100 * 100_000


def test_the_pool_gets_what_a_draft_leaves(tmp_path, monkeypatch):
    gib = 1 << 30
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 * gib, 80 * gib))
    model = write_tiny_model(tmp_path / "model")
    card, bundle_bytes = load_card(str(model)), 1 << 20
    config = tiny_config(model, draft="self", page_size=1, num_pages=None, max_running_requests=256)
    draft = read_draft_card("self", card)

    def num_pages(draft):
        return measured_pool_size(config, card, draft, bundle_bytes, TPGroup.single(), CPU).num_pages

    fewer = num_pages(None) - num_pages(draft)
    assert fewer == pytest.approx(draft_bytes(config, card, draft) / bundle_bytes, abs=1)
    assert fewer > 5
