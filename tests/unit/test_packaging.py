"""The wheel holds every module and file of a checkout; an editable install would hide what it lacks."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PACKAGES = ("cache_service", "cluster", "deploy", "workers")
IMPORT_ALL = """
import importlib, pkgutil, sys
from pathlib import Path
folder = Path(sys.argv[1])
sys.path.insert(0, str(folder))
count = 0
for package in sys.argv[2:]:
    module = importlib.import_module(package)
    assert Path(module.__file__).is_relative_to(folder), f"{package} came from {module.__file__}"
    for found in pkgutil.walk_packages(module.__path__, f"{package}."):
        if not found.name.endswith("__main__"):
            try:
                importlib.import_module(found.name)
            except ModuleNotFoundError as error:
                # Torch brings Triton where it is built for CUDA; only the kernels need it.
                assert error.name == "triton" and found.name.startswith("workers.triton_kernels."), error
        count += 1
print(count)
"""


def data_files():
    """What a checkout has beside Python in the four packages."""
    tracked = subprocess.run(
        ["git", "ls-files", *PACKAGES], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    return {name for name in tracked if not name.endswith(".py") and Path(name).name != "Dockerfile"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    for name in tracked:
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source)
    (built,) = folder.glob("eyrie-*.whl")
    return built


def pip(*arguments):
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr


def test_wheel_installs_and_every_module_imports_from_elsewhere(wheel, tmp_path):
    pip("install", "--no-deps", "--no-index", "--target", tmp_path / "site", wheel)
    result = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, str(tmp_path / "site"), *PACKAGES],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert result.returncode == 0, result.stderr
    num_modules = sum(1 for package in PACKAGES for _ in (ROOT / package).rglob("*.py")) - len(PACKAGES)
    assert int(result.stdout) == num_modules


def test_wheel_holds_data_files_and_the_console_script(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entry_points,) = [name for name in names if name.endswith("entry_points.txt")]
        script = archive.read(entry_points).decode()
    assert data_files() <= names
    assert "eyrie = cluster.__main__:main" in script
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == set(PACKAGES)
