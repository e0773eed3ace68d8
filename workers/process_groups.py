"""process_group: torch's process groups as TPGroup uses them, each its own: none is registered anywhere."""

import logging
import os
import socket
import sys
import threading
import time
from datetime import timedelta
from typing import Literal, Protocol, cast

import torch
from torch._C._distributed_c10d import (
    AllgatherOptions,
    AllreduceOptions,
    ProcessGroupGloo,
    TCPStore,
    Work,
)

logger = logging.getLogger(__name__)

_END_TIMEOUT_S = 2.0
_LOOK_S = 0.05
_OWN_REFERENCES = 2
"""To a group that a function's name alone refers to, as sys.getrefcount counts: its argument, too."""


class NoDeviceError(Exception):
    """There is no such device for this process."""


class Collectives(Protocol):
    """What a TPGroup needs of torch's process groups."""

    def allreduce(self, tensors: list[torch.Tensor], opts: AllreduceOptions) -> Work | None:
        """Sum each tensor over the ranks, in place. None: on the current stream, which waits for it."""

    def _allgather_base(
        self, output: torch.Tensor, part: torch.Tensor, opts: AllgatherOptions, /
    ) -> Work | None:
        """Collect the ranks' inputs on every rank, one after another."""

    def abort(self) -> None:
        """End running collectives with an error."""


class GlooOptions(Protocol):
    """Options of torch's gloo process group."""

    _timeout: timedelta
    _devices: list[ProcessGroupGloo.Device]


class GlooBinding(Protocol):
    """torch's gloo process group, as it is and not as its stub says."""

    def _Options(self) -> GlooOptions: ...  # noqa: N802
    def create_device(self, hostname: str) -> ProcessGroupGloo.Device:
        """Bind to an address."""

    def __call__(self, store: TCPStore, rank: int, size: int, options: GlooOptions) -> Collectives:
        """Build this rank's end."""


def check_device(device: Literal["cpu", "cuda"]) -> None:
    """Raise NoDeviceError, which names the option, where a rank cannot compute on `device`."""
    if device == "cuda" and not torch.cuda.is_available():
        raise NoDeviceError(
            f"device: 'cuda', but PyTorch {torch.__version__} finds no CUDA device on {socket.gethostname()}"
            " for this rank; it needs an NVIDIA card and `pip install 'eyrie[cuda]'`, or `--device cpu`"
        )


def process_group(
    store: TCPStore, rank: int, size: int, host: str, timeout: timedelta, device: Literal["cpu", "cuda"]
) -> Collectives:
    """Return this rank's end of a group over NCCL or gloo; all ranks call it together."""
    if device == "cuda":
        from torch._C._distributed_c10d import ProcessGroupNCCL  # absent from CPU builds of torch

        # By itself NCCL takes NVLink multicast for more than two ranks; a process that dies in it can put the
        # machine's cards out of service.
        os.environ["NCCL_NVLS_ENABLE"] = "0"
        nccl = ProcessGroupNCCL.Options()
        nccl._timeout = timeout
        return cast(Collectives, ProcessGroupNCCL(store, rank, size, nccl))
    # torch's stubs know neither the attributes nor the constructor that takes them.
    gloo = cast(GlooBinding, ProcessGroupGloo)
    options = gloo._Options()
    options._timeout = timeout
    # Bound to the group's address: by default gloo resolves the machine's name, which may not resolve.
    options._devices = [gloo.create_device(hostname=host)]
    return gloo(store, rank, size, options)


def end_collectives(held: list[Collectives]) -> None:
    """End running collectives, the device's too, with an error; what the group in `held` holds is freed if
    that can be soon: NCCL waits for the last captured graph with one of its collectives, for the device, and
    for a thread of torch's that may be asking rank 0, which may hang. So it is freed where nobody waits: by a
    thread that keeps it until nobody else does."""
    thread = threading.Thread(target=_end, args=(held,), name="group-abort", daemon=True)
    thread.start()
    thread.join(_END_TIMEOUT_S)
    if thread.is_alive():
        logger.warning("a group's memory is not freed yet: graphs, the device or a rank still hold it")


def _end(held: list[Collectives]) -> None:
    group = held.pop()
    group.abort()
    while sys.getrefcount(group) > _OWN_REFERENCES:
        time.sleep(_LOOK_S)
