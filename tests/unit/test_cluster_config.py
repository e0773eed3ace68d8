"""Configuration: file and flags share one schema, faults name the key, secrets stay out of sight."""

import json
from pathlib import Path

import pytest

from cluster.config import (
    API_KEYS_VARIABLE,
    ClusterConfig,
    ConfigError,
    describe,
    flags,
    json_schema,
    load_config,
    take_environment_keys,
)

CONFIGS = Path(__file__).resolve().parents[2] / "deploy" / "configs"


@pytest.fixture
def written(tmp_path):
    def write(text):
        path = tmp_path / "eyrie.yaml"
        path.write_text(text)
        return path

    return write


def test_nothing_given_is_the_defaults():
    assert load_config(None, {}) == ClusterConfig()


def test_flags_win_over_the_file_and_the_file_over_defaults(written):
    file = written("schema: 1\nport: 9000\ndrain_s: 5\nworker: {page_size: 32, graphs: false}\n")
    config = load_config(file, {("port",): "9001", ("worker", "page_size"): None, ("worker", "tp_size"): "2"})
    assert (config.port, config.drain_s) == (9001, 5.0)
    assert (config.worker.page_size, config.worker.graphs, config.worker.tp_size) == (32, False, 2)


def test_flags_speak_the_types_of_their_options():
    config = load_config(
        None,
        {
            ("worker", "graph_batch_sizes"): "1,2,8",
            ("worker", "num_pages"): "null",
            ("worker", "model"): "123",
            ("worker", "prefix_caching"): False,
            ("api_keys_file",): "keys.txt",
        },
    )
    assert config.worker.graph_batch_sizes == (1, 2, 8)
    assert config.worker.num_pages is None
    assert config.worker.model == "123"
    assert config.worker.prefix_caching is False
    assert config.api_keys_file == Path("keys.txt")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("prot: 1", ["`prot`", "did you mean `port`"]),
        ("worker: {page_sise: 4}", ["`worker.page_sise`", "did you mean `page_size`"]),
        ("page_size: 4", ["`page_size`", "belongs at `worker.page_size`"]),
        ("zzz: 4", ["`zzz`", "allowed are", "num_replicas"]),
        ("worker: 4", ["`worker`", "4"]),
        ("worker: {page_size: 17}", ["`worker.page_size`", "17", "16, 32 or 64"]),
        ("port: 70000", ["`port`", "70000", "65535"]),
        ("port: http", ["`port`", "http", "integer"]),
        ("schema: 2", ["`schema`", "2"]),
        ("host_cache_gb: 4", ["`host_cache_gb`", "belongs at `cache.host_cache_gb`"]),
        ("cache: {host_cache_gb: 0}", ["`cache.host_cache_gb` is 0", "greater than 0"]),
        ("cache: {host_cache_gb: .inf}", ["`cache.host_cache_gb` is inf", "finite"]),
        (
            "cache: {host_cache_gb: 1.0e+300}",
            ["`cache.host_cache_gb` is 1e+300", "less than or equal to 1000000"],
        ),
        ("worker: {kv_gb: .inf}", ["`worker.kv_gb` is inf", "finite"]),
        ("drain_s: .inf", ["`drain_s` is inf", "finite"]),
        ("cache: {eviction: fifo}", ["`cache.eviction` is 'fifo'", "'s3fifo' or 'lru'"]),
        ("cache: {host_cache_gb: 1, host_cache_ratio: 0.1}", ["`cache`: both host_cache_gb and host_"]),
        ("cache: {min_free_ratio: 0.5}", ["`cache`: min_free_ratio 0.5 is above target_free_ratio 0.05"]),
        ("cache: {transfer: udp}", ["`cache.transfer` is 'udp'", "'off', 'tcp' or 'rdma'"]),
        ("cache: {transfer: tcp}", ["`cache`: transfer is tcp without a host cache"]),
        (
            "cache: {host_cache_gb: 1, transfer: tcp, rdma_devices: mlx5_0}",
            ["`cache`: rdma_devices are given while transfer is tcp; give transfer rdma"],
        ),
        ("cache: {keep_arena: true}", ["`cache.keep_arena` is on without `secret_file`"]),
        (
            "cache: {host_cache_gb: 1}\nworker: {prefix_caching: false}",
            ["`worker.prefix_caching` is off", "turn the one on"],
        ),
        ("- port", ["list"]),
        ("a: [", ["not YAML", "line 1"]),
    ],
)
def test_a_fault_names_the_key_what_was_found_and_what_is_allowed(written, text, expected):
    with pytest.raises(ConfigError) as raised:
        load_config(written(text), {})
    for part in expected:
        assert part in str(raised.value)


def test_all_wrong_values_are_told_at_once(written):
    with pytest.raises(ConfigError) as raised:
        load_config(written("port: -1\nworker: {dtype: int3}"), {("drain_s",): "-2"})
    assert len(str(raised.value).splitlines()) == 3


def test_a_missing_or_binary_file_is_a_configuration_error(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "none.yaml", {})
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_config(tmp_path / "binary.yaml", {})


def test_every_option_is_a_flag_once_and_in_the_json_schema():
    names = [flag.name for flag in flags()]
    assert len(names) == len(set(names))
    schema = json_schema()
    nested = {"worker": schema["$defs"]["WorkerConfig"], "cache": schema["$defs"]["CacheConfig"]}
    for flag in flags():
        record = nested[flag.path[0]] if len(flag.path) > 1 else schema
        assert flag.path[-1] in record["properties"]
    assert schema["additionalProperties"] is False
    json.dumps(schema)


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_the_shipped_configurations_are_valid(file):
    assert load_config(file, {}).schema == 1


def test_api_keys_leave_the_environment_and_never_show(monkeypatch):
    monkeypatch.setenv(API_KEYS_VARIABLE, " sk-planted-1 ,, sk-planted-2")
    keys = take_environment_keys()
    assert keys == ("sk-planted-1", "sk-planted-2")
    assert take_environment_keys() == ()
    shown = json.dumps(describe(ClusterConfig(), len(keys)))
    assert "planted" not in shown
    assert json.loads(shown)["api_keys"] == "***"
