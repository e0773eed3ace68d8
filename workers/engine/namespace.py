"""What names the KV of a replica: all that its pages' bytes depend on beside their tokens."""

import hashlib
from dataclasses import asdict

import msgspec

from cache_service.keys import KVNamespace
from workers.card import ModelCard
from workers.config import WorkerConfig
from workers.kvcache.layout import BundleLayout
from workers.models.config import Dtype
from workers.models.sharding import head_layout


def kv_namespace(
    config: WorkerConfig,
    card: ModelCard,
    dtype: Dtype,
    weights_digest: str,
    draft_digest: str,
    layout: BundleLayout,
) -> KVNamespace:
    """Return the namespace of a rank's pages: equal exactly where equal tokens make equal bytes."""
    heads = head_layout(card.config, config.tp_size)
    shape = msgspec.json.encode(
        [asdict(card.config), type(card.config.rope_scaling).__name__], order="sorted"
    )
    return KVNamespace(
        weights_digest=weights_digest,
        draft_digest=draft_digest,
        dtype=dtype,
        page_size=config.page_size,
        tp_layout=f"size={config.tp_size},kv_heads={heads.kv_heads_per_rank},replicas={heads.replicas}",
        kv_settings=(
            ("bundle", layout.fingerprint()),
            ("model", hashlib.sha256(shape).hexdigest()[:32]),
        ),
    )
