"""The rules of the design that no linter knows, and those it does know, held by `make test` as well."""

import ast
import re
import subprocess
import sys
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("cache_service", "cluster", "deploy", "workers")
MAX_LINES = 400
TORCH_FREE = (
    "cache_service",
    "cluster",
    "deploy",
    "workers.card",
    "workers.card_files",
    "workers.config",
    "workers.draft_card",
    "workers.draft_layouts",
    "workers.kvcache.arena_part",
    "workers.kvcache.arena_pins",
    "workers.kvcache.copy_checks",
    "workers.kvcache.copy_lane",
    "workers.kvcache.copy_streams",
    "workers.dump_record",
    "workers.kvcache.layout",
    "workers.kvcache.move_queue",
    "workers.board_memory",
    "workers.kvcache.arrivals",
    "workers.kvcache.fetch_costs",
    "workers.kvcache.fetch_stats",
    "workers.kvcache.host_cache",
    "workers.kvcache.host_tier",
    "workers.kvcache.manager",
    "workers.kvcache.moves",
    "workers.kvcache.page_pool",
    "workers.kvcache.prefetcher",
    "workers.kvcache.radix_cache",
    "workers.kvcache.rows",
    "workers.kvcache.tier_moves",
    "workers.kvcache.tier_stats",
    "workers.kvcache.waiting_saves",
    "workers.move_board",
    "workers.plan",
    "workers.protocol",
    "workers.scheduler",
    "workers.worker",  # its imports of torch code are inside functions
)
IMPORT_IN_TURN = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    assert "torch" not in sys.modules, f"importing {name} loads torch"
"""


def tracked_files(*suffixes):
    """Files of the repository, committed or about to be."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    files = [ROOT / name for name in listed if (ROOT / name).is_file()]
    return [file for file in files if not suffixes or file.suffix in suffixes]


def modules():
    """Dotted names of all modules of the four packages, parents first."""
    names = []
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return sorted(names)


def is_within(module, names):
    return any(module == name or module.startswith(f"{name}.") for name in names)


def test_torch_free_modules_load_without_torch():
    torch_free = [name for name in modules() if is_within(name, TORCH_FREE)]
    assert len(torch_free) > len(TORCH_FREE)
    result = subprocess.run(
        [sys.executable, "-c", IMPORT_IN_TURN, *torch_free],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr


def test_import_contracts_hold():
    result = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    "statement", ["import torch", "import workers.engine.engine", "import cluster.config"]
)
def test_import_contracts_can_fail(statement, tmp_path):
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            copy = tmp_path / file.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    (tmp_path / "cache_service" / "intruder.py").write_text(f"def late():\n    {statement}\n")
    result = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        env={"PYTHONPATH": str(tmp_path), "PATH": ""},
    )
    assert result.returncode == 1, result.stdout
    assert "cache_service.intruder" in result.stdout


def test_files_stay_under_400_lines():
    long = {
        str(file.relative_to(ROOT)): count
        for file in tracked_files(".py", ".cpp", ".h", ".cu", ".sh")
        if (count := len(file.read_text().splitlines())) >= MAX_LINES
    }
    assert not long, f"files of {MAX_LINES} lines or more, each has to become two: {long}"


def test_every_package_is_a_package_with_an_empty_init():
    for package in PACKAGES:
        for folder in {file.parent for file in (ROOT / package).rglob("*.py")}:
            init = folder / "__init__.py"
            assert init.is_file(), f"{folder} has no __init__.py: its modules would miss from the wheel"
            assert init.read_bytes() == b"", f"{init} is not empty"


def test_tests_are_no_packages_and_shadow_none():
    assert not list((ROOT / "tests").rglob("__init__.py"))
    folders = {path.name for path in (ROOT / "tests").rglob("*") if path.is_dir()}
    assert not folders & {*PACKAGES, "torch", "ray"}


def test_test_files_have_unique_names():
    names = [file.name for file in tracked_files(".py") if "tests" in file.parts]
    assert len(names) == len(set(names)), sorted(name for name in names if names.count(name) > 1)


def test_nothing_names_a_machine_or_defers_work():
    # Spelt so that this file does not find itself.
    forbidden = re.compile(
        "|".join(["/" + "work/", "/" + "root/", "/tmp/" + "eyrie/", "TO" + "DO", "FIX" + "ME", "X" * 3])
    )
    found = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()[:120]}"
        for file in tracked_files()
        if file.suffix not in {".json", ".png", ".svg"} and file.name != "LICENSE"
        for number, line in enumerate(file.read_text(errors="replace").splitlines(), start=1)
        if forbidden.search(line)
    ]
    assert not found, "\n".join(found)


def third_party_imports():
    """Pairs of a module of ours and the top-level name of a third-party package that it imports anywhere."""
    found = set()
    for name in modules():
        file = ROOT / Path(*name.split("."))
        file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {(name, alias.name.split(".")[0]) for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add((name, node.module.split(".")[0]))
    return {(name, top) for name, top in found if top not in sys.stdlib_module_names and top not in PACKAGES}


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def declared_dependencies():
    return {canonical(re.match(r"[\w.-]+", line)[0]) for line in requires("eyrie") if "extra ==" not in line}


def test_every_import_is_a_declared_dependency():
    distributions = packages_distributions()
    comes_with = {"pydantic_core": "pydantic"}
    optional = {"cuda", "flashinfer", "triton"}  # imported only where the option that needs it is chosen
    declared = declared_dependencies()
    undeclared = sorted(
        f"{module} imports {top}"
        for module, top in third_party_imports()
        if top not in optional
        and comes_with.get(top) not in declared
        and not declared & {canonical(name) for name in distributions.get(top, [])}
    )
    assert not undeclared, undeclared


def test_every_declared_dependency_is_imported():
    distributions = packages_distributions()
    imported = {canonical(name) for _, top in third_party_imports() for name in distributions.get(top, [])}
    found_by_uvicorn = {"httptools", "uvloop"}
    assert declared_dependencies() - imported - found_by_uvicorn == set()


def test_constraints_pin_exactly():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    loose = [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)]
    assert not loose, loose
    assert "torch==2.13.0" in lines
