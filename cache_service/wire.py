"""Wire: this node's Transfer: opened, the arena registered with it, closed before the arena goes.

An ArenaUser of the CacheServer's thread. Registering pins memory over RDMA, which takes a second for some
GB: a thread of its own does it, and until then the node neither lends nor fetches from peers.
"""

import functools
import logging
import threading
from collections.abc import Callable

from cache_service.arena_user import ArenaAccess
from cache_service.inbox import Inbox
from cache_service.transfer import Transfer, TransferError

logger = logging.getLogger(__name__)

OpenTransfer = Callable[[], Transfer]
"""Raises TransferError."""
_END_S = 2.0


class Wire:
    """Raises TransferError where the first transfer cannot be opened."""

    def __init__(self, open_transfer: OpenTransfer, inbox: Inbox) -> None:
        self._open_transfer = open_transfer
        self._inbox = inbox
        self._transfer: Transfer | None = open_transfer()
        self._address: int | None = None
        self._thread: threading.Thread | None = None
        self._hanging: list[Transfer] = []
        """Their reads may go on: they keep the memory mapped."""

    @property
    def transfer(self) -> Transfer | None:
        """The transfer, once the arena is registered with it."""
        return None if self._address is None else self._transfer

    @property
    def address(self) -> int:
        """Return the address of the arena's first slot, while there is a `transfer`."""
        assert self._address is not None
        return self._address

    def begin(self, access: ArenaAccess) -> None:
        """See ArenaUser."""
        memory = access.arena.pages()

        def register() -> None:
            transfer, address = self._transfer, None
            try:
                transfer = transfer or self._open_transfer()
                address = transfer.register(memory)
            except TransferError as error:
                logger.error("this node exchanges no pages with peers", extra={"reason": str(error)})
            if transfer is not None:
                self._inbox.put(functools.partial(self._registered, thread, transfer, address))

        self._thread = thread = threading.Thread(target=register, name="register-arena", daemon=True)
        thread.start()

    def end(self) -> bool:
        """See ArenaUser."""
        thread, self._thread, self._address = self._thread, None, None
        if thread is not None:
            thread.join(_END_S)
            if thread.is_alive():
                self._give_up()
                return False
        return self.close() and not self._hanging

    def close(self) -> bool:
        """Close the transfer, if it is open; False where a read hangs: the memory then stays mapped."""
        if self._transfer is not None and not self._transfer.close(_END_S):
            self._give_up()
            return False
        self._transfer = None
        return True

    def _give_up(self) -> None:
        if self._transfer is not None:
            self._hanging.append(self._transfer)
            self._transfer = None

    def _registered(self, thread: threading.Thread, transfer: Transfer, address: int | None) -> None:
        if thread is self._thread:
            self._transfer, self._address = transfer, address
        elif transfer not in self._hanging and not transfer.close(0.0):  # its arena is gone
            self._hanging.append(transfer)
