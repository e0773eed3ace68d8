"""DraftCard: the one reader of draft models' metadata, beside the target's ModelCard. No torch.

A draft is named as models are: a directory, a hub id or an alias; two further names need no files.
"""

import dataclasses
import hashlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import msgspec
from safetensors import SafetensorError, safe_open

from workers.card import HubSource, ModelCard, check_heads, fetch_metadata, is_hub_id
from workers.card_directory import ARCHITECTURES, read_decoder_config
from workers.card_fields import Fields
from workers.card_files import PICKLED_WEIGHTS, draft_files
from workers.config import WorkerConfig
from workers.draft_layouts import (
    DRAFT_ARCHITECTURES,
    DraftKind,
    MTPLayoutName,
    default_feature_layers,
    missing_tensors,
    mtp_layout_of,
    own_name,
    published_name,
)
from workers.kvcache.layout import DraftShape
from workers.models.config import ModelConfig, ModelError
from workers.models.sharding import ceil_div, kv_shape, leaves_none_out

SELF_DRAFT = "self"
"""Names the target itself as its draft."""
RANDOM_DRAFT = "random-eagle3"
"""Names an EAGLE-3 draft of seeded random weights: an adversary, right by chance alone."""
ALIASES: Mapping[str, str] = MappingProxyType({"smollm2-135m-eagle3": "drafts/smollm2-135m-eagle3"})
"""Drafts that ship inside the package `deploy`, and their folders in it."""
_RANDOM_VOCAB_SIZE = 4096


@dataclass(frozen=True)
class DraftCard:
    """All that is known of a draft without its weights, for one target."""

    name: str
    kind: DraftKind
    source: Path | None
    """A directory on this machine; None: there are no files to read."""
    hub: HubSource | None
    config: ModelConfig
    """Of the draft's own layers. Biases are what the checkpoint brings, not what is said here."""
    target_num_layers: int
    target_hidden_size: int
    draft_vocab_size: int
    feature_layers: tuple[int, ...]
    """The layers of the target before which its residual stream is tapped; its layer count: the end."""
    feature_size: int
    norm_before_residual: bool = False
    """EAGLE-3: the residual stream begins with the normalised feature."""
    mtp_layout: MTPLayoutName | None = None

    @property
    def num_layers(self) -> int:
        """Count the draft's own layers."""
        return self.config.num_layers

    def kv_shape(self, tp_size: int) -> tuple[int, int, int]:
        """Return (layers, KV heads of one rank, head_dim): the shape of a bundle's draft section."""
        return kv_shape(self.config, tp_size)

    def page_shape(self, tp_size: int) -> DraftShape:
        """Return what the draft adds to a page of one rank."""
        return DraftShape(*self.kv_shape(tp_size), self.feature_size)

    def digest(self) -> str:
        """Return SHA-256 (hex) of everything but where the files lie: equal on all machines."""
        fields = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("name", "source", "hub")
        }
        fields["config"] = {
            **dataclasses.asdict(self.config),
            "rope_kind": type(self.config.rope_scaling).__name__,
        }
        return hashlib.sha256(msgspec.json.encode(fields, order="sorted")).hexdigest()


def read_draft_card(draft: str, target: ModelCard) -> DraftCard:
    """Read the card of a draft for `target`: a directory, a hub id, an alias, `self` or `random-eagle3`.

    Raise ModelError, whose message names the draft, the file and field, what was found and what is allowed.
    Files of a hub id are checked once they are fetched, by the loader.
    """
    try:
        return _read_card(draft, target)
    except ModelError as error:
        raise ModelError(f"draft {draft!r}: {error}") from error


def check_sizes(options: WorkerConfig, card: ModelCard, draft: DraftCard | None) -> None:
    """Raise ModelError where a rank would have no token of a vocabulary or no attention head, or a draft has
    fewer tokens than it follows."""
    tp_size, sizes = options.tp_size, {f"model {card.name!r}: vocab_size": card.vocab_size}
    if draft is not None:
        sizes[f"draft {draft.name!r}: draft_vocab_size"] = draft.draft_vocab_size
    for field, size in sizes.items():
        if not leaves_none_out(size, tp_size):
            lower = next(fewer for fewer in range(tp_size - 1, 0, -1) if leaves_none_out(size, fewer))
            raise ModelError(
                f"{field} is {size}, of which each of {tp_size} ranks takes {ceil_div(size, tp_size)}, and"
                f" none are left for the last; allowed is tp_size {lower}, the next below that leaves each a"
                f" token: set --tp-size {lower}"
            )
    if tp_size > card.config.num_heads:
        raise ModelError(
            f"model {card.name!r}: {card.config.num_heads} attention heads, of which {tp_size} ranks cannot"
            f" have one each: set --tp-size to {card.config.num_heads} at most"
        )
    if draft is not None and draft.draft_vocab_size < options.draft_topk:
        raise ModelError(
            f"draft {draft.name!r}: draft_vocab_size is {draft.draft_vocab_size}, and draft_topk asks"
            f" for {options.draft_topk} guesses side by side: set --draft-topk to"
            f" {draft.draft_vocab_size} at most"
        )


def _read_card(draft: str, target: ModelCard) -> DraftCard:
    if draft == SELF_DRAFT:
        return _self_card(target)
    if draft == RANDOM_DRAFT:
        return _random_card(target)
    if draft in ALIASES:
        return _local_card(_packaged_folder(draft), draft, target)
    path = Path(draft).expanduser()
    if path.is_dir():
        return _local_card(path.resolve(), path.resolve().name, target)
    if not path.exists() and is_hub_id(draft):
        folder, hub = fetch_metadata(draft, _allowed())
        return _directory_card(folder, draft, hub, target)
    raise ModelError(f"{'a file' if path.exists() else 'no existing path'}; allowed: {_allowed()}")


def _allowed() -> str:
    return (
        "a draft's directory, a hub id (owner/name) or an alias"
        f" ({', '.join((*ALIASES, SELF_DRAFT, RANDOM_DRAFT))})"
    )


def check_tensors(card: DraftCard, names: list[str]) -> None:
    """Raise ModelError where a checkpoint with tensors of these (published) names is no such draft."""
    own = [own_name(name, card.mtp_layout, card.target_num_layers) for name in names]
    present = {name for name in own if name is not None}
    missing = missing_tensors(card.kind, present)
    if missing:
        wanted = [published_name(name, card.mtp_layout, card.target_num_layers) for name in missing]
        raise ModelError(
            f"{card.source}: no {card.kind} draft: {', '.join(wanted)} missing; found are "
            f"{', '.join(sorted(names)[:5]) or 'no tensors'}"
        )
    if card.draft_vocab_size < card.config.vocab_size and "d2t" not in present:
        raise ModelError(
            f"{card.source}: tensor d2t is missing; a draft_vocab_size of {card.draft_vocab_size} below "
            f"the vocabulary of {card.config.vocab_size} needs it"
        )


def read_tensor_names(file: Path) -> list[str]:
    """Return what a safetensors file holds. Raise ModelError where it is cut short."""
    try:
        with safe_open(file, framework="numpy") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: not a whole safetensors file ({error}); is it truncated?") from error


def _card(name: str, kind: DraftKind, config: ModelConfig, target: ModelCard) -> DraftCard:
    """Return a card without files, of a draft that works on the target's last hidden state."""
    return DraftCard(
        name=name,
        kind=kind,
        source=None,
        hub=None,
        config=config,
        target_num_layers=target.config.num_layers,
        target_hidden_size=target.config.hidden_size,
        draft_vocab_size=config.vocab_size,
        feature_layers=(target.config.num_layers,),
        feature_size=config.hidden_size,
    )


def _self_card(target: ModelCard) -> DraftCard:
    return replace(_card(SELF_DRAFT, "self", target.config, target), feature_size=1)


def _random_card(target: ModelCard) -> DraftCard:
    config = replace(
        target.config,
        family="llama",
        num_layers=1,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        qk_norm=False,
        sliding_window=None,
        full_layers=(),
        num_mtp_layers=0,
    )
    return replace(
        _card(RANDOM_DRAFT, "eagle3", config, target),
        draft_vocab_size=min(config.vocab_size, _RANDOM_VOCAB_SIZE),
        feature_layers=default_feature_layers(target.config.num_layers),
    )


def _packaged_folder(alias: str) -> Path:
    """Return the folder of a draft that ships with the project."""
    spec = importlib.util.find_spec("deploy")
    roots = (spec.submodule_search_locations or []) if spec is not None else []
    folders = [Path(root) / ALIASES[alias] for root in roots]
    for folder in folders:
        if folder.is_dir():
            return folder
    places = ", ".join(str(folder) for folder in folders) or f"{ALIASES[alias]} in the package deploy"
    raise ModelError(
        f"its files (config.json, model.safetensors) are not at {places}; install a version of eyrie that "
        "ships them, or name a draft's directory"
    )


def _local_card(folder: Path, name: str, target: ModelCard) -> DraftCard:
    card = _directory_card(folder, name, None, target)
    files = draft_files(folder)
    if not files:
        raise ModelError(f"{folder}: no weights; *.safetensors or {PICKLED_WEIGHTS} is needed")
    if files[0].name != PICKLED_WEIGHTS:  # what a pickle holds is known once torch has read it
        check_tensors(card, [name for file in files for name in read_tensor_names(file)])
    return card


def _directory_card(folder: Path, name: str, hub: HubSource | None, target: ModelCard) -> DraftCard:
    if not (folder / "config.json").exists():
        raise ModelError(f"{folder}: no config.json; a draft's directory holds config.json and *.safetensors")
    fields = Fields.read(folder / "config.json")
    kind = _kind(fields)
    read = _read_mtp if kind == "mtp" else _read_eagle3 if kind == "eagle3" else _read_eagle
    card = replace(read(name, fields, target), source=folder, hub=hub)
    check_heads(fields.path, card.config)
    _check_equal(fields, "vocab_size", card.config.vocab_size, target, target.vocab_size)
    return card


def _kind(fields: Fields) -> DraftKind:
    """Return what config.json describes. SafeAILab's drafts carry their target's architecture: those of
    EAGLE-3 are known by draft_vocab_size, MTP layers by num_nextn_predict_layers."""
    architectures = fields.strings("architectures")
    for architecture in architectures:
        if architecture in DRAFT_ARCHITECTURES:
            return DRAFT_ARCHITECTURES[architecture]
        if architecture in ARCHITECTURES:
            if "draft_vocab_size" in fields:
                return "eagle3"
            return "mtp" if fields.integer("num_nextn_predict_layers", 0, minimum=0) else "eagle"
    allowed = ", ".join((*DRAFT_ARCHITECTURES, *ARCHITECTURES))
    raise ModelError(f"{fields.path}: architectures is {architectures!r}; supported: {allowed}")


def _read_eagle(name: str, fields: Fields, target: ModelCard) -> DraftCard:
    config = read_decoder_config(fields, "llama")
    _check_equal(fields, "hidden_size", config.hidden_size, target, target.config.hidden_size)
    return _card(name, "eagle", config, target)


def _read_eagle3(name: str, fields: Fields, target: ModelCard) -> DraftCard:
    config = read_decoder_config(fields, "llama")
    field = "target_hidden_size" if "target_hidden_size" in fields else "hidden_size"
    _check_equal(fields, field, fields.integer(field), target, target.config.hidden_size)
    if config.num_layers != 1:
        raise ModelError(f"{fields.path}: num_hidden_layers is {config.num_layers}; an EAGLE-3 draft has 1")
    draft_vocab_size = fields.integer("draft_vocab_size", config.vocab_size)
    if draft_vocab_size > config.vocab_size:
        raise ModelError(
            f"{fields.path}: draft_vocab_size is {draft_vocab_size}; at most the vocab_size of "
            f"{config.vocab_size} is allowed"
        )
    return replace(
        _card(name, "eagle3", config, target),
        draft_vocab_size=draft_vocab_size,
        feature_layers=_feature_layers(fields, target.config.num_layers),
        norm_before_residual=fields.boolean("norm_before_residual", False),
    )


def _feature_layers(fields: Fields, num_layers: int) -> tuple[int, ...]:
    """Return the layers to tap, EAGLE's own unless config.json says otherwise.

    Two conventions are in use for the same three places. Lists that begin with 1 count finished layers
    (SpecForge: 1 is what layer 1 returns, the input of layer 2); others name the layer whose input is taken
    (https://github.com/sgl-project/sglang/pull/25454).
    """
    key = "eagle_aux_hidden_state_layer_ids"
    settings = fields.part("eagle_config")
    if not settings.boolean("use_aux_hidden_state", True):
        raise ModelError(
            f"{fields.path}: eagle_config.use_aux_hidden_state is false; EAGLE-3 drafts are supported with "
            "three auxiliary hidden states"
        )
    listed = (settings if key in settings else fields).optional(key, list)
    if listed is None:
        return default_feature_layers(num_layers)
    ids = [value for value in listed if isinstance(value, int) and not isinstance(value, bool)]
    layers = tuple(value + 1 for value in ids) if ids[:1] == [1] else tuple(ids)
    if len(listed) != 3 or len(ids) != 3 or not all(0 <= layer <= num_layers for layer in layers):
        raise ModelError(
            f"{fields.path}: {key} is {listed!r:.60}; three layers of the target's {num_layers} are needed"
        )
    return layers


def _read_mtp(name: str, fields: Fields, target: ModelCard) -> DraftCard:
    architectures = fields.strings("architectures")
    family = next(ARCHITECTURES[name] for name in architectures if name in ARCHITECTURES)
    config = read_decoder_config(fields, family)
    _check_equal(fields, "hidden_size", config.hidden_size, target, target.config.hidden_size)
    _check_equal(fields, "num_hidden_layers", config.num_layers, target, target.config.num_layers)
    if config.num_mtp_layers != 1:
        raise ModelError(
            f"{fields.path}: num_nextn_predict_layers is {config.num_mtp_layers}; 1 is supported"
        )
    window = config.window_of(config.num_layers)
    own = replace(config, num_layers=1, sliding_window=window, full_layers=())
    return replace(_card(name, "mtp", own, target), mtp_layout=mtp_layout_of(architectures))


def _check_equal(fields: Fields, key: str, found: int, target: ModelCard, needed: int) -> None:
    if found != needed:
        raise ModelError(
            f"{fields.path}: {key} is {found}; allowed is {needed}, that of its target {target.name}: name a "
            "draft that was trained for this model"
        )
