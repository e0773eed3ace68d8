"""How drafts are published: which architectures they are, and what their tensors are called. No torch.

Each layout is translated into one set of own names: fc, enorm, hnorm, norm, layers.N, embed_tokens, lm_head,
d2t, t2d. Sources: SafeAILab/EAGLE (EAGLE 1 to 3), SpecForge (EAGLE-3), DeepSeek-V3 and MiMo (MTP).
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

DraftKind = Literal["eagle", "eagle3", "mtp", "self"]
"""`eagle` is EAGLE-1 and EAGLE-2, which differ in how they are used alone."""

DRAFT_ARCHITECTURES: Mapping[str, DraftKind] = MappingProxyType(
    {
        "LlamaForCausalLMEagle": "eagle",
        "EagleLlamaForCausalLM": "eagle",
        "Qwen2ForCausalLMEagle": "eagle",
        "LlamaForCausalLMEagle3": "eagle3",
        "Eagle3LlamaForCausalLM": "eagle3",
    }
)
"""SafeAILab's own drafts carry their target's architecture instead."""

_ALWAYS_THERE: Mapping[DraftKind, tuple[str, ...]] = MappingProxyType(
    {
        "eagle": ("fc.weight", "layers.0.self_attn.q_proj.weight"),
        "eagle3": ("fc.weight", "norm.weight", "layers.0.hidden_norm.weight"),
        "mtp": ("fc.weight", "enorm.weight", "hnorm.weight", "norm.weight"),
    }
)


@dataclass(frozen=True)
class MTPLayout:
    """How a model family stores its MTP layer beside its other layers; `{}` is the target's layer count."""

    prefix: str
    renamed: Mapping[str, str]
    """Tensors that are no part of the decoder layer, by their own names."""
    is_feature_first: bool
    """The projection reads [feature; embedding], not [embedding; feature]."""


MTPLayoutName = Literal["deepseek", "mimo"]
MTP_LAYOUTS: Mapping[MTPLayoutName, MTPLayout] = MappingProxyType(
    {
        "deepseek": MTPLayout(
            prefix="model.layers.{}.",
            renamed=MappingProxyType(
                {
                    "enorm.weight": "enorm.weight",
                    "hnorm.weight": "hnorm.weight",
                    "eh_proj.weight": "fc.weight",
                    "shared_head.norm.weight": "norm.weight",
                    "shared_head.head.weight": "lm_head.weight",
                    "embed_tokens.weight": "embed_tokens.weight",
                }
            ),
            is_feature_first=False,
        ),
        "mimo": MTPLayout(
            prefix="model.mtp_layers.0.",
            renamed=MappingProxyType(
                {
                    "token_layernorm.weight": "enorm.weight",
                    "hidden_layernorm.weight": "hnorm.weight",
                    "input_proj.weight": "fc.weight",
                    "final_layernorm.weight": "norm.weight",
                }
            ),
            is_feature_first=True,
        ),
    }
)


def mtp_layout_of(architectures: Collection[str]) -> MTPLayoutName:
    """Return how models of these architectures store their MTP layer."""
    return "mimo" if "MiMoForCausalLM" in architectures else "deepseek"


def is_mtp_tensor(name: str, num_layers: int) -> bool:
    """Tell whether a tensor in a target's checkpoint belongs to the MTP layer behind its `num_layers`."""
    return any(name.startswith(layout.prefix.format(num_layers)) for layout in MTP_LAYOUTS.values())


def own_name(name: str, layout: MTPLayoutName | None, num_layers: int) -> str | None:
    """Return what a checkpoint's tensor is called here; None: it is no part of the draft.

    `layout` None: an EAGLE checkpoint, which holds nothing else.
    """
    if layout is None:
        name = name.removeprefix("model.")
        return name.replace("midlayer.", "layers.0.", 1) if name.startswith("midlayer.") else name
    prefix = MTP_LAYOUTS[layout].prefix.format(num_layers)
    if not name.startswith(prefix):
        return None
    rest = name.removeprefix(prefix)
    return MTP_LAYOUTS[layout].renamed.get(rest, f"layers.0.{rest}")


def published_name(name: str, layout: MTPLayoutName | None, num_layers: int) -> str:
    """Return what a checkpoint calls the tensor of this own name; EAGLE's layer 0 may be midlayer as well."""
    if layout is None:
        return name
    found = [theirs for theirs, own in MTP_LAYOUTS[layout].renamed.items() if own == name]
    return MTP_LAYOUTS[layout].prefix.format(num_layers) + (found or [name.removeprefix("layers.0.")])[0]


def missing_tensors(kind: DraftKind, own_names: Collection[str]) -> list[str]:
    """Return which of the tensors that tell `kind` from others are not among `own_names`."""
    return [name for name in _ALWAYS_THERE.get(kind, ()) if name not in own_names]


def default_feature_layers(num_layers: int) -> tuple[int, int, int]:
    """Return the layers before which EAGLE-3 taps a target of `num_layers`: one low, one in the middle, one
    high.

    EAGLE's own are (2, L // 2, L - 3). Fewer than six layers have no such three in order: theirs are spread.
    """
    if num_layers >= 6:
        return 2, num_layers // 2, num_layers - 3
    quarter = num_layers // 4
    return quarter, num_layers // 2, num_layers - quarter
