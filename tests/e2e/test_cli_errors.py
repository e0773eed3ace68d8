"""What is wrong before anything starts is told in a line, with an exit code, without a traceback."""

import json
import logging
import socket

import pytest
from typer.testing import CliRunner

from cluster.__main__ import app
from cluster.config import API_KEYS_VARIABLE
from tests.harness import write_tiny_model


@pytest.fixture(autouse=True)
def logging_restored():
    """The command sets up logging for its process, which here is pytest's."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


def run(*arguments, environment=None):
    result = CliRunner().invoke(app, list(arguments), env=environment)
    assert "Traceback" not in result.output
    assert result.stdout == "" or arguments[0] == "config", "stdout is for the ready line"
    return result


def test_the_schema_is_json_schema_of_the_file():
    result = run("config", "schema")
    assert result.exit_code == 0
    schema = json.loads(result.stdout)
    assert schema["properties"]["schema"]["const"] == 1
    assert schema["additionalProperties"] is False


@pytest.mark.parametrize(
    ("arguments", "exit_code", "parts"),
    [
        (["--port", "eighty"], 2, ["`port`", "eighty"]),
        (["--page-size", "17"], 2, ["`worker.page_size`", "16, 32 or 64"]),
        (["--num-replicas", "0"], 2, ["`num_replicas`"]),
        (["--config", "/no/such/file.yaml"], 2, ["/no/such/file.yaml"]),
        (["--no-such-flag"], 2, ["--no-such-flag"]),
        (["/no/such/model"], 1, ["/no/such/model", "smollm2-135m"]),
        (["/etc/passwd"], 1, ["/etc/passwd", ".gguf"]),
        (["--api-keys-file", "/no/such/keys"], 1, ["/no/such/keys"]),
        (["--admin-keys-file", "/no/such/keys"], 1, ["admin_keys_file /no/such/keys"]),
        (["--host-cache-gb", "1", "--store", "s3:bucket"], 2, ["'s3:bucket'", "disk:/PATH?gb=SIZE"]),
        (["--host-cache-gb", "-1"], 2, ["`cache.host_cache_gb`", "-1", "greater than 0"]),
        (["--host-cache-ratio", "2"], 2, ["`cache.host_cache_ratio`", "is 2", "less than or equal to 0.9"]),
        (["--host-cache-gb", "1", "--store", "nonsense"], 2, ["'nonsense'", "mooncake:HOST:PORT"]),
        (["--host-cache-gb", "1", "--transfer", "udp"], 2, ["`cache.transfer`", "'udp'", "'off', 'tcp'"]),
        (["--transfer", "tcp"], 2, ["transfer is tcp", "host_cache_gb"]),
        (["--store", "disk:/cache?gb=1"], 2, ["without a host cache", "host_cache_gb"]),
        (["--secret-file", "/no/such/secret"], 1, ["/no/such/secret"]),
        (["--host", "host.invalid"], 1, ["host.invalid"]),
        (["--ray-address", "127.0.0.1:9"], 1, ["127.0.0.1:9", "Ray"]),
    ],
)
def test_a_bad_flag_is_named_with_what_is_allowed(arguments, exit_code, parts):
    result = run("serve", *arguments)
    assert result.exit_code == exit_code
    for part in parts:
        assert part in result.output


@pytest.mark.parametrize(
    ("vocab_size", "flags", "parts"),
    [
        (9, ["--tp-size", "8"], ["vocab_size is 9", "--tp-size 5"]),
        (5, ["--draft", "self", "--draft-topk", "8"], ["draft_vocab_size is 5", "--draft-topk to 5 at most"]),
    ],
)
def test_a_vocabulary_too_small_for_what_is_asked_is_told(tmp_path, vocab_size, flags, parts):
    model = write_tiny_model(tmp_path / "few", vocab_size=vocab_size)
    result = run("serve", str(model), *flags, "--port", "0")
    assert result.exit_code == 1
    for part in parts:
        assert part in result.output


def test_a_misspelt_key_is_told_with_its_neighbour(tmp_path):
    file = tmp_path / "eyrie.yaml"
    file.write_text("schema: 1\nworker:\n  max_runing_requests: 4\n")
    result = run("serve", "--config", str(file))
    assert result.exit_code == 2
    assert "max_runing_requests" in result.output
    assert "did you mean `max_running_requests`" in result.output


def test_a_port_in_use_is_told_before_anything_starts():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run("serve", "--port", str(port))
    assert result.exit_code == 1
    assert f"127.0.0.1:{port}" in result.output
    assert "--port" in result.output


def test_a_truncated_model_file_is_told(tmp_path):
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF\x03\x00\x00\x00")
    result = run("serve", str(file))
    assert result.exit_code == 1
    assert "broken.gguf" in result.output


def test_keys_are_checked_and_never_shown(tmp_path):
    file = tmp_path / "keys"
    file.write_text("sk-planted-key-in-a-readable-file\n")
    file.chmod(0o644)
    result = run("serve", "--api-keys-file", str(file))
    assert result.exit_code == 1
    assert "chmod 600" in result.output
    short = run("serve", environment={API_KEYS_VARIABLE: "sk-good-enough,planted"})
    assert short.exit_code == 1
    assert API_KEYS_VARIABLE in short.output
    for output in (result.output, short.output):
        assert "planted" not in output
