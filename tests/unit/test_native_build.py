"""Building and loading the kernels: one OpenMP runtime, one compilation, clear errors."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from workers.native import build
from workers.native.build import COMPILERS, FLAGS, NativeBuildError, built_library
from workers.native.kernels import NativeKernels
from workers.native.self_check import check_kernels


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
from workers.native.build import built_library, default_cache_folder
from workers.native.kernels import NativeKernels
kernels = NativeKernels(built_library(default_cache_folder()))
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


def test_processes_that_ask_at_once_compile_once(tmp_path):
    code = (
        "from workers.native.build import built_library; from pathlib import Path; "
        f"print(built_library(Path({str(tmp_path)!r})))"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(2)]
    outputs = {process.communicate(timeout=100)[0] for process in processes}
    assert len(outputs) == 1
    [library] = tmp_path.glob("*.so")
    made = library.stat().st_mtime_ns
    assert built_library(tmp_path) == library
    assert library.stat().st_mtime_ns == made
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


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


PAIR_PRODUCTS = """
import sys, torch
from pathlib import Path
from workers.native.kernels import NativeKernels
from workers.native.self_check import check_kernels
kernels = NativeKernels(Path(sys.argv[1]))
check_kernels(kernels)
for n, k in ((192, 64), (100, 37), (33, 64)):
    weight = torch.randn(n, k).bfloat16()
    packed = kernels.pack_linear(weight)
    for rows in (*range(1, 15), 70):
        x = torch.randn(rows, k).bfloat16()
        exact = x.double() @ weight.double().T
        found = kernels.linear(x, packed, n, out_dtype=torch.float32)
        assert (found - exact).abs().max() < 1e-5 * exact.abs().max(), (n, k, rows)
        assert torch.equal(found[-1:], kernels.linear(x[-1:], packed, n, out_dtype=torch.float32))
"""


def test_the_path_of_cpus_with_bf16_products_computes_the_same(tmp_path):
    """Compiled with that path's instruction spelt out, since this CPU may lack it."""
    sources = Path(build.__file__).parent
    library = tmp_path / "pairs.so"
    files = [str(sources / name) for name in ("linear.cpp", "attention.cpp", "elementwise.cpp")]
    compiler = next(path for name in COMPILERS if (path := shutil.which(name)))
    command = [compiler, *FLAGS, "-DEYRIE_PAIR_PRODUCTS=1", *files, "-o", str(library)]
    subprocess.run(command, check=True, timeout=100)
    subprocess.run([sys.executable, "-c", PAIR_PRODUCTS, str(library)], check=True, timeout=100)


def test_a_library_that_computes_wrongly_is_refused():
    kernels = NativeKernels.load()
    rms_norm = kernels.rms_norm
    kernels.rms_norm = lambda x, weight, eps: rms_norm(x, weight, eps) * 1.02
    with pytest.raises(NativeBuildError, match=r"kernel rms_norm is off by 0\.02"):
        check_kernels(kernels)


WITHOUT_COMPILER = """
import logging, torch
logging.basicConfig(format="%(message)s %(reason)s")
from tests.unit.engine_plans import generate, tiny_engine
print(generate(tiny_engine(attention_backend="auto"), [[5, 9, 2]], 4))
print(generate(tiny_engine(attention_backend="reference"), [[5, 9, 2]], 4))
"""


def test_without_a_compiler_the_engine_says_so_and_computes_in_torch(tmp_path):
    environment = {**os.environ, "PATH": str(tmp_path), "HOME": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_COMPILER],
        env=environment,
        cwd=Path(build.__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    assert "found no C++ compiler; looked for g++" in run.stderr
    by_default, by_reference = run.stdout.splitlines()
    assert by_default == by_reference
