"""What `eyrie --help` and its like tell: every option whole, described, with its default and its choices."""

import json
import re
from importlib.metadata import version
from typing import Literal, get_args, get_origin

import pytest
from typer.testing import CliRunner

from cache_service.config import CacheConfig
from cluster.__main__ import app
from cluster.config import ClusterConfig, flags, json_schema
from workers.config import WorkerConfig

FLAGS = {flag.name: flag for flag in flags()}
PYTHON_WORDS = re.compile(r"\b(None|True|False)\b")


def option_of(flag):
    record = {"worker": WorkerConfig, "cache": CacheConfig}.get(flag.path[0], ClusterConfig)
    return record.__dataclass_fields__[flag.path[-1]]


@pytest.fixture(scope="module")
def text():
    result = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    assert result.exit_code == 0
    return result.output


@pytest.mark.parametrize("name", FLAGS)
def test_an_option_is_described_with_its_default_and_choices(name, text):
    flag, option = FLAGS[name], option_of(FLAGS[name])
    said = " ".join(text.split())
    assert len(flag.description) > 10 and flag.description.endswith(".")
    assert not PYTHON_WORDS.search(flag.help)
    assert flag.help in said
    if option.default is None:
        assert "Not given: " in flag.help and "[default: " not in flag.help
    else:
        assert flag.help.endswith(f"[default: {flag.default}]") and flag.default
    if option.type is bool:
        assert f"--{name} / --no-{name} " in said and flag.default in ("on", "off")
    if get_origin(option.type) is Literal:
        assert f"--{name} [{'|'.join(map(str, get_args(option.type)))}] " in said


def test_every_name_is_whole_in_80_columns(text):
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    for name in [*FLAGS.keys() - {"model"}, "config", "help"]:
        assert any(re.match(rf"  --{name}( |$)", line) for line in lines), name
    assert "…" not in text


def test_the_schema_speaks_of_no_python():
    assert not PYTHON_WORDS.search(json.dumps(json_schema()))
    records = [json_schema(), *json_schema()["$defs"].values()]
    assert len(records) == 3
    for properties in (record["properties"] for record in records):
        for name, option in properties.items():
            assert option.get("description"), name


def test_the_version_is_the_packages():
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"eyrie {version('eyrie')}\n")
