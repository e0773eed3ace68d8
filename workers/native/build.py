"""Which sources make the workers' compiled kernels; cache_service.native.build compiles them.

Called before a process's first step.
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from cache_service.native.build import (
    COMPILERS,
    FLAGS,
    NativeBuildError,
    NativeSources,
    default_cache_folder,
)
from cache_service.native.build import built_library as built_native_library

__all__ = [
    "COMPILERS",
    "FLAGS",
    "NativeBuildError",
    "built_library",
    "default_cache_folder",
    "has_matrix_units",
]

_KERNELS = NativeSources(
    name="kernels",
    package="workers.native",
    sources=("linear.cpp", "attention.cpp", "elementwise.cpp"),
    headers=("simd.h", "threads.h", "attention_block.h"),
)


def built_library(cache_folder: Path, compilers: Sequence[str] = COMPILERS) -> Path:
    """Return the path of the kernels' library, compiled for this CPU unless the cache holds it.

    Raises NativeBuildError without a compiler that works, or without a folder to write to.
    """
    return built_native_library(_KERNELS, cache_folder, compilers)


def has_matrix_units() -> bool:
    """Tell whether this CPU multiplies bf16 matrices in hardware (AMX)."""
    with contextlib.suppress(OSError):
        return " amx_bf16" in Path("/proc/cpuinfo").read_text()
    return False
