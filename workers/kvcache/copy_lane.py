"""CopyLane: takes one kind of moves through a stream of the device, a few batches in flight at each stage.

    LOAD: queue -> leased, checksums begun -> copies enqueued, ENQUEUED -> ... the device copies ... -> over
    SAVE: queue -> copies enqueued -> ... the device copies ... -> checksums begun -> sealed, over

While one batch is copied, threads read the bytes of the next, or of the one before. `advance` waits for
neither; the mover's thread of this kind calls it, tests do so in any order. What a copy may touch (the slot's
lease, a bounce frame) is given back once its end mark is passed. No torch.
"""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import compress

import numpy
from numpy.typing import NDArray

from cache_service.native.checksum import Sums
from workers.engine.mechanisms import Mechanisms
from workers.kvcache.arena_part import ArenaPart, MoverError
from workers.kvcache.arena_pins import ArenaPins, Bounce
from workers.kvcache.copy_checks import LoadChecks, SaveChecks
from workers.kvcache.copy_streams import CopyStreams, copy_runs
from workers.kvcache.move_queue import Mark, MoveQueue, Started
from workers.kvcache.moves import NO_FAULT, Fault, Move, MoveInjection
from workers.move_board import MoveStatus

logger = logging.getLogger(__name__)

MAX_BYTES_IN_FLIGHT = 64 << 20
"""A step that has to come after LOADs waits for so many bytes at most: 1.4 ms at 45 GB/s. As many may be read
for their checksums beside them."""
BATCH_BYTES = 16 << 20
"""Checked and copied at once."""


@dataclass
class _Batch:
    """Moves on their way together."""

    moves: list[Move]
    frames: list[int | None]
    """Bounce frames, of the moves that need one."""
    after: Mark | None
    fault: Fault
    checks_s: float = 0.0
    """Spent on checks so far."""
    marks: tuple[Mark, Mark] | None = None
    """Around its copies."""
    sums: Sums | None = None
    """What is being read of it, since `read_since_s`."""
    read_since_s: float = 0.0

    def __len__(self) -> int:
        return len(self.moves)


class CopyLane:
    """One direction. `pins` tells the arena's pinned pieces, once there is an arena."""

    def __init__(
        self,
        checks: LoadChecks | SaveChecks,
        queue: MoveQueue,
        arena: ArenaPart,
        streams: CopyStreams,
        pins: Callable[[], ArenaPins],
        bounce: Bounce,
        bundle_bytes: int,
        *,
        mechanisms: Mechanisms,
        injection: MoveInjection | None,
        clock: Callable[[], float],
    ) -> None:
        self.kind = checks.kind
        self._checks = checks
        self._queue = queue
        self._arena = arena
        self._streams = streams
        self._pins = pins
        self._bounce = bounce
        self._bundle_bytes = bundle_bytes
        self._mechanisms = mechanisms
        self._injection = injection
        self._clock = clock
        # Faults are of single moves.
        self._max_batch = 1 if injection else max(1, BATCH_BYTES // bundle_bytes)
        self._max_in_flight = max(1, MAX_BYTES_IN_FLIGHT // bundle_bytes)
        self._taken: list[Started] = []  # from the queue, and in none of what follows
        self._read: deque[_Batch] = deque()  # LOADs before their copies, SAVEs after them
        self._copied: deque[_Batch] = deque()
        self._num_flights = 0
        self._checked_s = 0.0  # when the last checksums were there
        self._is_broken = False

    @property
    def num_in_flight(self) -> int:
        """Pages whose copies are enqueued and not known to be over."""
        return sum(map(len, self._copied))

    @property
    def oldest(self) -> Mark | Sums | None:
        """What is passed first, of what `advance` needs; None: nothing is in flight."""
        if self._read and (sums := self._read[0].sums) is not None and not (self._copied and sums.query()):
            return sums
        return _end(self._copied[0]) if self._copied else None

    def advance(self) -> bool:
        """Take each batch a stage further that can go; False: none could."""
        is_any = False
        while self._copied and self._is_passed(_end(self._copied[0])):
            self._landed(self._copied[0])
            self._copied.popleft()
            is_any = True
        if self.kind == "save":
            is_any = self._end_read() or is_any
        num_held = sum(map(len, self._read))
        room = self._max_in_flight - (num_held if self.kind == "load" else max(num_held, self.num_in_flight))
        self._taken = self._queue.take(self.kind, min(room, self._max_batch)) if room > 0 else []
        if self._taken:
            is_any = self._begin(self._taken) or is_any
            self._taken = []
        if self.kind == "load":
            is_any = self._copy_read() or is_any
        return is_any

    def fail(self) -> None:
        """End all that has begun after the device, or the lane, has failed, and fail what comes.

        The device may still copy, so no lease is given back: it ends with the process, which does not outlive
        its device.
        """
        self._is_broken = True
        begun = [move for batch in (*self._copied, *self._read) for move in batch.moves]
        begun += [started.move for started in self._taken]
        self._copied.clear()
        self._read.clear()
        self._taken = []
        self._end_all([move for move in dict.fromkeys(begun) if not self._queue.status(move.number).is_over])

    def _is_passed(self, mark: Mark) -> bool:
        try:
            return mark.query()
        except RuntimeError:
            logger.exception("the device has failed", extra={"kind": self.kind})
            self.fail()
            return False

    # From the queue.

    def _begin(self, started: list[Started]) -> bool:
        """Look what may be done of what was taken, and begin it; False: all of it waits for bounce frames."""
        began_s = self._clock()
        fault = NO_FAULT
        if self._injection:
            fault = self._injection.fault(started[0].move, self._arena.part)
            self._queue.pause(fault.delay_s)
        if fault.fails or self._is_broken or self._queue.is_closing or not self._is_there():
            self._end_all([each.move for each in started])
            return True
        there = [self._arena.has(each.move) for each in started]
        if not all(there):
            self._end_all([each.move for each, has in zip(started, there, strict=True) if not has])
            started = list(compress(started, there))
        frames = self._frames(started)
        if not frames:
            return False
        started = started[: len(frames)]
        # The latest start: its mark is behind those of the others (I6).
        after = max(started, key=lambda each: each.move.number).after
        batch = _Batch([each.move for each in started], frames, after, fault)
        statuses = self._checks.before(batch.moves)
        if not self._keep(batch, statuses, began_s):
            return True
        if self.kind == "save":
            batch.checks_s = self._clock() - began_s
            self._copy(batch)
        else:
            self._begin_to_read(batch, began_s)
        return True

    def _is_there(self) -> bool:
        try:
            return self._arena.is_there()
        except MoverError:
            logger.exception("the arena is of other pages", extra={"kind": self.kind})
            return False

    def _frames(self, started: list[Started]) -> list[int | None]:
        """Return bounce frames for moves whose slots are not pinned, until there is none: the rest waits."""
        pins, frames = self._pins(), []
        for place, each in enumerate(started):
            frame = None
            if pins.piece(each.move.slot) is None and (frame := self._bounce.take()) is None:
                self._taken = started[:place]
                self._queue.put_back(started[place:])
                break
            frames.append(frame)
        return frames

    def _keep(self, batch: _Batch, statuses: list[MoveStatus], began_s: float) -> bool:
        """End moves that must not be copied; tell whether any is left."""
        if any(status is not MoveStatus.ENQUEUED for status in statuses):
            share_s = (self._clock() - began_s) / len(batch)
            found = list(zip(batch.moves, batch.frames, statuses, strict=True))
            for move, frame, status in found:
                if status is not MoveStatus.ENQUEUED:
                    self._free_frames([frame])
                    self._queue.end(move, status, share_s)
            kept = [each for each in found if each[2] is MoveStatus.ENQUEUED]
            batch.moves, batch.frames = [each[0] for each in kept], [each[1] for each in kept]
        return len(batch) > 0

    # What is read for its checksums.

    def _begin_to_read(self, batch: _Batch, began_s: float) -> None:
        batch.sums = self._checks.begin_checksums(batch.moves)
        batch.read_since_s = self._clock()
        batch.checks_s += batch.read_since_s - began_s
        self._read.append(batch)

    def _taken_sums(self, batch: _Batch) -> list[int] | None:
        """Return the checksums of a batch that is read, None if it did not need to be; count the time."""
        sums, batch.sums = batch.sums, None
        if sums is None:
            return None
        found, now_s = sums.take(), self._clock()
        batch.checks_s += now_s - max(batch.read_since_s, self._checked_s)  # beside others it counts once
        self._checked_s = now_s
        return found

    def _copy_read(self) -> bool:
        """Enqueue copies of LOADs whose bytes are read, as far as there is room."""
        is_any = False
        while self._read and self.num_in_flight + len(self._read[0]) <= self._max_in_flight:
            batch = self._read[0]
            if batch.sums is not None and not batch.sums.query():
                break
            if (checksums := self._taken_sums(batch)) is not None:
                self._verify(batch, checksums)
            if len(batch):
                self._copy(batch)
            self._read.popleft()
            is_any = True
        return is_any

    def _verify(self, batch: _Batch, checksums: list[int]) -> None:
        assert isinstance(self._checks, LoadChecks), "a LOAD's"
        began_s = self._clock()
        statuses = self._checks.verified(batch.moves, checksums)
        bad = [status is not MoveStatus.ENQUEUED for status in statuses]
        self._checks.let_go(list(compress(batch.moves, bad)))
        self._keep(batch, statuses, began_s)
        batch.checks_s += self._clock() - began_s

    def _end_read(self) -> bool:
        """End SAVEs whose bytes are read."""
        is_any = False
        while self._read and (sums := self._read[0].sums) is not None and sums.query():
            self._finish(self._read[0])
            self._read.popleft()
            is_any = True
        return is_any

    # Copies.

    def _copy(self, batch: _Batch) -> None:
        """Enqueue copies, then tell: whoever waits for them waits for their end mark (I5)."""
        is_load, moves = self.kind == "load", batch.moves
        if is_load and not self._mechanisms.enqueues_before_waits:
            self._queue.enqueued(moves)
        try:
            if is_load:
                for frame, slot in self._bounced(batch):
                    numpy.copyto(frame, slot)
            copies = copy_runs(self._places(batch), self._bundle_bytes)
            batch.marks = self._streams.copy(
                self.kind, copies, batch.after if self._mechanisms.fences_moves else None
            )
        except RuntimeError:
            logger.exception("copies could not be enqueued", extra={"kind": self.kind, "moves": len(moves)})
            self._give_up(batch)
            return
        self._queue.stats.copied(self.kind, len(copies), sum(frame is not None for frame in batch.frames))
        self._num_flights += 1
        self._copied.append(batch)
        if is_load and self._mechanisms.enqueues_before_waits:
            self._queue.enqueued(moves, _end(batch), self._num_flights)
        if not self._mechanisms.leases_whole_copies:
            self._checks.let_go(batch.moves)
        if self._injection:
            self._queue.pause(batch.fault.copy_delay_s)
            if self._injection.during_copy is not None:
                self._injection.during_copy(moves[0])

    def _places(self, batch: _Batch) -> list[tuple[int, int, int | None]]:
        """Return each move's page, address in host memory and, unless it is bounced, pinned piece."""
        pins = self._pins()
        return [
            (move.page, address, pins.piece(move.slot))
            if frame is None
            else (move.page, self._bounce.frame(frame).ctypes.data, None)
            for move, address, frame in zip(
                batch.moves, self._arena.addresses(batch.moves), batch.frames, strict=True
            )
        ]

    def _give_up(self, batch: _Batch) -> None:
        """End moves whose copies could not be enqueued, once none of them can be under way."""
        try:
            self._streams.drain(self.kind)
        except RuntimeError:
            logger.exception("the device has failed", extra={"kind": self.kind})
            self._is_broken = True
        else:
            self._checks.let_go(batch.moves)
            self._free_frames(batch.frames)
        self._end_all(batch.moves)

    def _landed(self, batch: _Batch) -> None:
        """Go on with moves whose copies are over."""
        if self.kind == "load":
            self._finish(batch)
            return
        began_s = self._clock()
        for frame, slot in self._bounced(batch):
            numpy.copyto(slot, frame)
        self._begin_to_read(batch, began_s)

    def _finish(self, batch: _Batch) -> None:
        """End moves of which nothing is left to do."""
        checksums, began_s = self._taken_sums(batch), self._clock()
        statuses = self._checks.after(batch.moves, checksums)
        if self._mechanisms.leases_whole_copies:
            self._checks.let_go(batch.moves)
        self._free_frames(batch.frames)
        if batch.fault.corrupts and statuses[0] is MoveStatus.DONE:
            self._arena.flip_bit(batch.moves[0].slot)
        assert batch.marks is not None, "its copies were enqueued"
        seconds = batch.checks_s + self._streams.seconds(*batch.marks) + self._clock() - began_s
        self._queue.end_all(batch.moves, statuses, seconds)

    def _bounced(self, batch: _Batch) -> list[tuple[NDArray[numpy.uint8], NDArray[numpy.uint8]]]:
        """Return frame and slot of each move that is bounced."""
        return [
            (self._bounce.frame(frame), self._arena.bundles[move.slot])
            for frame, move in zip(batch.frames, batch.moves, strict=True)
            if frame is not None
        ]

    def _end_all(self, moves: Sequence[Move]) -> None:
        self._queue.end_all(moves, [MoveStatus.FAILED_IO] * len(moves), 0.0)

    def _free_frames(self, frames: Sequence[int | None]) -> None:
        for frame in frames:
            if frame is not None:
                self._bounce.give_back(frame)


def _end(batch: _Batch) -> Mark:
    assert batch.marks is not None, "its copies are enqueued"
    return batch.marks[1]
