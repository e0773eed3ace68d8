"""`eyrie cache` against a running server, found by its endpoint or by its arena on this node."""

import json

import pytest
from typer.testing import CliRunner

from cache_service.arena_files import SHARED_MEMORY
from cache_service.client import CacheClient, ClientSpec
from cache_service.curve import new_cluster_secret, write_cluster_secret
from cache_service.discovery import find_endpoints
from cache_service.identity import cluster_id_of
from cluster.__main__ import app
from tests.unit.arenas import FINGERPRINT
from tests.unit.cache_nodes import BUNDLE_BYTES, TIMEOUT_S, serving, store_chain

SECRET = new_cluster_secret()


@pytest.fixture(scope="module")
def secret_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("secret") / "cluster.secret"
    write_cluster_secret(path, SECRET)
    return str(path)


@pytest.fixture
def server():
    """In /dev/shm, where the command looks; with three pages."""
    with serving(SHARED_MEMORY, secret=SECRET) as server:
        client = CacheClient(server.core.endpoint, SECRET, ClientSpec(FINGERPRINT, BUNDLE_BYTES, 1, 7))
        client.start(TIMEOUT_S)
        store_chain(client, "abc")
        yield server
        client.close()


def run(*arguments):
    result = CliRunner().invoke(app, ["cache", *arguments])
    return result.exit_code, result.output


def test_the_cache_is_shown_checked_and_cleared(server, secret_file):
    where = ("--secret-file", secret_file, "--endpoint", server.core.endpoint)
    code, text = run("show", *where)
    assert code == 0 and "GiB hold 3 pages" in text and "commits{committed}" in text
    assert run("check", *where) == (0, "ok: 3 pages\n")
    code, text = run("show", *where, "--json")
    shown = json.loads(text)
    assert shown["num_ready"] == 3 and shown["slot_bytes"] == BUNDLE_BYTES
    assert run("clear", *where) == (0, "removed 3 pages\n")
    assert json.loads(run("show", *where, "--json")[1])["num_ready"] == 0


def test_a_damaged_store_fails_the_check(server, secret_file):
    server.core._arena.arena.set_checksum(0, 0, 0)
    code, text = run("check", "--secret-file", secret_file)
    assert code == 1 and "the cache server refused: slot 0 lacks a rank's bundle" in text


def test_the_server_of_this_node_is_found(server, secret_file):
    assert find_endpoints(cluster_id_of(SECRET)) == [server.core.endpoint]
    assert run("check", "--secret-file", secret_file) == (0, "ok: 3 pages\n")


def test_a_store_is_attached_and_detached(server, secret_file, tmp_path):
    where = ("--secret-file", secret_file, "--endpoint", server.core.endpoint)
    address = f"disk:{tmp_path}/store?gb=0.1"
    assert run("store", "attach", address, *where) == (0, f"attached {address}\n")
    shown = json.loads(run("show", *where, "--json")[1])
    assert shown["store"] == address and shown["stores{attached}"] == 1
    code, text = run("store", "attach", "s3:bucket", *where)
    assert code == 1 and "store 's3:bucket' is neither a disk nor Mooncake" in text
    assert run("store", "detach", *where) == (0, "no store is attached\n")
    assert json.loads(run("show", *where, "--json")[1])["store"] == ""


def test_without_a_server_the_command_says_what_to_do(secret_file, tmp_path):
    code, text = run("show", "--secret-file", secret_file)
    assert code == 1 and "0 cache servers of this secret run on this node" in text and "--endpoint" in text
    code, text = run("show", "--secret-file", str(tmp_path / "none"))
    assert code == 1 and "No such file" in text
    code, text = run("show", "--secret-file", secret_file, "--endpoint", "tcp://127.0.0.1:1")
    assert code == 1 and "nobody listens there" in text
