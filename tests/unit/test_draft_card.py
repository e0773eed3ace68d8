"""Draft cards: which drafts fit which targets, what is said of those that do not, and what names mean."""

import json
import shutil
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch

from tests.unit.draft_checkpoints import (
    DRAFT_VOCAB,
    HIDDEN,
    eagle3_weights,
    eagle_weights,
    write_draft,
    write_target_with_mtp,
)
from tests.unit.draft_models import CPU, tiny_card, tiny_decoder
from tests.unit.test_card import run_python
from workers.card import ModelCard, load_card
from workers.draft_card import DraftCard, read_draft_card
from workers.draft_layouts import default_feature_layers
from workers.models.config import ModelError
from workers.models.draft_weights import LoadedDraft, load_draft

EAGLE3 = {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": DRAFT_VOCAB}


@pytest.fixture
def target(tmp_path: Path) -> ModelCard:
    return tiny_card(tmp_path / "target")


def load(folder: Path, target: ModelCard) -> LoadedDraft:
    return load_draft_of(read_draft_card(str(folder), target), target)


def load_draft_of(card: DraftCard, target: ModelCard) -> LoadedDraft:
    decoder = tiny_decoder(target)
    return load_draft(card, decoder, group=decoder.group, device=CPU, dtype=torch.float32)


def test_cards_say_what_kv_and_features_a_draft_has(target: ModelCard, tmp_path: Path) -> None:
    eagle = read_draft_card(
        str(write_draft(tmp_path / "eagle", eagle_weights(2), num_hidden_layers=2)), target
    )
    assert (eagle.kind, eagle.num_layers, eagle.draft_vocab_size) == ("eagle", 2, 300)
    assert (eagle.feature_layers, eagle.feature_size) == ((4,), HIDDEN)
    assert eagle.kv_shape(1) == (2, 2, 8)
    assert eagle.kv_shape(2) == (2, 1, 8)
    eagle3 = read_draft_card(str(write_draft(tmp_path / "eagle3", eagle3_weights(), **EAGLE3)), target)
    assert (eagle3.kind, eagle3.num_layers, eagle3.draft_vocab_size) == ("eagle3", 1, DRAFT_VOCAB)
    assert (eagle3.feature_layers, eagle3.feature_size) == ((1, 2, 3), HIDDEN)
    own = read_draft_card("self", target)
    assert (own.kind, own.num_layers, own.feature_size, own.kv_shape(1)) == ("self", 4, 1, (4, 2, 8))
    folder = write_target_with_mtp(tmp_path / "mtp")
    mtp = read_draft_card(str(folder), load_card(str(folder)))
    assert (mtp.kind, mtp.num_layers, mtp.feature_layers, mtp.kv_shape(1)) == ("mtp", 1, (4,), (1, 2, 8))


def test_feature_layers_are_eagles_own_and_spread_over_shallow_targets() -> None:
    assert default_feature_layers(30) == (2, 15, 27)
    assert default_feature_layers(32) == (2, 16, 29)
    assert default_feature_layers(6) == (2, 3, 3)
    assert [default_feature_layers(number) for number in (2, 3, 4)] == [(0, 1, 2), (0, 1, 3), (1, 2, 3)]


@pytest.mark.parametrize(
    ("settings", "layers"),
    [
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 3]}}, (2, 3, 4)),  # SpecForge's
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [2, 3, 4]}}, (2, 3, 4)),
        ({"eagle_aux_hidden_state_layer_ids": [0, 2, 3]}, (0, 2, 3)),
        ({"eagle_config": {"use_aux_hidden_state": True}}, (1, 2, 3)),
    ],
)
def test_the_configuration_may_name_the_feature_layers(
    settings: dict, layers: tuple, target: ModelCard, tmp_path: Path
) -> None:
    folder = write_draft(tmp_path / "draft", eagle3_weights(), **EAGLE3 | settings)
    assert read_draft_card(str(folder), target).feature_layers == layers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 64}, r"config\.json: hidden_size is 64; allowed is 32, that of its target"),
        ({"vocab_size": 301}, r"config\.json: vocab_size is 301; allowed is 300, that of its target"),
        ({"target_hidden_size": 48}, r"target_hidden_size is 48; allowed is 32, that of its target"),
        ({"num_hidden_layers": 2}, r"num_hidden_layers is 2; an EAGLE-3 draft has 1"),
        ({"draft_vocab_size": 400}, r"draft_vocab_size is 400; at most the vocab_size of 300"),
        (
            {"architectures": ["MedusaModel"]},
            r"architectures is \['MedusaModel'\]; supported: LlamaForCausal",
        ),
        ({"num_key_value_heads": 3}, r"4 attention heads; a multiple of the 3 KV heads"),
        (
            {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [2, 9, 3]}},
            r"layer_ids is \[2, 9, 3\]; three layers of the target's 4",
        ),
        ({"eagle_aux_hidden_state_layer_ids": ["2", 3, 4]}, r"three layers of the target's 4 are needed"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, r"use_aux_hidden_state is false"),
    ],
)
def test_a_draft_that_does_not_fit_is_refused_by_the_field(
    changes: dict, message: str, target: ModelCard, tmp_path: Path
) -> None:
    folder = write_draft(tmp_path / "draft", eagle3_weights(), **EAGLE3 | changes)
    with pytest.raises(ModelError, match=message):
        read_draft_card(str(folder), target)


def test_a_model_is_no_draft_and_missing_tensors_are_named_before_anything_is_loaded(
    target: ModelCard, tmp_path: Path
) -> None:
    folder = write_target_with_mtp(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 0}))
    with pytest.raises(ModelError, match=r"no eagle draft: fc\.weight missing; found are"):
        read_draft_card(str(folder), target)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ModelError, match=r"no weights; \*\.safetensors or pytorch_model\.bin"):
        read_draft_card(str(folder), target)
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"^draft '.*/model': .*: no config\.json; a draft's directory"):
        read_draft_card(str(folder), target)
    weights = eagle3_weights()
    del weights["d2t"]
    with pytest.raises(ModelError, match=r"tensor d2t is missing; a draft_vocab_size of 60 below"):
        read_draft_card(str(write_draft(tmp_path / "draft", weights, **EAGLE3)), target)


def test_an_mtp_layer_belongs_to_its_own_target(target: ModelCard, tmp_path: Path) -> None:
    folder = write_target_with_mtp(tmp_path / "mtp")
    config = json.loads((folder / "config.json").read_text())
    for changes, message in (
        ({"num_hidden_layers": 5}, r"num_hidden_layers is 5; allowed is 4, that of its target"),
        ({"num_nextn_predict_layers": 2}, r"num_nextn_predict_layers is 2; 1 is supported"),
    ):
        (folder / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ModelError, match=message):
            read_draft_card(str(folder), target)


def test_names_that_mean_nothing_are_answered_with_those_that_do(target: ModelCard, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name, found in ((str(tmp_path / "file"), "a file"), (str(tmp_path / "none"), "no existing path")):
        with pytest.raises(
            ModelError, match=f"^draft '{name}': {found}; allowed: a draft's directory.*smollm2-135m-eagle3"
        ):
            read_draft_card(name, target)


def test_a_draft_that_the_hub_cannot_provide_is_spoken_of_as_a_draft() -> None:
    code = (
        "from workers.card import load_card\n"
        "from workers.draft_card import read_draft_card\n"
        "from workers.models.config import ModelError\n"
        "try: read_draft_card('nobody/no-such-draft', load_card('smollm2-135m'))\n"
        "except ModelError as error: print('refused:', error)"
    )
    said = run_python(code, HF_HUB_OFFLINE="1")
    assert said.startswith("refused: draft 'nobody/no-such-draft': no such path, and the hub cannot")
    assert "or name a draft's directory" in said and "model" not in said


def test_the_shipped_draft_is_looked_for_in_the_package(
    target: ModelCard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "deploy"
    (package / "drafts").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    name = "smollm2-135m-eagle3"
    monkeypatch.delitem(sys.modules, "deploy", raising=False)
    with pytest.raises(
        ModelError, match=r"its files \(config\.json, model\.safetensors\) are not at .*/deploy"
    ):
        read_draft_card(name, target)
    write_draft(package / "drafts" / name, eagle3_weights(), **EAGLE3)
    card = read_draft_card(name, target)
    assert (card.name, card.kind) == (name, "eagle3")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"midlayer.mlp.up_proj.weight": None}, r"1 tensors are missing, among them layers\.0\.mlp\.up_proj"),
        ({"lm_head.weight": None}, r"1 tensors are missing, among them lm_head\.weight"),
        (
            {"fc.weight": torch.ones(32, 64)},
            r"fc\.weight has shape \(32, 64\); the configuration needs \(32, 96\)",
        ),
        (
            {"midlayer.extra.weight": torch.ones(3)},
            r"midlayer\.extra\.weight belongs to no part of this eagle3",
        ),
        ({"d2t": torch.zeros(59, dtype=torch.int64)}, r"d2t is torch\.int64 \(59,\); whole numbers \(60,\)"),
        ({"d2t": torch.full((60,), 241)}, r"60 draft ids to 60 target ids of 241 to 300; .* below 300"),
        ({"d2t": -torch.arange(60)}, r"from 60 draft ids to 1 target ids"),
        ({"d2t": torch.zeros(60, dtype=torch.int64)}, r"t2d marks other target ids"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    changes: dict, message: str, target: ModelCard, tmp_path: Path
) -> None:
    weights = eagle3_weights() | changes
    weights = {name: value for name, value in weights.items() if value is not None}
    with pytest.raises(ModelError, match=message):
        load(write_draft(tmp_path / "draft", weights, **EAGLE3), target)


def test_both_forms_of_file_hold_the_same_draft_and_every_byte_counts(
    target: ModelCard, tmp_path: Path
) -> None:
    weights = eagle_weights()
    digests = []
    for number, changed in enumerate((weights, weights, weights | {"fc.bias": weights["fc.bias"] + 1})):
        loaded = load(write_draft(tmp_path / str(number), changed), target)
        digests.append(loaded.weights_digest)
    assert digests[0] == digests[1] != digests[2]
    pickled = load(write_draft(tmp_path / "pickled", weights, pickled=True), target).model
    plain = load(tmp_path / "0", target).model
    for name, placement in plain.placements().items():
        assert torch.equal(placement.parameter, pickled.placements()[name].parameter), name


class Trap:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return print, ("unpickled",)


def test_a_pickle_that_holds_more_than_tensors_is_not_run(
    target: ModelCard, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_draft(tmp_path / "draft", {"fc.weight": Trap()}, pickled=True)
    with pytest.raises(ModelError, match=r"pytorch_model\.bin: cannot be read as tensors alone"):
        load(folder, target)
    assert "unpickled" not in capsys.readouterr().out
    torch.save([1], folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"holds list; tensors by name are needed"):
        load(folder, target)
    torch.save(eagle_weights(), folder / "pytorch_model.bin")
    content = (folder / "pytorch_model.bin").read_bytes()
    for length in (0, 10, len(content) // 2):
        (folder / "pytorch_model.bin").write_bytes(content[:length])
        with pytest.raises(ModelError, match=r"pytorch_model\.bin: cannot be read as tensors alone"):
            load(folder, target)


def test_digests_tell_apart_what_computes_otherwise(target: ModelCard, tmp_path: Path) -> None:
    def card(name: str, **changes) -> DraftCard:
        return read_draft_card(
            str(write_draft(tmp_path / name, eagle3_weights(), **EAGLE3 | changes)), target
        )

    one, moved = card("one"), card("moved")
    assert one.digest() == moved.digest()
    assert one.digest() != card("theta", rope_theta=5e5).digest()
    assert one.digest() != card("stream", norm_before_residual=True).digest()
    assert read_draft_card("self", target).digest() != read_draft_card("random-eagle3", target).digest()


def test_a_hub_drafts_weights_are_fetched_by_the_loader_safetensors_first(
    target: ModelCard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = write_draft(tmp_path / "hub", eagle_weights(), pickled=True)
    snapshot = tmp_path / "0123abcd"
    snapshot.mkdir()
    asked: list[tuple[str | None, list[str]]] = []

    def snapshot_download(repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((revision, allow_patterns))
        for pattern in allow_patterns:
            for file in stored.glob(pattern):
                shutil.copy(file, snapshot)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    card = read_draft_card("owner/eagle", target)
    assert (card.name, card.kind, card.source) == ("owner/eagle", "eagle", snapshot)
    assert not list(snapshot.glob("*.bin"))
    loaded = load_draft_of(card, target)
    assert [revision for revision, _ in asked] == [None, "0123abcd", "0123abcd"]
    assert "*.safetensors" in asked[1][1] and asked[2][1] == ["pytorch_model.bin"]
    assert loaded.weights_digest == load(stored, target).weights_digest
