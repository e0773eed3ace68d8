"""Heads over ranks: every head exactly once or once per replica, beside its KV head, in equal shapes."""

from collections import Counter
from itertools import product

import pytest

from tests.unit.model_files import write_directory
from workers.card import load_card
from workers.layers.placement import Run, head_runs, shard_run
from workers.models.sharding import HeadLayout, head_layout, kv_shape


@pytest.mark.parametrize("num_kv_heads", range(1, 10))
def test_every_head_is_computed_once_beside_its_kv_head(num_kv_heads: int) -> None:
    for group, size in product(range(1, 6), range(1, 9)):
        layout = HeadLayout(num_kv_heads * group, num_kv_heads, size)
        heads: list[int] = []
        copies: Counter[int] = Counter()
        for rank in range(size):
            kv_heads, local = layout.kv_heads(rank), layout.heads(rank)
            assert len(kv_heads) == layout.kv_heads_per_rank
            assert len(local) == layout.heads_per_rank == len(kv_heads) * layout.group_size
            for place, head in enumerate(local):
                if head is not None:
                    heads.append(head)
                    # Attention pairs local head i with local KV head i // group_size
                    assert kv_heads[place // layout.group_size] == head // group
            copies.update(head for head in kv_heads if head is not None)
        assert sorted(heads) == list(range(num_kv_heads * group))
        assert copies == dict.fromkeys(range(num_kv_heads), layout.replicas)


def test_no_more_heads_are_padded_than_needed() -> None:
    layout = HeadLayout(9, 3, 2)
    assert (layout.kv_heads_per_rank, layout.heads_per_rank) == (2, 6)
    assert [layout.kv_heads(rank) for rank in range(2)] == [[0, 1], [2, None]]
    assert layout.heads(1) == [6, 7, 8, None, None, None]
    even = HeadLayout(32, 8, 4)
    assert (even.kv_heads_per_rank, even.heads_per_rank) == (2, 8)


def test_kv_heads_are_replicated_when_there_are_fewer_than_ranks() -> None:
    layout = HeadLayout(8, 2, 4)
    assert [layout.kv_heads(rank) for rank in range(4)] == [[0], [0], [1], [1]]
    assert [layout.heads(rank) for rank in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_the_kv_shape_of_smollm2_over_ranks() -> None:
    config = load_card("smollm2-135m").config
    assert [kv_shape(config, size) for size in (1, 2, 3, 4)] == [
        (30, 3, 64),
        (30, 2, 64),
        (30, 1, 64),
        (30, 1, 64),
    ]
    assert head_layout(config, 1).heads_per_rank == 9


def test_shards_cover_a_length_that_does_not_divide() -> None:
    assert [shard_run(7, rank, 3) for rank in range(4)] == [
        (Run(0, 0, 3),),
        (Run(0, 3, 3),),
        (Run(0, 6, 1),),
        (),
    ]


def test_zero_heads_have_no_run() -> None:
    assert head_runs([2, None, 0], 4, first=10) == (Run(10, 8, 4), Run(18, 0, 4))


def test_sliding_windows_are_per_layer(tmp_path) -> None:
    sliding = {"use_sliding_window": True, "sliding_window": 9, "num_hidden_layers": 4}
    qwen = {"architectures": ["Qwen2ForCausalLM"], **sliding}
    cases = {
        "late": (qwen | {"max_window_layers": 3}, [None, None, None, 9]),
        "listed": (
            qwen | {"layer_types": ["sliding_attention", "full_attention"] * 2},
            [9, None, 9, None],
        ),
        "off": (qwen | {"use_sliding_window": False}, [None] * 4),
        "mistral": (sliding | {"architectures": ["MistralForCausalLM"]}, [9] * 4),
        "llama": (sliding, [None] * 4),
    }
    for name, (changes, expected) in cases.items():
        config = load_card(str(write_directory(tmp_path / name, **changes))).config
        assert [config.window_of(layer) for layer in range(4)] == expected, name
