"""full_fence: the memory fence between a store to shared memory and the load that must come after it.

Loaded once by each process that maps an arena: the CacheServer and every worker.
"""

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path

from cache_service.native.build import COMPILERS, NativeSources, built_library, default_cache_folder

_FENCE = NativeSources(name="fence", package="cache_service.native", sources=("fence.cpp",))


def load_full_fence(
    cache_folder: Path | None = None, compilers: Sequence[str] = COMPILERS
) -> Callable[[], object]:
    """Return the fence as a function, compiled on this machine's first use.

    Raises NativeBuildError where it cannot be compiled: leases are not safe without it.
    """
    library = built_library(_FENCE, cache_folder or default_cache_folder(), compilers)
    # PyDLL keeps the interpreter's lock: dropping and taking it would cost more than the fence.
    function = ctypes.PyDLL(str(library)).eyrie_full_fence
    function.argtypes = []
    function.restype = None
    fence: Callable[[], object] = function
    return fence
