"""A device's streams on a CPU: lists of operations that run when a test, or who waits for them, says so."""

import ctypes
import threading
import time
from collections import deque

import numpy

from workers.kvcache.cuda_page_mover import CudaPageMover

KINDS = ("load", "save")


class FakeMark:
    """An event. One that is not recorded yet holds nobody up, as on CUDA."""

    def __init__(self, streams) -> None:
        self._streams = streams
        self.is_recorded = False
        self.is_passed = False

    def query(self) -> bool:
        self._streams.fail_if_asked()
        return self.is_passed

    def synchronize(self) -> None:
        self._streams.fail_if_asked()
        time.sleep(self._streams.delay_s)
        while not self.is_passed and not self._streams.flows.wait(0.001):
            self._streams.fail_if_asked()
        self._streams.run_until(self)


class FakeStreams:
    """CopyStreams over a CPU's pool. Copies run page by page, in halves, when `step` or a wait takes them.

    The compute stream has operations too (`compute`), or, `is_inline`, is the test itself: what that computes
    is done when it returns, and its waits run what they wait for, no more. Threads of a mover that wait for a
    mark run the streams, unless `flows` is cleared: then a step's wait alone hurries the device.
    """

    def __init__(self, pool, is_inline: bool = True) -> None:
        self._base = pool.data.data_ptr()
        self._bundle_bytes = pool.layout.bundle_bytes
        self._is_inline = is_inline
        self._lock = threading.RLock()
        self.ops = {kind: deque() for kind in (*KINDS, "compute")}
        self.before_copy = lambda kind, page, address: None
        self.delay_s = 0.0
        """How long the device takes for what a thread waits for."""
        self.flows = threading.Event()
        self.flows.set()
        self.num_copies = 0
        self.num_compute_waits = 0
        self.has_failed = False
        self.fails_next_copy = False

    # CopyStreams.

    def mark(self) -> FakeMark:
        return self._recorded("compute") if not self._is_inline else self._passed()

    def wait(self, mark: FakeMark) -> None:
        self.num_compute_waits += 1
        if self._is_inline:
            self.run_until(mark)
        elif mark.is_recorded:
            self._push("compute", mark)

    def copy(self, kind, copies, after):
        with self._lock:
            if self.fails_next_copy:
                self.fails_next_copy = False
                raise RuntimeError("a copy that CUDA refuses")
            self.fail_if_asked()
            if after is not None:
                assert after.is_recorded, "a wait for a mark that is not recorded is none"
                self._push(kind, after)
            begin = self._recorded(kind)
            self.num_copies += len(copies)
            for first, num_pages, address in copies:
                for place in range(num_pages):
                    self._push_page(kind, first + place, address + place * self._bundle_bytes)
            return begin, self._recorded(kind)

    def seconds(self, begin, end) -> float:
        assert begin.is_passed and end.is_passed
        return 0.0

    def drain(self, kind) -> None:
        self.fail_if_asked()
        while self.ops[kind]:
            assert any(self.step(each) for each in (kind, "compute", *KINDS)), "the streams wait in a circle"

    def enter_thread(self) -> None:
        pass

    # The test.

    def compute(self, op) -> None:
        """Enqueue a step's work."""
        self._push("compute", op)

    def step(self, stream) -> bool:
        """Run a stream's next operation; False: there is none, or it waits."""
        with self._lock:
            ops = self.ops[stream]
            if not ops or (isinstance(ops[0], FakeMark) and not ops[0].is_passed):
                return False
            op = ops.popleft()
            if not isinstance(op, FakeMark):
                op()
            return True

    def run_until(self, mark) -> None:
        """Run what a mark needs."""
        with self._lock:
            while mark.is_recorded and not mark.is_passed:
                assert any(self.step(stream) for stream in (*KINDS, "compute")), "the mark is never passed"

    def fail_if_asked(self) -> None:
        if self.has_failed:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def _passed(self) -> FakeMark:
        mark = FakeMark(self)
        mark.is_recorded = mark.is_passed = True
        return mark

    def _recorded(self, stream) -> FakeMark:
        mark = FakeMark(self)
        mark.is_recorded = True
        self._push(stream, lambda: setattr(mark, "is_passed", True))
        return mark

    def _push(self, stream, op) -> None:
        with self._lock:
            self.ops[stream].append(op)

    def _push_page(self, kind, page, address) -> None:
        device, half = self._base + page * self._bundle_bytes, self._bundle_bytes // 2
        for offset in (0, half):

            def move(offset=offset) -> None:
                self.before_copy(kind, page, address)
                target, source = (device, address) if kind == "load" else (address, device)
                ctypes.memmove(target + offset, source + offset, half)

            self._push(kind, move)


class FakePinning:
    """HostPinning that refuses after `max_pieces`."""

    def __init__(self, max_pieces: int = 1 << 30) -> None:
        self.max_pieces = max_pieces
        self.pinned_at: dict[int, int] = {}
        self.num_buffers = 0

    def pin(self, address: int, num_bytes: int) -> None:
        if len(self.pinned_at) >= self.max_pieces:
            raise RuntimeError("no memory is left to be pinned")
        for start, length in self.pinned_at.items():
            assert address + num_bytes <= start or start + length <= address, "a byte is pinned twice"
        self.pinned_at[address] = num_bytes

    def unpin(self, address: int) -> None:
        del self.pinned_at[address]

    def pinned(self, num_bytes: int):
        self.num_buffers += 1
        return numpy.zeros(num_bytes, numpy.uint8)

    def holds(self, address: int, num_bytes: int) -> bool:
        """Tell whether a run of bytes lies within one pinned piece."""
        return any(
            start <= address and address + num_bytes <= start + length
            for start, length in self.pinned_at.items()
        )


class FakeCuda:
    """Makes movers over fakes: the device's `streams` and `pinning` of the last one."""

    def __init__(
        self, is_inline: bool = True, pinning: FakePinning | None = None, delay_s: float = 0.0
    ) -> None:
        self._is_inline = is_inline
        self._delay_s = delay_s
        self._pinning = pinning

    def __call__(self, pool, mapped, part, board, **options) -> CudaPageMover:
        self.streams = FakeStreams(pool, self._is_inline)
        self.streams.delay_s = self._delay_s
        self.pinning = self._pinning or FakePinning()
        return CudaPageMover(
            pool,
            mapped,
            part,
            board,
            streams=self.streams,
            pinning=self.pinning,
            **{"num_threads": 0, **options},
        )
