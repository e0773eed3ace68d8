"""What is drilled on real ranks, over gloo in test_rank_drills and over NCCL in test_drills_on_cuda."""

import signal
import time

from tests.drills import Drill, Told
from tests.rank_processes import FAILED_EXIT_CODE, RankFaults, RankProcesses
from workers.kvcache.moves import MoveInjection


def check_late_moves_and_completions(drill: Drill, num_requests: int, late: int) -> None:
    """One rank's LOADs, SAVEs and completions are late at random: answers are what they are without."""
    injection = MoveInjection(5, max_delay_s=0.004, reorder_window=4)
    group = drill.start({late: RankFaults(injection, max_completion_delay_s=0.02)})
    told = drill.play(f"late-{late}", num_requests)
    check_answers(told)
    assert told.lost_after_s is None and not told.endings
    assert not group.endings(drill.ranks, time.monotonic(), 0.1), "the group serves on"


def check_refusal(drill: Drill, num_requests: int, refuses: int) -> None:
    """One rank's relocation version differs: it refuses the plan, whose collectives the others are inside."""

    def befalls(group: RankProcesses) -> list[int]:
        group.lose_an_op(refuses)
        return drill.ranks

    told = drill.play(f"refused-{refuses}", num_requests, befalls, after_tokens=60)
    assert "RelocationVersionError" in str(told.endings[refuses].error)
    check_recovery(drill, told, drill.ranks)


def check_killed_rank(drill: Drill, num_requests: int, killed: int) -> None:
    """A rank is killed while steps are replayed."""

    others = [rank for rank in drill.ranks if rank != killed]

    def befalls(group: RankProcesses) -> list[int]:
        group.kill(killed)
        return others

    told = drill.play(f"killed-{killed}", num_requests, befalls, after_tokens=60)
    check_recovery(drill, told, others)


def check_hanging_rank(drill: Drill, num_requests: int, hangs: int) -> None:
    """A rank stops, alive: the others wait for it inside a collective, up to their deadline."""
    others = [rank for rank in drill.ranks if rank != hangs]

    def befalls(group: RankProcesses) -> list[int]:
        group.hang(hangs)
        return others

    told = drill.play(f"hangs-{hangs}", num_requests, befalls, after_tokens=60)
    check_recovery(drill, told, others)


def check_recovery(drill: Drill, told: Told, ended: list[int]) -> None:
    """Ranks that were left ended by themselves, in time, with an error; the next group answered the rest."""
    assert sorted(told.endings) == ended, f"after {drill.deadline_s} s ended: {told.endings}"
    # NCCL's own thread may have been first to end a process whose device had failed.
    assert all(ending.code in (FAILED_EXIT_CODE, -signal.SIGABRT) for ending in told.endings.values()), told
    assert told.lost_after_s is not None and told.lost_after_s < drill.deadline_s, told.lost_after_s
    assert told.num_tokens_before >= 60
    check_answers(told)


def check_answers(told: Told) -> None:
    assert told.finished <= {"length", "stop", "abort"}, told.finished
    assert not told.verdict.wrong, "\n".join(map(str, told.verdict.wrong))
    assert told.verdict.num_tokens > 100
