"""The multi-turn workload with the real StepLoop, Scheduler and HostTier; device, copies and clock are fake.

Steps and copies take what they were measured to take on one H100, so what a policy of admission or eviction
changes can be seen without one: `python -m tests.bench.simulated_turns --json`.
"""

import argparse
import json
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from cache_service.keys import NamespaceDigest, PageKey
from cache_service.page_records import Entry, Grant, Location
from tests.bench.gpu_multiturn import FULL, Chats, Workload, chat_figures, steady_figures
from tests.bench.gpu_tiers import MAX_STEP_TOKENS
from workers.config import WorkerConfig
from workers.kvcache.host_tier import HostTier
from workers.kvcache.manager import KVCacheManager
from workers.move_board import MOVE_CAPACITY, MoveStatus
from workers.plan import BatchPlan, LoadPages, SavePages, StepOutput
from workers.protocol import Received, RequestId, RequestOutput
from workers.scheduler.scheduler import Scheduler
from workers.step_loop import StepLoop

PAGE_SIZE = 16
VOCAB_SIZE = 128_256
NEVER_S = float("inf")


@dataclass(frozen=True)
class Machine:
    """What steps and copies take: an H100 with the Llama-3-8B shape in bf16, measured on 2026-11-26."""

    decode_s: float = 0.0076
    mixed_s: float = 0.0045
    """Of a step that has prompts, beside what its tokens take."""
    token_s: float = 0.0000255
    page_bytes: int = 2 << 20
    load_gb_s: float = 20.0
    save_gb_s: float = 17.0
    commit_s: float = 0.002
    """Until a page that was saved can be found."""

    def step_s(self, plan: BatchPlan) -> float:
        if not plan.slots:
            return 0.0002
        if plan.mode == "decode":
            return self.decode_s
        return self.mixed_s + self.token_s * plan.num_tokens


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Copies:
    """MoveStatuses: one lane a direction, first come, first served."""

    capacity = MOVE_CAPACITY

    def __init__(self, machine: Machine, clock: Clock) -> None:
        self._machine = machine
        self._clock = clock
        self._ends_s: dict[int, float] = {}
        self._free_s = {"load": 0.0, "save": 0.0}
        self.num_pages = Counter[str]()
        self.queued_s = Counter[str]()

    def begin(self, op: LoadPages | SavePages, now_s: float) -> None:
        kind = "load" if isinstance(op, LoadPages) else "save"
        speed = self._machine.load_gb_s if kind == "load" else self._machine.save_gb_s
        end_s = max(self._free_s[kind], now_s)
        for move in range(op.first_move, op.first_move + len(op.pages)):
            end_s += self._machine.page_bytes / (speed * 1e9)
            self._ends_s[move] = end_s
            self.queued_s[kind] += end_s - now_s
        self.num_pages[kind] += len(op.pages)
        self._free_s[kind] = end_s

    def status(self, move: int) -> MoveStatus:
        return MoveStatus.DONE if self.is_over(move) else MoveStatus.PENDING

    def is_over(self, move: int) -> bool:
        return self._ends_s.get(move, NEVER_S) <= self._clock.now_s


class Arena:
    """HostCache with room for all; what is committed can be found a little later."""

    def __init__(self, machine: Machine, clock: Clock) -> None:
        self._machine = machine
        self._clock = clock
        self._stored: dict[PageKey, tuple[float, Location]] = {}
        self._num_slots = 0

    def locate(self, key: PageKey) -> Location | None:
        found = self._stored.get(key)
        return found[1] if found is not None and found[0] <= self._clock.now_s else None

    def acquire(self, keys: Sequence[PageKey], locations: Sequence[Location]) -> int:
        return len(keys)

    def release(self, slots: Iterable[int]) -> None:
        pass

    def take_grant(self) -> Grant | None:
        self._num_slots += 1
        return Grant(self._num_slots, 1)

    def commit(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            due_s = self._clock.now_s + self._machine.commit_s
            self._stored[entry.key] = (due_s, Location(entry.slot, entry.epoch + 1))

    def abort(self, grants: Sequence[Grant]) -> None:
        pass

    def touch(self, keys: Sequence[PageKey]) -> None:
        pass

    def report_corrupt(self, location: Location) -> None:
        raise AssertionError("nothing is corrupt here")

    def take_lost(self) -> list[PageKey]:
        return []


@dataclass
class Device:
    """StepEngine: a step takes its time after the one before; loads begin once it is launched."""

    machine: Machine
    clock: Clock
    copies: Copies
    steps: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._launched: deque[tuple[BatchPlan, float]] = deque()
        self._free_s = 0.0

    def launch(self, plan: BatchPlan) -> None:
        for op in plan.ops:
            if isinstance(op, LoadPages | SavePages):
                self.copies.begin(op, max(self.clock.now_s, self._free_s))
        duration_s = self.machine.step_s(plan)
        self._free_s = max(self.clock.now_s, self._free_s) + duration_s
        self._launched.append((plan, self._free_s))
        mode = plan.mode if plan.slots else "empty"
        self.steps[mode] += 1
        self.tokens[mode] += plan.num_tokens
        self.seconds[mode] += duration_s

    @property
    def has_ended(self) -> bool:
        return self._launched[0][1] <= self.clock.now_s

    def collect(self) -> StepOutput:
        plan, end_s = self._launched.popleft()
        self.clock.now_s = max(self.clock.now_s, end_s)
        num = len(plan.sampled)
        return StepOutput(plan.step, plan.relocation_version, [100] * num, [None] * num)


class Group:
    """PlanChannel and Board of a group of one."""

    size = 1

    def __init__(self) -> None:
        self._step = 0
        self.board = self

    def publish(self, count: int) -> None:
        self._step = count

    def minimum(self) -> int:
        return self._step


class Inbox:
    """StepInbox: waiting moves the clock."""

    def __init__(self, chats: Chats, clock: Clock) -> None:
        self.requests: list[RequestId] = []
        self._chats = chats
        self._clock = clock
        self.stop = lambda: None

    def drain(self, timeout_s: float) -> list[Received]:
        received = self._chats.ask(self._clock.now_s)
        if not received and timeout_s > 0:
            self._clock.now_s += min(timeout_s, self._chats.wait_s(self._clock.now_s) or timeout_s)
            received = self._chats.ask(self._clock.now_s)
        return received

    def publish(self, outputs: list[RequestOutput], **_: object) -> None:
        self._chats.take(outputs, self._clock.now_s)
        if self._chats.are_done:
            self.stop()


class Recorder:
    def stepped(self, plan: BatchPlan, duration_s: float) -> None:
        pass

    def loaded(self, load: object) -> None:
        pass


def simulate(workload: Workload, machine: Machine, options: dict[str, Any]) -> dict[str, float]:
    """Play the workload once and return its figures."""
    clock = Clock()
    defaults = {
        "max_running_requests": workload.max_in_flight + workload.num_steady,
        "max_waiting_requests": workload.num_chats,
        "max_tokens_per_step": MAX_STEP_TOKENS,
        "overlap_depth": 1,
    }
    config = WorkerConfig(**(defaults | options))
    cache = KVCacheManager(
        workload.device_tokens // PAGE_SIZE, PAGE_SIZE, NamespaceDigest(b"simulatedturns.."), incarnation=1
    )
    copies = Copies(machine, clock)
    tier: HostTier = cache.attach_tier(Arena(machine, clock), copies, config.write_policy)
    scheduler = Scheduler(
        config, cache, end_token_ids=[], max_context_len=8_192, vocab_size=VOCAB_SIZE, seeds=Random(0)
    )
    chats = Chats(workload, "chats", VOCAB_SIZE)
    device, group, inbox = Device(machine, clock, copies), Group(), Inbox(chats, clock)
    loop = StepLoop(
        scheduler,
        device,
        group,  # type: ignore[arg-type]
        inbox,
        Recorder(),
        cache.take_events,
        incarnation=1,
        clock=clock,
        depth=config.depth,
    )
    inbox.stop = loop.stop
    loop.run()
    assert chats.began_s is not None
    found = {"wall_s": chats.ended_s - chats.began_s, "chat_wall_s": chats.chats_ended_s - chats.began_s}
    found |= chat_figures(chats) | steady_figures(chats)
    for mode, count in sorted(device.steps.items()):
        found |= {f"{mode}_steps": count, f"{mode}_tokens_mean": device.tokens[mode] / count}
    for kind, count in copies.num_pages.items():
        found[f"{kind}_gb"] = count * machine.page_bytes / 1e9
        found[f"{kind}_wait_ms"] = 1000 * copies.queued_s[kind] / count
    found["preemptions"] = scheduler.stats.num_preemptions
    found["queue_mean_ms"] = 1000 * sum(scheduler.stats.queue_s) / max(1, len(scheduler.stats.queue_s))
    found["evictions"] = cache.stats().num_evictions
    found["failed_saves"] = sum(tier.stats.failed_saves.values())
    found["skipped_saves"] = sum(tier.stats.skipped_saves.values())
    found["lost_pages"] = tier.stats.num_lost_pages
    return {name: round(value, 4) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max-tokens-per-step", type=int, default=MAX_STEP_TOKENS)
    parser.add_argument("--itl-target-ms", type=float)
    parser.add_argument("--overlap-depth", type=int, default=1)
    parser.add_argument("--load-gb-s", type=float, default=Machine.load_gb_s)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    options = {
        "max_tokens_per_step": args.max_tokens_per_step,
        "itl_target_ms": args.itl_target_ms,
        "overlap_depth": args.overlap_depth,
    }
    figures = simulate(FULL, Machine(load_gb_s=args.load_gb_s), options)
    if args.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name:26} {value:10.2f}")


if __name__ == "__main__":
    main()
