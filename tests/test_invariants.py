"""docs/invariants.md is true: every invariant and every switch has a test that names the check it expects."""

import ast
import re
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import pytest

from cache_service.arena_safety import ArenaSafety
from cache_service.relocation_follower import FollowerSafety
from workers.engine.mechanisms import Mechanisms
from workers.kvcache.page_pool import Safety

TESTS = Path(__file__).parent
TABLE = TESTS.parent / "docs" / "invariants.md"
RECORDS = (ArenaSafety, FollowerSafety, Mechanisms, Safety)
INVARIANTS = {f"I{number}" for number in range(1, 12)}


class Mutation(NamedTuple):
    """A row of the table."""

    invariants: set[str]
    mechanism: str
    check: str
    file: Path
    test: str

    @property
    def switch(self) -> str | None:
        """`Record.field`, if the mechanism has one."""
        found = re.match(r"`(\w+\.\w+)`", self.mechanism)
        return found and found[1]


def mutations() -> list[Mutation]:
    found = []
    for line in TABLE.read_text().splitlines():
        if line.startswith("| I") and not line.startswith("| Invariant"):
            cells = [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            invariants, mechanism, check, test = cells
            file, _, name = test.strip("`").partition("::")
            names = set(re.findall(r"\bI\d+\b", invariants))
            found.append(Mutation(names, mechanism, check.strip("`"), TESTS / file, name))
    return found


MUTATIONS = mutations()


def test_every_invariant_has_a_mutation():
    assert set().union(*(mutation.invariants for mutation in MUTATIONS)) == INVARIANTS


def test_every_switch_has_a_mutation():
    switches = {f"{record.__name__}.{field.name}" for record in RECORDS for field in fields(record)}
    assert {mutation.switch for mutation in MUTATIONS if mutation.switch} == switches


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.mechanism.split(":")[0])
def test_the_test_is_there_and_says_what_the_table_says(mutation):
    text = mutation.file.read_text()
    tests = {node.name: node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
    assert mutation.test in tests
    test = tests[mutation.test]
    assert any(mutation.check in words for words in strings_of(test, text)), "no check has this name there"
    if mutation.switch:
        assert mutation.switch.partition(".")[2] in ast.unparse(test)


def strings_of(test, text):
    """Return the strings of a test and of its parameters as they are written, but for its docstring."""
    nodes = [node for statement in (*test.body, *test.decorator_list) for node in ast.walk(statement)]
    bare = {node.value for node in nodes if isinstance(node, ast.Expr)}
    return [
        ast.get_source_segment(text, node)
        for node in nodes
        if node not in bare
        and (
            isinstance(node, ast.JoinedStr)
            or (isinstance(node, ast.Constant) and isinstance(node.value, str))
        )
    ]


def test_every_file_of_mutations_is_in_the_table():
    files = set((TESTS / "property").glob("test_mutations_*.py"))
    assert files <= {mutation.file for mutation in MUTATIONS}
