"""MooncakeClient: one membership in a Mooncake Store; its blocking calls, and what their answers mean.

Used by one thread at a time. A get that fails may write its buffers long after (0.3.13, seen over TCP): until
`close` has returned.
"""

from collections.abc import Sequence
from typing import Any

import numpy
from numpy.typing import NDArray

from cache_service.keys import PageKey
from cache_service.mooncake_library import (
    PEER_TO_PEER,
    MooncakeError,
    MooncakeOptions,
    address_of,
    load_store,
    probe,
)
from cache_service.remote import (
    MAX_DESCRIPTORS,
    RECORD_HEADER_BYTES,
    GetResult,
    GetStatus,
    PageBuffer,
    PageRecord,
    PutStatus,
    RecordLayout,
    RemoteStats,
    pack_header,
    read_header,
    verify,
)

MAX_RECORDS = MAX_DESCRIPTORS // 2
"""In one request: each has a header and its bytes."""
_BUFFER_BYTES = 16 << 20
_PROBE_S = 2.0

# Mooncake's answers (its ErrorCode); of a get, anything above 0 is a length.
_OK, _NO_SPACE, _BUFFER_TOO_SMALL, _NOT_READY, _NOT_FOUND, _EXISTS = 0, -200, -600, -703, -704, -705
_RPC_FAILED, _RPC_TIMED_OUT = -900, -901
_WORDS = {
    _NO_SPACE: "no room in the pool",
    _RPC_FAILED: "no connection to the master or to an owner",
    _RPC_TIMED_OUT: "no answer from the master or from an owner",
}
_NOTHING_SENT = (_BUFFER_TOO_SMALL, _NOT_READY, _NOT_FOUND, _RPC_FAILED, _RPC_TIMED_OUT)
"""Of a get: the buffers were never touched."""


class MooncakeClient:
    """Joins at the first `join`; other calls come after it. `memory` is where all pages lie."""

    def __init__(
        self,
        master: str,
        layout: RecordLayout,
        memory: memoryview,
        options: MooncakeOptions,
        stats: RemoteStats,
        segment_bytes: int = 0,
    ) -> None:
        self._master = master
        self._layout = layout
        self._memory = memory
        self._first_address = address_of(memory)
        self._options = options
        self._stats = stats
        self._segment_bytes = segment_bytes
        self._headers: NDArray[numpy.uint8] = numpy.zeros((MAX_RECORDS, RECORD_HEADER_BYTES), numpy.uint8)
        self._store: Any = None

    def join(self) -> None:
        """Join the store, unless it is done; raise MooncakeError. Takes 0.1 s, or as long as memory needs."""
        if self._store is not None:
            return
        module = load_store(self._options)
        probe(self._master, _PROBE_S)
        store = module.MooncakeDistributedStore()
        code = store.setup(
            self._options.node_address, PEER_TO_PEER, self._segment_bytes, _BUFFER_BYTES,
            self._options.protocol, self._options.rdma_devices, self._master,
        )  # fmt: skip
        buffers = (
            (self._first_address, self._memory.nbytes),
            (int(self._headers.ctypes.data), self._headers.nbytes),
        )
        for address, num_bytes in buffers:
            code = code or store.register_buffer(address, num_bytes)
        if code != _OK:
            store.close()
            raise MooncakeError(
                f"the Mooncake store behind {self._master} cannot be joined over {self._options.protocol}"
                f" (code {code}); look at its master's log, and for {self._segment_bytes} free bytes"
            )
        self._store = store

    def close(self) -> None:
        """Leave; what no call waits for any more ends as well. Takes 0.7 s, without a master 12 s."""
        if self._store is not None:
            self._store.close()
            self._store = None

    def put(self, pages: Sequence[PageRecord]) -> list[PutStatus]:
        """Put at most MAX_RECORDS pages."""
        names = self._names([page.key for page in pages])
        # A put of a key that is there answers like any other, so ask before.
        is_there = [code == 1 for code in self._store.batch_is_exist(names)]
        places = [place for place, found in enumerate(is_there) if not found]
        for row, place in enumerate(places):
            self._headers[row] = numpy.frombuffer(pack_header(self._layout, pages[place]), numpy.uint8)
        codes = self._store.batch_put_from_multi_buffers(
            [names[place] for place in places],
            [self._parts(row, pages[place].data) for row, place in enumerate(places)],
            [[RECORD_HEADER_BYTES, self._layout.slot_bytes]] * len(places),
        )
        statuses = [PutStatus.PRESENT] * len(pages)
        for place, code in zip(places, codes, strict=True):
            statuses[place] = self._put_status(code)
        return statuses

    def get(self, pages: Sequence[PageBuffer]) -> tuple[list[GetResult], bool]:
        """Get at most MAX_RECORDS pages, verified; False: the buffers may be written after this call."""
        names = self._names([page.key for page in pages])
        codes = self._store.batch_get_into_multi_buffers(
            names,
            [self._parts(row, page.data) for row, page in enumerate(pages)],
            [[RECORD_HEADER_BYTES, self._layout.slot_bytes]] * len(pages),
        )
        results = [
            self._get_result(row, page, name, code)
            for row, (page, name, code) in enumerate(zip(pages, names, codes, strict=True))
        ]
        useless = (GetStatus.CORRUPT, GetStatus.FOREIGN)
        bad = [name for name, result in zip(names, results, strict=True) if result.status in useless]
        if bad:  # under these names nobody else can want them, and the first value would stay for ever
            self._store.batch_remove(bad, True)
        is_quiet = all(
            code >= 0 or code in _NOTHING_SENT or result.status is GetStatus.CORRUPT
            for code, result in zip(codes, results, strict=True)
        )
        return results, is_quiet

    def _put_status(self, code: int) -> PutStatus:
        if code == _OK:
            return PutStatus.STORED
        if code == _EXISTS:
            return PutStatus.PRESENT
        self._stats.count_failure(f"put: {_words(code)}")
        return PutStatus.FULL if code == _NO_SPACE else PutStatus.FAILED

    def _get_result(self, row: int, page: PageBuffer, name: str, code: int) -> GetResult:
        record_bytes = RECORD_HEADER_BYTES + self._layout.slot_bytes
        if code == record_bytes:
            return verify(read_header(self._headers[row].data, self._layout, page.key), self._layout, page)
        if code in (_NOT_FOUND, _NOT_READY):
            return GetResult(GetStatus.MISSING)
        if code == _BUFFER_TOO_SMALL:  # longer than any record of ours
            return GetResult(GetStatus.FOREIGN)
        # A record that is too short fails like a broken wire, before anything is sent; its size alone tells.
        if code >= 0 or 0 < self._store.get_size(name) < record_bytes:
            return GetResult(GetStatus.CORRUPT)
        self._stats.count_failure(f"get: {_words(code)}")
        return GetResult(GetStatus.FAILED)

    def _names(self, keys: Sequence[PageKey]) -> list[str]:
        return [f"eyrie/{self._layout.name(key)}" for key in keys]

    def _parts(self, row: int, data: memoryview) -> list[int]:
        address = address_of(data)
        end = self._first_address + self._memory.nbytes
        assert self._first_address <= address <= end - data.nbytes, "a page outside the registered memory"
        return [int(self._headers.ctypes.data) + row * RECORD_HEADER_BYTES, address]


def _words(code: int) -> str:
    return f"{_WORDS[code]} ({code})" if code in _WORDS else f"Mooncake's error {code}"
