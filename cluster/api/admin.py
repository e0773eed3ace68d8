"""`/admin/cache/store`: attaches a remote store to every node's host cache, and detaches it, at run time.

Whoever may do that may have the nodes write files and send pages away: it wants an admin key, not an API key.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from cache_service.messages import Answer, AttachStore, DetachStore
from cache_service.messages import Request as CacheRequest
from cache_service.one_call import CallError, call_once
from cache_service.store_address import StoreAddressError, parse_store_address
from cluster.api.auth import AdminKeys
from cluster.api.errors import ApiError, bad_request
from cluster.api.json_body import read_json_bytes
from cluster.api.request_ids import header

logger = logging.getLogger(__name__)

CALL_TIMEOUT_S = 30.0

Call = Callable[[str, bytes, CacheRequest, float], Answer]
"""(endpoint, cluster secret, request, seconds) -> answer; raises CallError."""


class AttachBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of POST."""

    store: str


class NodeResult(msgspec.Struct, frozen=True):
    """What became of one node's part."""

    node: str
    status: Literal["done", "failed"]
    reason: str | None = None


class StoreResult(msgspec.Struct, frozen=True):
    """The answer: one result a node; status 200 where all have done it, else 502."""

    store: str | None
    nodes: list[NodeResult]


class CacheAdmin:
    """`endpoints` are the CacheServers', by the nodes' addresses.

    `use_store` hears, on the event loop, of a store that some node has now.
    """

    def __init__(
        self,
        keys: AdminKeys,
        endpoints: Mapping[str, str],
        cluster_secret: bytes,
        use_store: Callable[[str], None],
        *,
        call: Call = call_once,
    ) -> None:
        self._keys = keys
        self._endpoints = endpoints
        self._cluster_secret = cluster_secret
        self._use_store = use_store
        self._call = call
        self._turn = asyncio.Lock()  # so that all nodes hear two calls in the same order

    async def attach(self, request: Request) -> Response:
        """Have every node use the store that the body names, instead of the one it has."""
        self._keys.check(header(request.scope, b"authorization"))
        raw = await read_json_bytes(request)
        try:
            store = msgspec.json.decode(raw, type=AttachBody).store
            parse_store_address(store)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise bad_request(f'The body must be {{"store": "ADDRESS"}}: {error}.', "store") from None
        except StoreAddressError as error:
            raise bad_request(f"'store': {error}.", "store") from None
        return await self._tell_all(AttachStore(store), store)

    async def detach(self, request: Request) -> Response:
        """Have every node use no store any more."""
        self._keys.check(header(request.scope, b"authorization"))
        return await self._tell_all(DetachStore(), None)

    async def _tell_all(self, what: CacheRequest, store: str | None) -> Response:
        if not self._endpoints:
            raise ApiError(
                409,
                "This service has no host cache, behind which a store could be; start it with host_cache_gb.",
                code="no_host_cache",
            )
        async with self._turn:
            results = await asyncio.gather(
                *(self._tell(node, endpoint, what) for node, endpoint in self._endpoints.items())
            )
            if store is not None and any(result.status == "done" for result in results):
                self._use_store(store)
        has_failed = any(result.status == "failed" for result in results)
        logger.info("told the nodes of a store", extra={"store": store, "has_failed": has_failed})
        return Response(
            msgspec.json.encode(StoreResult(store, results)),
            502 if has_failed else 200,
            media_type="application/json",
        )

    async def _tell(self, node: str, endpoint: str, what: CacheRequest) -> NodeResult:
        try:
            await asyncio.to_thread(self._call, endpoint, self._cluster_secret, what, CALL_TIMEOUT_S)
        except CallError as error:
            return NodeResult(node, "failed", str(error))
        return NodeResult(node, "done")
