"""CopyLane: takes one kind of moves through a stream of the device, a few batches in flight.

    queue -> checks -> copies enqueued, ENQUEUED -> ... the device copies ... -> checks -> over

`advance` never waits for the device; the mover's thread of this kind calls it, tests do so in any order.
What a copy may touch (the slot's lease, a bounce frame) is given back once its end mark is passed. No torch.
"""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy

from workers.engine.mechanisms import Mechanisms
from workers.kvcache.arena_part import ArenaPart, MoverError
from workers.kvcache.arena_pins import ArenaPins, Bounce
from workers.kvcache.copy_checks import CopyChecks
from workers.kvcache.copy_streams import Copy, CopyStreams
from workers.kvcache.move_queue import Mark, MoveQueue, Started
from workers.kvcache.moves import NO_FAULT, Fault, Move, MoveInjection
from workers.move_board import MoveStatus

logger = logging.getLogger(__name__)

MAX_BYTES_IN_FLIGHT = 64 << 20
"""A step that has to come after LOADs waits for so many bytes at most: 1.4 ms at 45 GB/s."""
BATCH_BYTES = 16 << 20
"""Checked and copied at once: the next batch is checked while this one is copied."""


class _Ready(NamedTuple):
    """A move whose copy is to be enqueued, through a bounce frame or directly."""

    started: Started
    frame: int | None

    @property
    def move(self) -> Move:
        return self.started.move


class _Flight(NamedTuple):
    """Moves whose copies are enqueued."""

    ready: list[_Ready]
    fault: Fault
    begin: Mark
    end: Mark
    host_s: float
    """Spent on checks before."""


class CopyLane:
    """One direction. `pins` tells the arena's pinned pieces, once there is an arena."""

    def __init__(
        self,
        checks: CopyChecks,
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
        self._taken: list[Started] = []  # from the queue, and neither in flight nor over
        self._flights: deque[_Flight] = deque()
        self._num_in_flight = 0
        self._num_flights = 0
        self._is_broken = False

    @property
    def oldest(self) -> Mark | None:
        """The mark that is passed first; None: nothing is in flight."""
        return self._flights[0].end if self._flights else None

    def advance(self) -> bool:
        """Take up copies that are over and enqueue a batch if there is room; False: there was nothing."""
        is_any = False
        while self._flights and self._is_passed(self._flights[0].end):
            self._finish(self._flights[0])
            self._flights.popleft()
            is_any = True
        room = self._max_in_flight - self._num_in_flight
        self._taken = self._queue.take(self.kind, min(room, self._max_batch)) if room > 0 else []
        if self._taken:
            is_any = self._begin(self._taken) or is_any
            self._taken = []
        return is_any

    def fail(self) -> None:
        """End all that has begun after the device, or the lane, has failed, and fail what comes.

        The device may still copy, so no lease is given back: it ends with the process, which does not outlive
        its device.
        """
        self._is_broken = True
        self._num_in_flight = 0
        begun = [ready.move for flight in self._flights for ready in flight.ready]
        begun += [started.move for started in self._taken]
        self._flights.clear()
        self._taken = []
        self._end_all([move for move in dict.fromkeys(begun) if not self._queue.status(move.number).is_over])

    def _is_passed(self, mark: Mark) -> bool:
        try:
            return mark.query()
        except RuntimeError:
            logger.exception("the device has failed", extra={"kind": self.kind})
            self.fail()
            return False

    def _begin(self, batch: list[Started]) -> bool:
        """Check a batch and enqueue its copies; False: all of it waits for bounce frames."""
        began_s = self._clock()
        fault = NO_FAULT
        if self._injection:
            fault = self._injection.fault(batch[0].move, self._arena.part)
            self._queue.pause(fault.delay_s)
        if fault.fails or self._is_broken or self._queue.is_closing or not self._is_there():
            self._end_all([started.move for started in batch])
            return True
        self._end_all([started.move for started in batch if not self._arena.has(started.move)])
        ready = self._with_frames([started for started in batch if self._arena.has(started.move)])
        if ready:
            ready = self._checked(ready, began_s)
            host_s = self._clock() - began_s
            if ready and (marks := self._copy(ready)) is not None:
                self._took_off(_Flight(ready, fault, *marks, host_s))
            return True
        return False

    def _is_there(self) -> bool:
        try:
            return self._arena.is_there()
        except MoverError:
            logger.exception("the arena is of other pages", extra={"kind": self.kind})
            return False

    def _with_frames(self, batch: list[Started]) -> list[_Ready]:
        """Give bounce frames to moves whose slots are not pinned; have those wait for which there is none."""
        ready: list[_Ready] = []
        for place, started in enumerate(batch):
            frame = None
            if self._pins().piece(started.move.slot) is None:
                frame = self._bounce.take()
                if frame is None:
                    self._taken = batch[:place]
                    self._queue.put_back(batch[place:])
                    break
            ready.append(_Ready(started, frame))
        return ready

    def _checked(self, ready: list[_Ready], began_s: float) -> list[_Ready]:
        """End moves that must not be copied; return the others."""
        statuses = self._checks.before([each.move for each in ready])
        kept: list[_Ready] = []
        for each, status in zip(ready, statuses, strict=True):
            if status is MoveStatus.ENQUEUED:
                kept.append(each)
            else:
                self._free_frame(each)
                self._queue.end(each.move, status, (self._clock() - began_s) / len(ready))
        return kept

    def _copy(self, ready: list[_Ready]) -> tuple[Mark, Mark] | None:
        """Enqueue copies and return the marks around them; None: it could not be, and the moves are over."""
        if self.kind == "load" and not self._mechanisms.enqueues_before_waits:
            self._queue.enqueued([each.move for each in ready])
        # The latest start: its mark is behind those of the others (I6).
        after = max(ready, key=lambda each: each.move.number).started.after
        try:
            if self.kind == "load":
                for each in ready:
                    if each.frame is not None:
                        numpy.copyto(self._bounce.frame(each.frame), self._arena.bundles[each.move.slot])
            copies = self._copies(ready)
            marks = self._streams.copy(self.kind, copies, after if self._mechanisms.fences_moves else None)
        except RuntimeError:
            logger.exception("copies could not be enqueued", extra={"kind": self.kind, "moves": len(ready)})
            self._give_up(ready)
            return None
        self._queue.stats.copied(self.kind, len(copies), sum(each.frame is not None for each in ready))
        return marks

    def _took_off(self, flight: _Flight) -> None:
        """Note enqueued copies, then tell: whoever waits for them waits for their end mark (I5)."""
        moves = [each.move for each in flight.ready]
        self._num_flights += 1
        self._num_in_flight += len(moves)
        self._flights.append(flight)
        if self.kind == "load" and self._mechanisms.enqueues_before_waits:
            self._queue.enqueued(moves, flight.end, self._num_flights)
        if not self._mechanisms.leases_whole_copies:
            self._checks.let_go(moves)
        if self._injection:
            self._queue.pause(flight.fault.copy_delay_s)
            if self._injection.during_copy is not None:
                self._injection.during_copy(moves[0])

    def _finish(self, flight: _Flight) -> None:
        """End moves whose copies are over."""
        began_s = self._clock()
        moves = [each.move for each in flight.ready]
        if self.kind == "save":
            for each in flight.ready:
                if each.frame is not None:
                    numpy.copyto(self._arena.bundles[each.move.slot], self._bounce.frame(each.frame))
        statuses = self._checks.after(moves)
        if self._mechanisms.leases_whole_copies:
            self._checks.let_go(moves)
        copy_s = self._streams.seconds(flight.begin, flight.end)
        seconds = flight.host_s + copy_s + self._clock() - began_s
        self._num_in_flight -= len(moves)
        for each, status in zip(flight.ready, statuses, strict=True):
            self._free_frame(each)
            if flight.fault.corrupts and status is MoveStatus.DONE:
                self._arena.flip_bit(each.move.slot)
        self._queue.end_all(list(zip(moves, statuses, strict=True)), seconds)

    def _give_up(self, ready: Sequence[_Ready]) -> None:
        """End moves whose copies could not be enqueued, once none of them can be under way."""
        try:
            self._streams.drain(self.kind)
        except RuntimeError:
            logger.exception("the device has failed", extra={"kind": self.kind})
            self._is_broken = True
        else:
            self._checks.let_go([each.move for each in ready])
            for each in ready:
                self._free_frame(each)
        self._end_all([each.move for each in ready])

    def _copies(self, ready: Sequence[_Ready]) -> list[Copy]:
        """Return one copy for each run of neighbours in pool and arena; none spans two pinned pieces."""
        copies: list[Copy] = []
        last_piece: int | None = None
        for page, address, piece in sorted(self._places(ready), key=lambda place: place[0]):
            if copies and piece is not None and piece == last_piece:
                first, num_pages, start = copies[-1]
                offset = num_pages * self._bundle_bytes
                if (page, address) == (first + num_pages, start + offset):
                    copies[-1] = Copy(first, num_pages + 1, start)
                    continue
            copies.append(Copy(page, 1, address))
            last_piece = piece
        return copies

    def _places(self, ready: Sequence[_Ready]) -> list[tuple[int, int, int | None]]:
        """Return each move's page, address in host memory and, unless it is bounced, pinned piece."""
        bundles = self._arena.bundles
        base, stride = bundles.ctypes.data, bundles.strides[0]
        return [
            (each.move.page, base + each.move.slot * stride, self._pins().piece(each.move.slot))
            if each.frame is None
            else (each.move.page, self._bounce.frame(each.frame).ctypes.data, None)
            for each in ready
        ]

    def _end_all(self, moves: Sequence[Move]) -> None:
        self._queue.end_all([(move, MoveStatus.FAILED_IO) for move in moves], 0.0)

    def _free_frame(self, ready: _Ready) -> None:
        if ready.frame is not None:
            self._bounce.give_back(ready.frame)
