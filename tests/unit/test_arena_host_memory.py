"""What memory there is: MemAvailable and both versions of cgroups, from files as the kernel writes them."""

import pytest

from cache_service.arena_format import ArenaSizeError
from cache_service.host_memory import HostMemory

MB = 1 << 20


def machine(root, cgroup, files):
    """A made-up proc and sys."""
    meminfo = "MemTotal:       2048000 kB\nMemAvailable:    1024000 kB\n"
    for name, text in {"proc/meminfo": meminfo, "proc/self/cgroup": cgroup, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return HostMemory.read(root, root)


def v2(limit, used, inactive=0):
    return {
        "memory.max": f"{limit}\n",
        "memory.current": f"{used}\n",
        "memory.stat": f"anon 5\ninactive_file {inactive}\n",
    }


def placed(folder, files):
    return {f"sys/fs/cgroup/{folder}{name}": text for name, text in files.items()}


def test_without_limits_the_machine_decides(tmp_path):
    memory = machine(tmp_path, "0::/\n", {})
    assert memory.available_bytes == 1_024_000 * 1024
    assert memory.cgroup_free_bytes is None
    assert memory.shared_memory_free_bytes > 0


def test_the_tightest_cgroup_of_version_2_counts_without_its_reclaimable_cache(tmp_path):
    files = placed("", v2("max", 9)) | placed("pod/", v2(500 * MB, 300 * MB, 100 * MB))
    files |= placed("pod/box/", v2("max", 90 * MB))
    memory = machine(tmp_path, "0::/pod/box\n", files)
    assert memory.cgroup_free_bytes == 300 * MB


def test_version_1_is_read_where_its_controller_is_mounted(tmp_path):
    files = {
        "sys/fs/cgroup/memory/box/memory.limit_in_bytes": f"{400 * MB}",
        "sys/fs/cgroup/memory/box/memory.usage_in_bytes": f"{150 * MB}",
        "sys/fs/cgroup/memory/box/memory.stat": f"total_inactive_file {50 * MB}\n",
    }
    memory = machine(tmp_path, "4:cpu,memory:/box\n1:cpuset:/\n0::/\n", files)
    assert memory.cgroup_free_bytes == 300 * MB


def test_a_container_that_sees_only_its_own_mount_finds_its_limit_there(tmp_path):
    memory = machine(tmp_path, "0::/kubepods/pod7/box\n", placed("", v2(200 * MB, 250 * MB)))
    assert memory.cgroup_free_bytes == 0


def test_an_arena_may_take_nine_tenths_of_what_is_free_and_all_of_the_folder(tmp_path):
    HostMemory(1000, 1000, 900).require(900, tmp_path)
    with pytest.raises(ArenaSizeError, match="of which it may take"):
        HostMemory(1000, None, 5000).require(901, tmp_path)
    with pytest.raises(ArenaSizeError, match="free space"):
        HostMemory(5000, None, 900).require(901, tmp_path)


def test_this_machine_can_be_read(tmp_path):
    memory = HostMemory.read(tmp_path)
    assert memory.available_bytes > 0
