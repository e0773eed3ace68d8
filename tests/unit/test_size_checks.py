"""A model or draft too small for the ranks or for a tree is refused at start, before anything is loaded."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.harness import tiny_config, write_tiny_model
from workers.card import load_card
from workers.draft_card import check_sizes, read_draft_card
from workers.engine.engine import Engine
from workers.models.config import ModelError
from workers.parallel import TPGroup

MANY_HEADS = {"num_attention_heads": 16, "num_key_value_heads": 16}


def start(model: Path, **options: object) -> None:
    """Build the engine of a rank of a group that is never asked for: what is wrong is found before."""
    Engine(tiny_config(model, **options), load_card(str(model)), TPGroup.single())


@pytest.mark.parametrize(("tp_size", "allowed"), [(4, 3), (6, 5), (8, 5), (10, 9)])
def test_tokens_that_leave_none_to_a_rank_are_refused_with_the_next_size_below(
    tmp_path: Path, tp_size: int, allowed: int
) -> None:
    model = write_tiny_model(tmp_path / "few", vocab_size=9, **MANY_HEADS)
    with pytest.raises(ModelError, match=rf"^model 'few': vocab_size is 9, .*: set --tp-size {allowed}$"):
        start(model, tp_size=tp_size)
    check_sizes(tiny_config(model, tp_size=allowed), load_card(str(model)), None)


def test_ranks_without_a_head_are_refused(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", num_attention_heads=6, num_key_value_heads=2)
    with pytest.raises(ModelError, match=r"^model 'model': 6 attention heads, .*set --tp-size to 6 at most$"):
        start(model, tp_size=7)
    check_sizes(tiny_config(model, tp_size=6), load_card(str(model)), None)


def test_a_draft_s_tokens_may_not_leave_a_rank_without_either(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", **MANY_HEADS)
    card = load_card(str(model))
    draft = replace(read_draft_card("random-eagle3", card), draft_vocab_size=9)
    config = tiny_config(model, draft="random-eagle3", tp_size=8)
    with pytest.raises(ModelError, match=r"^draft 'random-eagle3': draft_vocab_size is 9, .*--tp-size 5$"):
        check_sizes(config, card, draft)
    check_sizes(config, card, replace(draft, draft_vocab_size=8))


def test_a_draft_with_fewer_tokens_than_are_followed_is_refused(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "few", vocab_size=3)
    with pytest.raises(ModelError, match=r"^draft 'self': draft_vocab_size is 3, .*set --draft-topk to 3 at"):
        start(model, draft="self", draft_topk=4, draft_tokens=2)
    start(model, draft="self", draft_topk=3, draft_tokens=2)
