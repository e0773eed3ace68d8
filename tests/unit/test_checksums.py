"""Many checksums at once are the ones that xxhash computes, from any number of threads."""

import threading
from pathlib import Path

import numpy
import pytest

from cache_service.arena_format import bundle_checksum, checksum_seed
from cache_service.native.build import COMPILERS, NativeBuildError
from cache_service.native.checksum import MIN_BYTES, Checksums
from tests.unit.arenas import key

LENGTHS = (241, 255, 256, 257, 1023, 1024, 1025, 1088, 2048, 4096, 65_536 + 192, 360 << 10)


def bundles(num: int, num_bytes: int, seed: int = 0):
    return numpy.random.default_rng(seed).integers(0, 256, (num, num_bytes), numpy.uint8)


def expected(made, names, rank: int) -> list[int]:
    return [bundle_checksum(row.data, name, rank) for row, name in zip(made, names, strict=True)]


def found(checksums: Checksums, made, names, rank: int) -> list[int]:
    base, stride = made.ctypes.data, made.strides[0]
    addresses = [base + place * stride for place in range(len(made))]
    seeds = [checksum_seed(name, rank) for name in names]
    return checksums.begin(addresses, made.shape[1], seeds).take()


@pytest.mark.parametrize("num_threads", [0, 3])
@pytest.mark.parametrize("num_bytes", LENGTHS)
def test_they_are_xxhash_s_own(num_bytes, num_threads) -> None:
    names = [key(number) for number in range(9)]
    checksums = Checksums(num_threads)
    for rank in range(2):
        made = bundles(9, num_bytes, rank)
        assert found(checksums, made, names, rank) == expected(made, names, rank)
    zeros = numpy.zeros((2, num_bytes), numpy.uint8)
    assert found(checksums, zeros, names[:2], 0) == expected(zeros, names[:2], 0)
    assert found(checksums, zeros[:0], [], 0) == []
    checksums.close()
    checksums.close()


def test_one_flipped_bit_anywhere_is_another_checksum() -> None:
    checksums, made = Checksums(0), bundles(1, 3000)
    (intact,) = found(checksums, made, [key(0)], 0)
    for place in range(0, 3000, 37):
        made[0, place] ^= 16
        assert found(checksums, made, [key(0)], 0) != [intact]
        made[0, place] ^= 16
    checksums.close()


def test_several_callers_share_the_threads() -> None:
    checksums, names = Checksums(2), [key(number) for number in range(16)]
    wrong = []

    def call(seed: int) -> None:
        made = bundles(16, 20_000, seed)
        wanted = expected(made, names, 0)
        for _ in range(100):
            if found(checksums, made, names, 0) != wanted:
                wrong.append(seed)

    callers = [threading.Thread(target=call, args=(seed,)) for seed in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert not wrong and not any(caller.is_alive() for caller in callers)
    checksums.close()


@pytest.mark.parametrize("num_threads", [0, 2])
def test_one_is_begun_while_another_is_under_way_and_nobody_has_to_ask(num_threads) -> None:
    checksums, names, made = (
        Checksums(num_threads),
        [key(0), key(1)],
        [bundles(2, 4096, seed) for seed in (1, 2)],
    )
    begun = []
    for each in made:
        addresses = [each.ctypes.data + place * 4096 for place in range(2)]
        begun.append(checksums.begin(addresses, 4096, [checksum_seed(name, 0) for name in names]))
    assert begun[1].synchronize() is None and begun[1].query(), "it waited, and they are not there"
    assert [each.take() for each in reversed(begun)] == [expected(each, names, 0) for each in reversed(made)]
    for _ in range(50):  # what nobody takes keeps nobody
        checksums.begin([made[0].ctypes.data], 4096, [0])
    checksums.close()


@pytest.mark.parametrize("flags", ["", "-mavx2"])
def test_every_instruction_set_computes_the_same(tmp_path, flags) -> None:
    """Compiled as on CPUs that know less than this one."""
    if flags and "avx2" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this CPU has no AVX2")
    compiler = tmp_path / "compiler"
    compiler.write_text(f"""#!/bin/bash\nexec {COMPILERS[0]} "${{@/-march=native/-O2}}" {flags}\n""")
    compiler.chmod(0o700)
    checksums, names = Checksums(1, tmp_path, compilers=[str(compiler)]), [key(number) for number in range(4)]
    for num_bytes in LENGTHS:
        made = bundles(4, num_bytes)
        assert found(checksums, made, names, 1) == expected(made, names, 1)
    checksums.close()


def test_what_is_too_short_is_a_bug_of_ours() -> None:
    checksums = Checksums(0)
    with pytest.raises(AssertionError, match=f"{MIN_BYTES} are the least"):
        found(checksums, bundles(1, 240), [key(0)], 0)
    checksums.close()


def test_without_a_compiler_it_says_so(tmp_path) -> None:
    with pytest.raises(NativeBuildError, match="install g\\+\\+ for the compiled checksum"):
        Checksums(1, tmp_path, compilers=["no-such-compiler"])
