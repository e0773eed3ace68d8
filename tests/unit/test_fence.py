"""The fence of the lease protocol (I7): with it no slot is lost between three processes, without it some."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from cache_service.native.build import COMPILERS, NativeBuildError
from cache_service.native.fence import load_full_fence

LITMUS = Path(__file__).with_name("fence_litmus.cpp")
PARTY = """
import ctypes, mmap, sys
from pathlib import Path
from cache_service.native.fence import load_full_fence
litmus, board, party, rounds, fenced = sys.argv[1:]
library = ctypes.CDLL(litmus)
library.num_lost.restype = ctypes.c_uint64
with open(board, "r+b") as file:
    memory = mmap.mmap(file.fileno(), 0)
address = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(memory)))
fence = ctypes.cast(load_full_fence(), ctypes.c_void_p) if fenced == "fenced" else None
library.play(address, ctypes.c_uint64(int(party)), ctypes.c_uint64(int(rounds)), fence)
print(library.num_lost(address))
"""


@pytest.fixture(scope="module")
def litmus(tmp_path_factory):
    library = tmp_path_factory.mktemp("litmus") / "litmus.so"
    command = [COMPILERS[0], "-std=c++17", "-O2", "-fPIC", "-shared", LITMUS, "-o", library]
    subprocess.run(command, check=True, timeout=60)
    return library


def slots_lost(litmus, folder, rounds, fenced):
    functions = ctypes.CDLL(str(litmus))
    functions.board_bytes.restype = ctypes.c_uint64
    board = folder / f"board-{fenced}-{rounds}"
    board.write_bytes(bytes(functions.board_bytes()))
    parties = [
        subprocess.Popen(
            [sys.executable, "-c", PARTY, litmus, board, str(party), str(rounds), fenced],
            stdout=subprocess.PIPE,
        )
        for party in range(3)
    ]
    reported = [popen.communicate(timeout=60)[0] for popen in parties]
    return int(reported[0])


def check_that_no_slot_is_lost(litmus, folder, rounds, fenced):
    lost = slots_lost(litmus, folder, rounds, fenced)
    assert lost == 0, f"fence: {lost} slots are lost in {rounds} rounds"


def test_no_slot_is_lost_with_the_fence_and_some_are_without(litmus, tmp_path):
    rounds = 100
    with pytest.raises(AssertionError, match=r"fence: \d+ slots are lost"):
        while rounds <= 1_000_000:  # a machine that shows no reordering would prove nothing with the fence
            rounds *= 4
            check_that_no_slot_is_lost(litmus, tmp_path, rounds, "bare")
    check_that_no_slot_is_lost(litmus, tmp_path, 2 * rounds, "fenced")


def test_without_a_compiler_there_is_no_fence_and_a_clear_error(tmp_path):
    with pytest.raises(NativeBuildError, match=r"install g\+\+ for the compiled fence"):
        load_full_fence(tmp_path, compilers=["no-such-compiler"])
