"""An owner of relocations for tests: a log, an index and a publisher, served by one thread."""

import os
import threading
import time

import zmq

from cache_service.gate import Gate
from cache_service.publisher import Publisher
from cache_service.relocation import Changes, RelocationLog, Snapshot, Version
from cache_service.relocation_records import Change, Stored


class RelocationOwner:
    """`answers` False lets every question time out."""

    def __init__(
        self, cluster_secret: bytes, *, incarnation: int, port: int | None = None, heartbeat_s: float = 0.05
    ) -> None:
        self.log = RelocationLog(incarnation, max_changes=64)
        self.stored: dict[bytes, Stored] = {}
        self.answers = True
        self.num_questions = 0
        self.gate = Gate(cluster_secret)
        self.publisher = Publisher(
            self.gate, "127.0.0.1", self.log, now_s=time.monotonic(), port=port, heartbeat_s=heartbeat_s
        )
        self.lock = threading.Lock()
        self.broadcasts = threading.Event()
        self.broadcasts.set()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self._closing = False
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self.publisher.endpoint.rpartition(":")[2])

    def change(self, *changes: Change) -> Version:
        with self.lock:
            for change in changes:
                self.log.append(change)
                if isinstance(change, Stored):
                    self.stored[change.key] = change
                else:
                    del self.stored[change.key]
            version = self.log.version
        os.eventfd_write(self._wake_fd, 1)
        return version

    def resync(self, version: Version | None) -> Changes | Snapshot | None:
        with self.lock:
            self.num_questions += 1
            return self.log.resync(version, self.stored.values()) if self.answers else None

    def close(self) -> None:
        self._closing = True
        os.eventfd_write(self._wake_fd, 1)
        self._thread.join(5)
        os.close(self._wake_fd)

    def _serve(self) -> None:
        poller = zmq.Poller()
        poller.register(self._wake_fd, zmq.POLLIN)
        poller.register(self.gate.admissions, zmq.POLLIN)
        while not self._closing:
            ready = dict(poller.poll(10))
            self.gate.admit()
            if self._wake_fd in ready:
                os.eventfd_read(self._wake_fd)
            if self.broadcasts.is_set():
                with self.lock:
                    self.publisher.flush(time.monotonic())
        self.publisher.close()
        self.gate.close()


def wait_until(holds, timeout_s=10.0):
    """Return whether `holds()` became true in time."""
    end_s = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > end_s:
            return False
        time.sleep(0.002)
    return True
