"""Says in words what a field of a request's body may hold, from its declaration in cluster.api.schemas."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from functools import cache
from typing import Any

from pydantic import BaseModel

MAX_NAME_LEN = 64
"""Longer names are not compared with others: that takes time quadratic in their length."""


def allowed(schema: type[BaseModel], location: Sequence[int | str]) -> str:
    """Return what the field at `location` may hold, `an integer from 1 to 128`; "" if a validator says it."""
    root = _declared(schema)
    node = root
    for part in location:
        node = node["items"] if isinstance(part, int) else node["properties"][part]
        node = _resolved(node, root)
    return _words(node)


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Return the one of `names` that is meant by `name`: misspelt, or with a word too many."""
    if len(name) > MAX_NAME_LEN:
        return None
    name, known = name.lower().replace("-", "_"), sorted(names)
    words = set(name.split("_"))
    misspelt = get_close_matches(name, known, n=1, cutoff=0.85)
    wordy = [other for other in known if words.issuperset(other.split("_"))]
    meant = [*misspelt, *sorted(wordy, key=len, reverse=True), *get_close_matches(name, known, n=1)]
    return meant[0] if meant else None


@cache
def _declared(schema: type[BaseModel]) -> dict[str, Any]:
    return schema.model_json_schema()


def _resolved(node: dict[str, Any], root: dict[str, Any]) -> dict[str, Any]:
    """Follow a reference; of a field that may be null, take the rest (null is like leaving it out)."""
    kinds = [kind for kind in node.get("anyOf", ()) if kind.get("type") != "null"]
    if kinds:
        assert len(kinds) == 1, "fields that take several shapes have validators of their own"
        node = kinds[0]
    if "$ref" in node:
        resolved: dict[str, Any] = root["$defs"][node["$ref"].rpartition("/")[2]]
        return resolved
    return node


def _words(node: dict[str, Any]) -> str:
    if "enum" in node:
        return "one of " + ", ".join(f"'{choice}'" for choice in node["enum"])
    if "const" in node:
        return f"{node['const']}"
    match node.get("type"):
        case "integer":
            return f"an integer {_integers(node)}"
        case "number":
            return f"a number {_numbers(node)}"
        case "string":
            return "a string"
        case "boolean":
            return "true or false"
        case "null":
            return "null"
        case "array":
            return f"a list of {node['minItems']} to {node['maxItems']} objects"
        case "object":
            return f"an object with fields out of {', '.join(node['properties'])}"
        case _:
            return ""


def _integers(node: dict[str, Any]) -> str:
    least, most = node["minimum"], node.get("maximum", node.get("exclusiveMaximum", 0) - 1)
    return f"from {least} to {most}"


def _numbers(node: dict[str, Any]) -> str:
    if "exclusiveMinimum" in node:
        return f"above {node['exclusiveMinimum']}, at most {node['maximum']}"
    return f"from {node['minimum']} to {node['maximum']}"
