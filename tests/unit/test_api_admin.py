"""`/admin/cache/store`: who may attach a store, what every node is told, and what came of it."""

import threading

import httpx
import pytest

from cache_service.messages import AttachStore, DetachStore, Done
from cache_service.one_call import CallError
from cluster.api.admin import CacheAdmin
from cluster.api.app import create_app
from cluster.api.auth import AdminKeys
from tests.unit.api_fakes import FakeRouter, make_service

SECRET = b"cluster secret"
KEY = "an-admin-key"
API_KEY = "a-tenants-key"
STORE = "disk:/cache?gb=1"
PATH = "/admin/cache/store"
NODES = {"10.0.0.1": "tcp://10.0.0.1:1", "10.0.0.2": "tcp://10.0.0.2:2"}


class FakeNodes:
    """Stands in for the CacheServers."""

    def __init__(self):
        self.told = []
        self.errors = {}
        self.stores = []
        """As the router hears of them."""
        self.lock = threading.Lock()

    def __call__(self, endpoint, secret, request, timeout_s):
        assert secret == SECRET and timeout_s > 0
        with self.lock:
            self.told.append((endpoint, request))
        if endpoint in self.errors:
            raise CallError(self.errors[endpoint])
        return Done()


def client(nodes, *, keys=(KEY,), endpoints=NODES, key=KEY):
    admin = CacheAdmin(AdminKeys(keys, SECRET), endpoints, SECRET, nodes.stores.append, call=nodes)
    service, _ = make_service(FakeRouter(), api_keys=(API_KEY,), cache_admin=admin)
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    transport = httpx.ASGITransport(create_app(service))
    return httpx.AsyncClient(transport=transport, base_url="http://eyrie", headers=headers)


@pytest.fixture
def nodes():
    return FakeNodes()


async def test_every_node_is_told_and_answers_for_itself(nodes):
    async with client(nodes) as http:
        answer = await http.post(PATH, json={"store": STORE})
        assert answer.status_code == 200
        assert answer.json() == {
            "store": STORE,
            "nodes": [{"node": node, "status": "done", "reason": None} for node in NODES],
        }
        assert sorted(nodes.told, key=str) == [(endpoint, AttachStore(STORE)) for endpoint in NODES.values()]
        nodes.told.clear()
        answer = await http.delete(PATH)
        assert answer.status_code == 200 and answer.json()["store"] is None
        assert nodes.stores == [STORE]
        assert sorted(nodes.told, key=str) == [(endpoint, DetachStore()) for endpoint in NODES.values()]


async def test_a_node_that_cannot_is_named_and_the_others_have_done_it(nodes):
    nodes.errors["tcp://10.0.0.2:2"] = "the cache server refused: no Mooncake master at 10.0.0.9:1"
    async with client(nodes) as http:
        answer = await http.post(PATH, json={"store": STORE})
    assert answer.status_code == 502
    first, second = answer.json()["nodes"]
    assert first["status"] == "done"
    assert nodes.stores == [STORE]
    assert second == {"node": "10.0.0.2", "status": "failed", "reason": nodes.errors["tcp://10.0.0.2:2"]}


async def test_the_router_does_not_hear_of_a_store_that_no_node_has(nodes):
    nodes.errors = dict.fromkeys(NODES.values(), "it cannot be opened")
    async with client(nodes) as http:
        assert (await http.post(PATH, json={"store": STORE})).status_code == 502
    assert nodes.stores == []


@pytest.mark.parametrize(
    ("keys", "key", "status", "code"),
    [
        ((), KEY, 403, "no_admin_keys"),
        ((), API_KEY, 403, "no_admin_keys"),
        ((KEY,), None, 401, "missing_api_key"),
        ((KEY,), API_KEY, 401, "invalid_api_key"),
        ((KEY,), "another-key", 401, "invalid_api_key"),
    ],
)
async def test_nobody_without_an_admin_key_is_heard(nodes, keys, key, status, code):
    async with client(nodes, keys=keys, key=key) as http:
        answers = [await http.post(PATH, json={"store": STORE}), await http.delete(PATH)]
    for answer in answers:
        assert answer.status_code == status
        assert answer.json()["error"]["code"] == code
    assert nodes.told == []


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (
            b'{"store": "s3:bucket"}',
            "'store': store 's3:bucket' is neither a disk nor Mooncake; write disk:/",
        ),
        (b'{"store": "disk:/x"}', "has no gb"),
        (b"{}", "missing required field `store`"),
        (b'{"store": 1}', "Expected `str`"),
        (b'{"store": "disk:/x?gb=1", "force": true}', "unknown field `force`"),
        (b'"disk:/x?gb=1"', "Expected `object`"),
        (b"\xff", "The body must be"),
    ],
)
async def test_a_bad_body_is_refused_before_any_node_hears_of_it(nodes, body, told):
    async with client(nodes) as http:
        answer = await http.post(PATH, content=body, headers={"content-type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "store")
    assert told in error["message"]
    assert nodes.told == []


async def test_other_methods_media_types_and_a_service_without_a_host_cache_are_told_so(nodes):
    async with client(nodes) as http:
        answer = await http.get(PATH)
        assert answer.status_code == 405 and "takes POST and DELETE only" in answer.json()["error"]["message"]
        assert (await http.post(PATH, content=b"store=x")).status_code == 415
    async with client(nodes, endpoints={}) as http:
        answer = await http.post(PATH, json={"store": STORE})
        assert answer.status_code == 409 and answer.json()["error"]["code"] == "no_host_cache"
        assert (await http.delete(PATH)).status_code == 409
