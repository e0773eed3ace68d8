"""Building and loading the kernels: one OpenMP runtime, one compilation, clear errors."""

import subprocess
import sys
from pathlib import Path

import pytest

from workers.native.build import NativeBuildError, built_library
from workers.native.kernels import NativeKernels


def run_python(code, timeout=100):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout, check=True
    ).stdout


def test_the_process_holds_one_openmp_runtime():
    mapped = run_python(
        "import torch; from workers.native.kernels import NativeKernels\n"
        "k = NativeKernels.load(); p = k.pack_linear(torch.zeros(64, 64, dtype=torch.bfloat16))\n"
        "k.linear(torch.zeros(9, 64), p, 64)\n"
        "print(open('/proc/self/maps').read())"
    )
    files = {line.split()[-1] for line in mapped.splitlines() if "libgomp" in line or "libomp" in line}
    assert len(files) == 1, files
    assert "kernels-" in mapped


COUNT_THREADS = """
import os, torch
torch.set_num_threads({num_threads})
from workers.native.kernels import NativeKernels
kernels = NativeKernels.load()
count = lambda: len(os.listdir("/proc/self/task"))
if {torch_first}:
    torch.zeros(1 << 22).exp()
before = count()
kernels.linear(torch.zeros(9, 640), torch.zeros(640 * 320, dtype=torch.int32), 640)
print(count() - before)
"""


@pytest.mark.parametrize(("num_threads", "torch_first", "more"), [(1, False, 0), (3, False, 2), (3, True, 0)])
def test_kernels_run_on_the_threads_torch_was_given(num_threads, torch_first, more):
    output = run_python(COUNT_THREADS.format(num_threads=num_threads, torch_first=torch_first))
    assert int(output) == more


def test_the_library_is_compiled_once(tmp_path):
    first = built_library(tmp_path)
    made = first.stat().st_mtime_ns
    assert built_library(tmp_path) == first
    assert first.stat().st_mtime_ns == made
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_two_processes_build_into_one_cache(tmp_path):
    code = (
        "from workers.native.build import built_library; from pathlib import Path; "
        f"print(built_library(Path({str(tmp_path)!r})))"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(2)]
    outputs = {process.communicate(timeout=100)[0] for process in processes}
    assert len(outputs) == 1
    assert len(list(tmp_path.glob("*.so"))) == 1


def test_no_compiler_is_a_clear_error(tmp_path):
    with pytest.raises(NativeBuildError, match=r"found no C\+\+ compiler; looked for no-such-compiler"):
        NativeKernels.load(tmp_path, compilers=["no-such-compiler"])


def test_a_compiler_that_fails_is_a_clear_error(tmp_path):
    compiler = tmp_path / "broken-compiler"
    compiler.write_text("#!/bin/sh\necho no vectors today >&2\nexit 3\n")
    compiler.chmod(0o755)
    with pytest.raises(NativeBuildError, match="failed with 3: no vectors today"):
        built_library(tmp_path / "cache", compilers=[str(compiler)])
    assert not list((tmp_path / "cache").glob("*.so"))


def test_a_cache_that_cannot_be_written_is_a_clear_error(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(NativeBuildError, match="make it writable"):
        built_library(Path(blocked))
