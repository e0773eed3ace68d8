"""API keys: who may call, and the salt that keeps each key's cached pages from every other key's.

A request's `cache_salt` parts them further.
"""

import hashlib
import hmac
from collections.abc import Sequence

from cluster.api.errors import ApiError

SALT_BYTES = 16


def tenant_salt(cluster_secret: bytes, api_key: str) -> bytes:
    """Return the salt of one key's PageKeys: the same in every process, telling nothing of the key.

    HMAC-SHA256 under the cluster's secret, cut to 128 bits: who sees salts cannot test guesses of keys.
    """
    return hmac.digest(cluster_secret, b"eyrie tenant salt" + api_key.encode(), "sha256")[:SALT_BYTES]


def request_salt(cluster_secret: bytes, tenant: bytes, cache_salt: str) -> bytes:
    """Return the salt of the PageKeys of one tenant's requests with one `cache_salt`.

    Two tenants that choose the same share nothing; nor does it equal any tenant's own salt.
    """
    message = b"eyrie cache salt" + bytes([len(tenant)]) + tenant + cache_salt.encode()
    return hmac.digest(cluster_secret, message, "sha256")[:SALT_BYTES]


class Authenticator:
    """Checks bearer keys in constant time. Without keys everyone may call, under the empty salt."""

    def __init__(self, api_keys: Sequence[str], cluster_secret: bytes) -> None:
        self._cluster_secret = cluster_secret
        self._tenants = [(_fingerprint(key.encode()), tenant_salt(cluster_secret, key)) for key in api_keys]

    @property
    def is_open(self) -> bool:
        """No key is asked for."""
        return not self._tenants

    def tenant(self, authorization: bytes | None) -> bytes:
        """Return the tenant salt for an `Authorization` header; raise ApiError (401) when no key matches."""
        if not self._tenants:
            return b""
        scheme, _, key = (authorization or b"").partition(b" ")
        if scheme.lower() != b"bearer" or not key.strip():
            raise ApiError(
                401,
                "An API key is required: send the header 'Authorization: Bearer KEY'.",
                code="missing_api_key",
            )
        found = self._match(_fingerprint(key.strip()))
        if found is None:
            raise ApiError(401, "The API key is not one of this server's.", code="invalid_api_key")
        return found

    def salt(self, tenant: bytes, cache_salt: str | None) -> bytes:
        """Return the salt of a request's PageKeys: the tenant's own, or one apart for its `cache_salt`."""
        return tenant if cache_salt is None else request_salt(self._cluster_secret, tenant, cache_salt)

    def _match(self, fingerprint: bytes) -> bytes | None:
        # Every key is compared, whole, whether or not one matched before: time tells nothing.
        found = None
        for known, salt in self._tenants:
            if hmac.compare_digest(known, fingerprint):
                found = salt
        return found


class AdminKeys:
    """Checks who may change the running service. Without keys nobody may: API keys are no authority here."""

    def __init__(self, keys: Sequence[str], cluster_secret: bytes) -> None:
        self._keys = Authenticator(keys, cluster_secret)

    def check(self, authorization: bytes | None) -> None:
        """Raise ApiError unless a header bears an admin key: 401, 403 where there is none."""
        if self._keys.is_open:
            raise ApiError(
                403,
                "This server has no admin keys, so nobody may do this; start it with admin_keys_file.",
                code="no_admin_keys",
            )
        self._keys.tenant(authorization)


def _fingerprint(key: bytes) -> bytes:
    # Equal lengths, so that compare_digest does not tell a key's.
    return hashlib.sha256(key).digest()
