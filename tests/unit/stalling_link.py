"""A TCP link that can be cut as a network is: nothing arrives any more, and neither end is told."""

import contextlib
import socket
import threading

from tests.unit.cache_nodes import TIMEOUT_S, port_of

_CHUNK_BYTES = 1 << 16


class StallingLink:
    """Leads from `endpoint`, its own, to another; `is_up` set: bytes pass. What arrives meanwhile waits."""

    def __init__(self, target):
        self._target = ("127.0.0.1", port_of(target))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self.is_up = threading.Event()
        self.is_up.set()
        self._sockets = [self._listener]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def cut(self):
        self.is_up.clear()

    def mend(self):
        """Carry bytes again, on old connections too."""
        self.is_up.set()

    def close(self):
        self.mend()
        for end in self._sockets:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        for thread in self._threads:
            thread.join(TIMEOUT_S)
            assert not thread.is_alive()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
                self._sockets += [near, far]
                for source, sink in ((near, far), (far, near)):
                    thread = threading.Thread(target=self._carry, args=(source, sink), daemon=True)
                    self._threads.append(thread)
                    thread.start()

    def _carry(self, source, sink):
        with contextlib.suppress(OSError):
            while data := source.recv(_CHUNK_BYTES):
                self.is_up.wait()
                sink.sendall(data)
            self.is_up.wait()  # nor does an end arrive
            sink.shutdown(socket.SHUT_WR)
