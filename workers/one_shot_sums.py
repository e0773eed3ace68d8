"""OneShotSums: small sums over the ranks of one machine by a kernel of ours, each one trip over the link.

Made by TPGroup for CUDA ranks that map each other's memory, used in the engine's thread; TPGroup takes NCCL
for the rest. A sum may be captured; every replay is one more.
"""

import ctypes
import logging
from datetime import timedelta
from typing import Any, Protocol, Self

import torch
from torch._C._distributed_c10d import TCPStore

from workers.triton_kernels.choice import dependent_launch

logger = logging.getLogger(__name__)

MAX_SENT_BYTES = 2 << 20
"""Of a part, to all peers together; what is larger NCCL sums. TP=2: 256 rows of 4,096 in bfloat16."""
_MAX_ROWS = 256
_MAX_WORDS = 4096
"""Of a row: of 8,192 elements of 2 bytes."""


_WORDS: list[torch.Tensor] = []
"""Kernels may look at them to the end of the process, as at the inboxes: a group may be left before."""


class RankSums(Protocol):
    """What OneShotSums is to layers and samplers: sums that all ranks make together, in one order."""

    def takes(self, part: torch.Tensor) -> bool:
        """Tell whether parts [rows, size] of this shape and dtype, equal on every rank, are for it."""
        ...

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        """Return the sum of all ranks' `part` [rows, size], contiguous; a fresh tensor."""
        ...

    def sum_add_rms_norm(
        self, x: torch.Tensor, part: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return x + the sum of all ranks' `part`, and that normalised (see LayerKernels.add_rms_norm)."""
        ...

    def takes_keys(self, keys: torch.Tensor) -> bool:
        """Tell whether `best_ids` can be asked of so many keys."""
        ...

    def best_ids(self, keys: torch.Tensor) -> torch.Tensor:
        """Return the token ids in the largest of all ranks' `keys` (see vocabulary_shard.keys_of), [rows]
        int64 each."""
        ...

    def end(self) -> None:
        """Wait for no part any more: sums come out wrong from now on, and at once. Any thread may call it."""


class OneShotSums:
    """See RankSums. Its memory is the process's to the end: peers have it mapped, and may outlive the group.

    Who waits for a part waits until `end`, which TPGroup's watch calls when a peer is gone or a step takes
    too long. Should nobody, a kernel ends with an error after twice `timeout_s`, and with it all use that the
    process has of the device: nobody waits for a dead peer for ever.
    """

    def __init__(self, rank: int, inboxes: list[int], timeout_s: float) -> None:
        """`inboxes`: see OneShotMemory; on the current device, which is the rank's."""
        from workers.triton_kernels import one_shot  # imports Triton

        self._kernels = one_shot
        device = torch.device("cuda", torch.cuda.current_device())
        is_over = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        _WORDS.append(is_over)
        self._memory = one_shot.OneShotMemory(
            rank,
            tuple(inboxes),
            torch.zeros(_MAX_ROWS, dtype=torch.int32, device=device),
            _MAX_WORDS,
            is_over,
            torch.zeros(1, dtype=torch.int32, device=device),
            timeout_s=2 * timeout_s,
        )
        self._num_peers = len(inboxes) - 1
        self._pdl = dependent_launch(device)

    @classmethod
    def connect(cls, store: TCPStore, rank: int, size: int, timeout_s: float) -> Self | None:
        """Map the peers' inboxes; all ranks call it together. None on all of them where it fails on any."""
        sums: Self | None = None
        own = ""
        try:
            from workers.triton_kernels import one_shot

            memory = _DeviceMemory()
            address = memory.allocate(one_shot.inbox_bytes(size, _MAX_ROWS, _MAX_WORDS))
            own = memory.handle(address).hex()
        except (ImportError, RuntimeError) as error:
            logger.warning("no one-shot sums on this rank; NCCL makes them", extra={"reason": str(error)})
        handles = exchange(store, "one_shot_inbox", rank, size, own, timeout_s)
        if all(handles):
            try:
                inboxes = [
                    address if peer == rank else memory.open(bytes.fromhex(handle))
                    for peer, handle in enumerate(handles)
                ]
                sums = cls(rank, inboxes, timeout_s)
            except RuntimeError as error:
                logger.warning("no peer's memory to be had; NCCL sums", extra={"reason": str(error)})
        are_made = exchange(store, "one_shot_made", rank, size, "yes" if sums else "", timeout_s)
        return sums if all(are_made) else None

    def takes(self, part: torch.Tensor) -> bool:
        """See RankSums."""
        num_bytes = part.numel() * part.element_size() * self._num_peers
        return num_bytes <= MAX_SENT_BYTES and part.dim() == 2 and self._kernels.takes(self._memory, part)

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        """See RankSums."""
        return self._kernels.sum_parts(self._memory, part, pdl=self._pdl)

    def sum_add_rms_norm(
        self, x: torch.Tensor, part: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See RankSums."""
        return self._kernels.sum_add_rms_norm(self._memory, x, part, weight, eps, pdl=self._pdl)

    def takes_keys(self, keys: torch.Tensor) -> bool:
        """See RankSums."""
        return len(keys) <= _MAX_ROWS

    def best_ids(self, keys: torch.Tensor) -> torch.Tensor:
        """See RankSums."""
        return self._kernels.best_ids(self._memory, keys, pdl=self._pdl)

    def end(self) -> None:
        """See RankSums."""
        self._memory.is_over.fill_(1)


def exchange(store: TCPStore, name: str, rank: int, size: int, value: str, timeout_s: float) -> list[str]:
    """Return what every rank said under `name`, once per name, in rank order. All ranks call it together."""
    store.set(f"{name}/{rank}", value)
    keys = [f"{name}/{peer}" for peer in range(size)]
    store.wait(keys, timedelta(seconds=timeout_s))
    return [store.get(key).decode() for key in keys]


class _DeviceMemory:
    """Memory of the current device that other processes can map, by CUDA's IPC: neither fabric handles nor
    NVLink multicast are asked for. Raises ImportError without cuda-bindings."""

    def __init__(self) -> None:
        from cuda.bindings import runtime

        self._runtime: Any = runtime  # without types of its own
        self._checked("cudaSetDevice", torch.cuda.current_device())  # it need not share torch's

    def allocate(self, num_bytes: int) -> int:
        """Return the address of new zeros. Raises RuntimeError, as the others do."""
        address = int(self._checked("cudaMalloc", num_bytes))
        self._checked("cudaMemset", address, 0, num_bytes)
        self._checked("cudaDeviceSynchronize")  # before anyone is told
        return address

    def handle(self, address: int) -> bytes:
        """Return what another process opens the memory by."""
        handle = self._checked("cudaIpcGetMemHandle", address)
        return ctypes.string_at(handle.getPtr(), self._handle_bytes)

    def open(self, octets: bytes) -> int:
        """Return where a peer's memory is mapped in this process."""
        handle = self._runtime.cudaIpcMemHandle_t()
        ctypes.memmove(handle.getPtr(), octets, self._handle_bytes)
        flags = self._runtime.cudaIpcMemLazyEnablePeerAccess
        return int(self._checked("cudaIpcOpenMemHandle", handle, flags))

    @property
    def _handle_bytes(self) -> int:
        return 64  # CUDA_IPC_HANDLE_SIZE

    def _checked(self, name: str, *arguments: object) -> Any:
        error, *results = getattr(self._runtime, name)(*arguments)
        if error != self._runtime.cudaError_t.cudaSuccess:
            raise RuntimeError(f"{name}: {error.name}")
        return results[0] if results else None
