"""Compiles a package's C++ sources with the system's compiler and keeps the library for next time.

Called before a process's first use of compiled code. Several processes may ask at once: one compiles, the
rest wait.
"""

import contextlib
import fcntl
import hashlib
import logging
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

logger = logging.getLogger(__name__)

COMPILERS = ("g++", "c++", "clang++")
FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-shared",
)  # fmt: skip
BUILD_TIMEOUT_S = 300.0
"""The longest build takes ten seconds on a free core; start-up of several replicas at once may share few."""


class NativeBuildError(RuntimeError):
    """No library of the sources could be made here; the message says what to install or look at."""


@dataclass(frozen=True)
class NativeSources:
    """The C++ files of one library, all in one package's folder, and the library's name."""

    name: str
    package: str
    sources: tuple[str, ...]
    headers: tuple[str, ...] = ()


def default_cache_folder() -> Path:
    """Return the user's cache folder for compiled libraries."""
    return Path.home() / ".cache" / "eyrie" / "native"


def built_library(native: NativeSources, cache_folder: Path, compilers: Sequence[str] = COMPILERS) -> Path:
    """Return the path of the library, compiled for this CPU unless the cache holds it.

    Raises NativeBuildError without a compiler that works, or without a folder to write to.
    """
    compiler = next((path for name in compilers if (path := shutil.which(name))), None)
    if compiler is None:
        raise NativeBuildError(
            f"found no C++ compiler; looked for {', '.join(compilers)}; install g++ for the compiled"
            f" {native.name}"
        )
    folder = resources.files(native.package)
    texts = {name: folder.joinpath(name).read_bytes() for name in native.sources + native.headers}
    library = cache_folder / f"{native.name}-{_digest(texts, compiler)}.so"
    if library.exists():
        return library
    try:
        cache_folder.mkdir(parents=True, exist_ok=True)
        with _locked(cache_folder / "lock"):
            if not library.exists():
                _compile(texts, native.sources, compiler, library)
    except OSError as error:
        raise NativeBuildError(f"cannot build in {cache_folder}: {error}; make it writable") from error
    return library


def _digest(texts: dict[str, bytes], compiler: str) -> str:
    """Name a build by all it depends on: sources, flags, compiler and the CPU that `native` stands for."""
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, timeout=BUILD_TIMEOUT_S, check=False
    ).stdout
    parts = [*texts.values(), " ".join(FLAGS).encode(), version, _cpu_description().encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]


def _cpu_description() -> str:
    """Return architecture, model and instruction sets: a home folder may be shared by several machines."""
    wanted = ("model name", "flags", "Features", "CPU part")
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        return "\n".join([platform.machine(), *(line for line in lines if line.startswith(wanted))])
    return platform.machine() + platform.processor()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    # A compiler that hangs is killed after BUILD_TIMEOUT_S, which bounds this wait.
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _compile(texts: dict[str, bytes], sources: Sequence[str], compiler: str, library: Path) -> None:
    """Compile to a folder of our own and rename: whoever finds the library finds it whole.

    Linked without OpenMP: symbols of a library that uses it resolve to the runtime its process has loaded.
    """
    with tempfile.TemporaryDirectory(dir=library.parent) as name:
        build = Path(name)
        for file, text in texts.items():
            (build / file).write_bytes(text)
        command = [compiler, *FLAGS, *sources, "-o", library.name]
        try:
            run = subprocess.run(
                command, cwd=build, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise NativeBuildError(f"{compiler} took over {BUILD_TIMEOUT_S} s; see {command}") from error
        if run.returncode != 0:
            raise NativeBuildError(
                f"{compiler} failed with {run.returncode}: {run.stderr.strip()[-2000:]}; it must know C++17"
            )
        (build / library.name).replace(library)
    logger.info("compiled native code", extra={"library": str(library), "compiler": compiler})
