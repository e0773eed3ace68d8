"""`cache_salt`: requests share cached pages only under the same one, and only within one API key."""

import asyncio
import contextlib
import secrets

import httpx
import pytest

from cluster.api.app import create_app
from cluster.api.auth import Authenticator
from cluster.router.router import Router
from tests.unit.api_fakes import FakeRouter, make_service, says
from tests.unit.replica_threads import ThreadReplica

SECRET = b"cluster secret"
PROMPT = list(range(1, 81))
"""Five whole pages and a token: the last one is always computed."""


class NoRecorder:
    def placed(self, replica_id, num_pages, num_held_pages):
        pass

    def hinted(self, kind):
        pass


def client_of(service):
    return httpx.AsyncClient(transport=httpx.ASGITransport(create_app(service)), base_url="http://api")


@contextlib.asynccontextmanager
async def serving(**service_fields):
    """A client of the API over a replica with a real cache."""
    cluster_secret = secrets.token_bytes(32)
    replica = ThreadReplica("r0", cluster_secret)
    router = Router(
        {replica.replica_id: replica.endpoint},
        cluster_secret,
        "api",
        card_digest="card",
        recorder=NoRecorder(),
    )
    await router.start(5.0)
    service, _ = make_service(router, **service_fields)
    try:
        async with client_of(service) as client:
            yield client
    finally:
        await router.close()
        await asyncio.to_thread(replica.stop)


async def cached_tokens(client, cache_salt=None, key=None):
    body = {"model": "tiny", "prompt": [*PROMPT, 5], "max_tokens": 2, "ignore_eos": True}
    if cache_salt is not None:
        body["cache_salt"] = cache_salt
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    response = await client.post("/v1/completions", json=body, headers=headers)
    assert response.status_code == 200, response.text
    return response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


async def test_only_the_same_salt_hits():
    async with serving() as client:
        assert await cached_tokens(client, "one") == 0
        assert await cached_tokens(client, "two") == 0
        assert await cached_tokens(client) == 0
        assert await cached_tokens(client, "one") == len(PROMPT)
        assert await cached_tokens(client, "two") == len(PROMPT)
        assert await cached_tokens(client) == len(PROMPT)


async def test_the_same_salt_of_another_key_is_another_salt():
    async with serving(api_keys=["key-one", "key-two"]) as client:
        assert await cached_tokens(client, "mine", "key-one") == 0
        assert await cached_tokens(client, "mine", "key-two") == 0
        assert await cached_tokens(client, key="key-one") == 0
        assert await cached_tokens(client, "mine", "key-one") == len(PROMPT)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_both_calls_take_it_and_null_is_like_leaving_it_out(path):
    prompt = {"messages": [{"role": "user", "content": "hi"}]} if "chat" in path else {"prompt": "hi"}
    salts = []
    for fields in ({}, {"cache_salt": None}, {"cache_salt": "é🎉"}):
        router = FakeRouter(says("x"))
        service, _ = make_service(router)
        async with client_of(service) as client:
            response = await client.post(path, json={"model": "tiny", **prompt, **fields})
        assert response.status_code == 200
        salts.append(router.streams[0].request.tenant_salt)
    assert salts[0] == salts[1] == b""
    assert len(salts[2]) == 16


def test_no_two_pairs_of_tenant_and_salt_are_one():
    authenticator = Authenticator(["key-one", "key-two"], SECRET)
    tenants = [b"", *(authenticator.tenant(f"Bearer {key}".encode()) for key in ("key-one", "key-two"))]
    salts = [authenticator.salt(tenant, text) for tenant in tenants for text in (None, "a", "b")]
    assert len(set(salts)) == len(salts)
    # What an open server's client may choose does not run into a tenant's.
    assert authenticator.salt(b"", "k" * 16 + "a") != authenticator.salt(b"k" * 16, "a")
    assert authenticator.salt(b"", "a") != Authenticator([], b"other").salt(b"", "a")
