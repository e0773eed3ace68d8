"""PageKeys: the names under which KV pages are shared between requests, replicas and tiers.

Pure functions over bytes. Workers, routers and cache services all compute the same keys from the same
tokens; nothing here depends on the process, its hash seed or its clock.
"""

import hashlib
import sys
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NewType

import msgspec

PageKey = NewType("PageKey", bytes)
"""128 bits: a prefix of tokens, page by page, under one namespace."""

NamespaceDigest = NewType("NamespaceDigest", bytes)
"""128 bits: everything but the tokens that the bytes of a page depend on. The parent of a first page."""

KEY_BYTES = 16
LAYOUT_VERSION = 1
"""Version of the bundle format (workers.kvcache.layout); raised when the meaning of its bytes changes."""


@dataclass(frozen=True)
class KVNamespace:
    """All that decides a page's bytes beside its tokens, the tenant's salt excepted.

    `weights_digest` and `draft_digest` are xxh3-128 over all weight bytes ("" without a draft);
    `kv_settings` names every option that changes what attention writes (RoPE scaling, KV dtype scale, ...).
    """

    weights_digest: str
    draft_digest: str
    dtype: str
    page_size: int
    tp_layout: str
    kv_settings: tuple[tuple[str, str], ...] = ()
    adapter: str = ""
    layout_version: int = LAYOUT_VERSION

    def digest(self) -> NamespaceDigest:
        """Return the namespace of the empty tenant salt."""
        canonical = msgspec.json.encode(sorted(asdict(self).items()))
        return NamespaceDigest(hashlib.sha256(canonical).digest()[:KEY_BYTES])


def salted(namespace: NamespaceDigest, tenant_salt: bytes) -> NamespaceDigest:
    """Return the namespace of one tenant: two salts share no key; the empty salt is the namespace itself."""
    if not tenant_salt:
        return namespace
    return NamespaceDigest(hashlib.sha256(b"salt" + namespace + tenant_salt).digest()[:KEY_BYTES])


def page_keys(parent: NamespaceDigest | PageKey, token_ids: Sequence[int], page_size: int) -> list[PageKey]:
    """Return the keys of all whole pages of `token_ids`, the first chained to `parent`.

    A page's key is SHA-256(parent key, its tokens as little-endian u32), cut to 128 bits. Tokens after the
    last whole page have no key. To go on from page n, pass its key and the tokens after it.
    """
    words = array("I", token_ids)
    if sys.byteorder == "big":
        words.byteswap()
    octets = words.tobytes()
    stride = page_size * words.itemsize
    keys: list[PageKey] = []
    key: bytes = parent
    for end in range(stride, len(octets) + 1, stride):
        key = hashlib.sha256(key + octets[end - stride : end]).digest()[:KEY_BYTES]
        keys.append(PageKey(key))
    return keys
