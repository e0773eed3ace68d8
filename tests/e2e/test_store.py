"""A service with a store behind its host cache: pages outlive the service; stores come and go meanwhile."""

import re
import time

import httpx
import pytest

from tests.e2e.eyrie_process import EyrieProcess, tiny_model
from tests.e2e.test_host_cache import FLAGS, PROMPT, WAIT_S, cache_figures, complete, fill_device

pytestmark = pytest.mark.slow  # three services, one after another

ADMIN_KEY = "an-admin-key"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_model(tmp_path_factory.mktemp("model") / "tiny"))


def await_figures(eyrie, holds):
    """Return the cache server's figures once they are as wanted."""
    end_s = time.monotonic() + WAIT_S
    while not holds(figures := cache_figures("\n".join(eyrie.stderr))):
        assert time.monotonic() < end_s, figures
        time.sleep(0.1)
    return figures


@pytest.mark.timeout(300)
def test_pages_outlive_the_service_in_its_store(model, tmp_path):
    flags = [*FLAGS, "--store", f"disk:{tmp_path}/store?gb=0.1"]
    with EyrieProcess(model, *flags) as eyrie:
        text, cached = complete(eyrie.url(), model, PROMPT)
        assert cached == 0
        await_figures(eyrie, lambda figures: figures["num_known_remote"] >= 15)
        eyrie.terminate()
        assert eyrie.wait() == 0
    with EyrieProcess(model, *flags) as eyrie:
        url = eyrie.url()
        await_figures(eyrie, lambda figures: figures["num_known_remote"] >= 15)
        again, cached = complete(url, model, PROMPT)
        assert again == text
        assert cached == 240
        eyrie.terminate()
        assert eyrie.wait() == 0
        assert eyrie.leftovers() == []


@pytest.mark.timeout(300)
def test_who_has_an_admin_key_attaches_and_detaches_a_store(model, tmp_path):
    keys_file = tmp_path / "admin.keys"
    keys_file.touch(mode=0o600)
    keys_file.write_text(f"{ADMIN_KEY}\n")
    address = f"disk:{tmp_path}/{{node}}?gb=0.1"
    with EyrieProcess(model, *FLAGS, "--admin-keys-file", str(keys_file)) as eyrie:
        url = eyrie.url()
        text, _ = complete(url, model, PROMPT)
        assert httpx.post(f"{url}/admin/cache/store", json={"store": address}).status_code == 401
        headers = {"authorization": f"Bearer {ADMIN_KEY}"}
        answer = httpx.post(f"{url}/admin/cache/store", json={"store": address}, headers=headers, timeout=60)
        assert answer.status_code == 200, answer.text
        assert answer.json()["nodes"] == [{"node": "127.0.0.1", "status": "done", "reason": None}]
        figures = await_figures(eyrie, lambda figures: figures["num_known_remote"] >= 15)
        assert figures["store"] == address
        assert len(list((tmp_path / "127.0.0.1").glob("*.page"))) >= 15
        fill_device(url, model, "meanwhile")
        answer = httpx.delete(f"{url}/admin/cache/store", headers=headers, timeout=60)
        assert answer.status_code == 200, answer.text
        figures = cache_figures("\n".join(eyrie.stderr))
        assert figures["store"] == "" and figures["num_known_remote"] == 0
        assert complete(url, model, PROMPT) == (text, 240)
        assert not re.search(ADMIN_KEY, "\n".join(eyrie.stderr))
        eyrie.terminate()
        assert eyrie.wait() == 0
        assert eyrie.leftovers() == []
