"""ClusterConfig: every option of a service, from a YAML file, flags and the environment, validated once.

The one place that reads the environment. File and flags share one schema; errors name the key, what was found
and what is allowed. Read by the CLI and the job; the resolved record travels to the actors, secrets never do.
"""

import dataclasses
import difflib
import os
from collections.abc import Iterator, Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from cache_service.config import CacheConfig
from workers.config import WorkerConfig

API_KEYS_VARIABLE = "EYRIE_API_KEYS"
"""API keys, separated by commas; beside or instead of `api_keys_file`."""

HIDDEN = "***"

_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

Seconds = Annotated[float, Field(gt=0)]


class ConfigError(Exception):
    """The configuration cannot be used; the message has one line per fault."""


@dataclass(frozen=True, config=_STRICT)
class ClusterConfig:
    """Options of one service."""

    schema: Literal[1] = 1
    """Version of this format."""
    worker: WorkerConfig = field(default_factory=WorkerConfig)
    """Options of each replica's workers."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    """Options of each node's host cache."""
    host: str = "127.0.0.1"
    """Address the HTTP server binds; wider than loopback wants API keys."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port the HTTP server binds; 0: any free one, which the `ready` line names."""
    served_model_name: Annotated[str, Field(min_length=1)] | None = None
    """Name of the model for clients. Not given: the model as named here."""
    num_replicas: Annotated[int, Field(ge=1, le=256)] = 1
    """Copies of the model that serve, each with `tp_size` ranks."""
    drain_s: Annotated[float, Field(ge=0)] = 30.0
    """Seconds that running requests get to finish at shutdown."""
    start_timeout_s: Seconds = 300.0
    """Seconds from the start, loading included, until it counts as failed."""
    max_restarts: Annotated[int, Field(ge=0)] = 5
    """Restarts in a row of a replica that is lost or does not start, after which it stays down; one that has
    served for five minutes begins anew. 0: a lost replica stays down."""
    replica_lease_s: Seconds = 20.0
    """Seconds after which a silent replica is taken for dead."""
    api_keys_file: Path | None = None
    """File of API keys, one a line, # begins a comment, mode 600. Not given: only the keys in the environment
    variable EYRIE_API_KEYS, if any."""
    admin_keys_file: Path | None = None
    """File of the keys that may change the running service (`/admin`), as `api_keys_file` is written. Not
    given: nobody may."""
    secret_file: Path | None = None
    """File of the cluster secret, 64 hex digits, mode 600, on every node. Not given: one made for this run,
    on this node only."""
    ray_address: str | None = None
    """Running Ray cluster to join, HOST:PORT or `auto`. Not given: an own one on this machine, gone with the
    service."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Lowest level of the service's own log lines, on stderr and in Ray's log folder."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.cache.keep_arena and self.secret_file is None:
            raise ValueError(
                "`cache.keep_arena` is on without `secret_file`: the next run finds the pages by the secret;"
                " give one"
            )
        if self.cache.is_on and not self.worker.prefix_caching:
            raise ValueError(
                "a host cache is asked for while `worker.prefix_caching` is off: its pages are found by their"
                " prefix; turn the one on or the other off"
            )
        return self


@dataclasses.dataclass(frozen=True)
class Flag:
    """One option as a command-line flag."""

    path: tuple[str, ...]
    """Where the option stands in the file."""
    description: str
    """What it does; for an option that may be left open, what then holds ("Not given: ...")."""
    value: str
    """What stands for the value in the help: choices, `[cpu|cuda]`, or a kind, `INT`; "" of a switch."""
    default: str
    """As a user writes it; "" for an option that may be left open."""

    @property
    def name(self) -> str:
        """The flag's name without dashes before it; nested options need no prefix, their names differ."""
        return self.path[-1].replace("_", "-")

    @property
    def is_switch(self) -> bool:
        """It takes no value: `--name` or `--no-name`."""
        return not self.value

    @property
    def help(self) -> str:
        """The whole help text."""
        return f"{self.description} [default: {self.default}]" if self.default else self.description


def flags() -> list[Flag]:
    """Return a flag for each option but `schema`."""
    return [flag for flag in _flags(ClusterConfig, ()) if flag.path != ("schema",)]


def load_config(file: Path | None, overrides: Mapping[tuple[str, ...], str | bool | None]) -> ClusterConfig:
    """Merge file and flags (flags win; None: not given) into one validated record, or raise ConfigError."""
    tree = read_settings(file) if file is not None else {}
    source = str(file) if file is not None else "flags"
    _refuse_unknown(tree, ClusterConfig, (), source)
    types = dict(_leaves(ClusterConfig, ()))
    for path, value in overrides.items():
        if value is None:
            continue
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = _parse(value, types[path])
    try:
        return TypeAdapter(ClusterConfig).validate_python(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(fault) for fault in error.errors())) from None


def read_settings(file: Path) -> dict[str, Any]:
    """Return what a YAML file says at its top, or raise ConfigError."""
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: not UTF-8 text") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        raise ConfigError(f"{file}: not YAML{where}: {getattr(error, 'problem', None) or error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{file}: found a {type(tree).__name__} at the top; expected `key: value` lines")
    return tree


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of the file."""
    schema = TypeAdapter(ClusterConfig).json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def describe(config: ClusterConfig, num_api_keys: int) -> dict[str, Any]:
    """Return the resolved configuration for the log: plain values, secrets as `***`."""
    resolved: dict[str, Any] = TypeAdapter(ClusterConfig).dump_python(config, mode="json")
    return {**resolved, "cluster_secret": HIDDEN, "api_keys": HIDDEN if num_api_keys else []}


def take_environment_keys() -> tuple[str, ...]:
    """Return the environment's API keys and remove them from it: child processes shall not inherit them."""
    listed = os.environ.pop(API_KEYS_VARIABLE, "")
    return tuple(key.strip() for key in listed.split(",") if key.strip())


def _refuse_unknown(tree: dict[str, Any], record: type, prefix: tuple[str, ...], source: str) -> None:
    allowed = {option.name: option.type for option in dataclasses.fields(record)}
    for key, value in tree.items():
        name = ".".join((*prefix, str(key)))
        if key not in allowed:
            raise ConfigError(f"{source}: unknown key `{name}`{_nearest(str(key), record)}")
        nested = allowed[key]
        if dataclasses.is_dataclass(nested) and isinstance(nested, type):
            if not isinstance(value, dict):
                raise ConfigError(f"{source}: `{name}` is {value!r}; expected the keys of {nested.__name__}")
            _refuse_unknown(value, nested, (*prefix, str(key)), source)


def _nearest(key: str, record: type) -> str:
    here = [option.name for option in dataclasses.fields(record)]
    everywhere = {path[-1]: ".".join(path) for path, _ in _leaves(ClusterConfig, ())}
    if key in everywhere:
        return f"; it belongs at `{everywhere[key]}`"
    close = difflib.get_close_matches(key, here, n=1, cutoff=0.5)
    if close:
        return f"; did you mean `{close[0]}`?"
    elsewhere = difflib.get_close_matches(key, everywhere, n=1, cutoff=0.6)
    if elsewhere:
        return f"; did you mean `{everywhere[elsewhere[0]]}`?"
    return f"; allowed are {', '.join(here)}"


def _leaves(record: type, prefix: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for option in dataclasses.fields(record):
        path = (*prefix, option.name)
        if dataclasses.is_dataclass(option.type) and isinstance(option.type, type):
            yield from _leaves(option.type, path)
        else:
            yield path, option.type


def _flags(record: type, prefix: tuple[str, ...]) -> Iterator[Flag]:
    for option in dataclasses.fields(record):
        path = (*prefix, option.name)
        if dataclasses.is_dataclass(option.type) and isinstance(option.type, type):
            yield from _flags(option.type, path)
            continue
        schema = TypeAdapter(record).json_schema()["properties"][option.name]
        description = " ".join(schema["description"].split())
        yield Flag(path, description, _value(option.type), _default(option.default))


def _value(expected: Any) -> str:
    if expected is bool:
        return ""
    if get_origin(expected) is Literal:
        return f"[{'|'.join(str(choice) for choice in get_args(expected))}]"
    if get_origin(expected) is tuple:
        return "INT,INT,..."
    for kind, word in ((int, "INT"), (float, "NUMBER"), (str, "TEXT"), (Path, "FILE")):
        if expected is kind:
            return word
    if get_origin(expected) is Annotated:
        return _value(get_args(expected)[0])
    kinds = [_value(part) for part in get_args(expected) if part is not type(None)]
    return kinds[0] if len(kinds) == 1 else f"[{'|'.join(kind.strip('[]') for kind in kinds)}]"


def _default(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _parse(value: str | bool, expected: Any) -> Any:
    """Read a flag's text as its option's type wants it; validation comes after."""
    if isinstance(value, bool) or _admits_text(expected):
        return value
    if any(get_origin(part) is tuple for part in (expected, *get_args(expected))):
        value = f"[{value}]"
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value


def _admits_text(expected: Any) -> bool:
    if expected in (str, Path) or isinstance(expected, str):
        return True
    return any(_admits_text(part) for part in get_args(expected))


def _explain(fault: Any) -> str:
    name = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "value_error":  # of several options together
        return f"`{name}`: {fault['ctx']['error']}" if name else str(fault["ctx"]["error"])
    return f"`{name}` is {fault['input']!r}: {fault['msg'][:1].lower()}{fault['msg'][1:]}"
