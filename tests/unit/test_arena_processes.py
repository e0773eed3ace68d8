"""The proof that a process is dead: by pidfd, and never another process that has its pid."""

import signal
import subprocess
import sys
import time
from pathlib import Path

from cache_service.processes import ProcessId, ProcessWatch


def sleeper():
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])


def process_id(popen):
    return ProcessId.of(popen.pid)


def dead_within(watch, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if dead := watch.take_dead():
            return dead
        time.sleep(0.005)
    return []


def test_a_killed_process_is_reported_once():
    first, second = sleeper(), sleeper()
    watch = ProcessWatch()
    for popen in (first, second):
        watch.watch(process_id(popen))
        watch.watch(process_id(popen))
    killed = process_id(first)
    assert watch.take_dead() == []
    first.send_signal(signal.SIGKILL)
    assert dead_within(watch, 10) == [killed]
    assert not killed.is_alive(), "a process nobody has waited for is dead all the same"
    assert watch.take_dead() == []
    second.kill()
    assert len(dead_within(watch, 10)) == 1
    for popen in (first, second):
        popen.wait(10)


def test_a_process_that_has_anothers_pid_is_not_taken_for_it():
    me = ProcessId.current()
    former = ProcessId(me.pid, me.start_ticks - 1)
    assert me.is_alive()
    assert not former.is_alive()
    watch = ProcessWatch()
    watch.watch(me)
    watch.watch(former)
    assert watch.take_dead() == [former]
    assert watch.take_dead() == []
    watch.close()


def test_a_pid_without_a_process_is_dead():
    popen = sleeper()
    gone = process_id(popen)
    popen.kill()
    popen.wait(10)
    assert process_id(popen) is None
    watch = ProcessWatch()
    watch.watch(gone)
    watch.forget(gone)
    assert watch.take_dead() == []
    watch.watch(gone)
    assert watch.take_dead() == [gone]


def test_watching_leaves_no_descriptor_behind():
    def num_open():
        return sum(1 for _ in Path("/proc/self/fd").iterdir())

    before = num_open()
    watch = ProcessWatch()
    watch.watch(ProcessId.current())
    assert num_open() == before + 1
    watch.forget(ProcessId.current())
    watch.forget(ProcessId.current())
    assert num_open() == before
    watch.watch(ProcessId.current())
    watch.close()
    watch.close()
    assert num_open() == before


def test_a_name_with_spaces_and_parentheses_is_read(tmp_path):
    program = tmp_path / "a) (b S 1"
    program.symlink_to(sys.executable)
    popen = subprocess.Popen([program, "-c", "import time; time.sleep(60)"])
    me = process_id(popen)
    assert me.is_alive()
    popen.kill()
    popen.wait(10)
    assert not me.is_alive()
