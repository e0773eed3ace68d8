"""TPGroup: the communicator of one tensor-parallel group, and the boards that say how far its ranks are.

Owned by a Worker, used from its engine's thread. No process-wide state, but for the environment variable
that keeps NCCL off NVLink multicast: a process may hold several groups.
Collectives run over gloo (CPU) or NCCL (CUDA), small sums there by OneShotSums; plans travel over one socket
per follower, so that a follower can wait with a timeout and a dead peer shows at once. Every wait of the host
ends in a typed error.
"""

import socket
import struct
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Literal, Self, TypeVar

import torch
from torch._C._distributed_c10d import (
    AllgatherOptions,
    AllreduceOptions,
    ReduceOp,
    TCPStore,
    Work,
)

from workers.completion_board import CompletionBoard
from workers.move_board import MoveBoard
from workers.one_shot_sums import OneShotSums, RankSums, exchange
from workers.peer_watch import PeerWatch
from workers.plan_links import can_read, follow, hang_up, has_hung_up, lead, receive
from workers.process_groups import Collectives, check_device, end_collectives, process_group

_LENGTH = struct.Struct("<I")
_MAX_PLAN_BYTES = 1 << 30
_SPIN_S = 2e-3
"""So long a follower on CUDA looks for a plan again at once before it sleeps until one comes, which takes it
some 60 us more. On the CPU its core has steps to compute."""

T = TypeVar("T")


class TPGroupError(Exception):
    """The group cannot go on: its ranks must be rebuilt."""


class TPTimeoutError(TPGroupError):
    """A peer said nothing for the allowed time; it may be alive."""


class TPPeerLostError(TPGroupError):
    """A peer's connection is closed: its process ended or gave up the group."""


def listen(host: str) -> socket.socket:
    """Return a socket listening on a free port of `host`; rank 0 tells its port, then connects with it."""
    return socket.create_server((host, 0), backlog=128)


class TPGroup:
    """One rank's membership of a group of `size`. A group of one has no connections; every call is local."""

    def __init__(
        self,
        rank: int,
        size: int,
        timeout_s: float,
        board: CompletionBoard,
        moves: MoveBoard,
        process_group: Collectives | None = None,
        links: list[socket.socket] | None = None,
        store: TCPStore | None = None,
        one_shot: RankSums | None = None,
        spin_s: float = 0.0,
    ) -> None:
        self.rank = rank
        self.size = size
        self.board = board
        """How many steps each rank has completed."""
        self.moves = moves
        """What has become of each SAVE and LOAD on each rank."""
        self._timeout_s = timeout_s
        self._process_group = process_group
        self._links = links or []
        """Rank 0: one per follower, in rank order. Others: the one to rank 0."""
        self._store = store
        self.one_shot = one_shot
        """Sums what is small by itself; None: the process group sums everything."""
        self._num_agreements = 0
        self._spin_s = spin_s
        self._num_plans = 0
        self._watch: PeerWatch | None = None
        self._ending = threading.Lock()

    @classmethod
    def single(cls) -> Self:
        """Return a group of one."""
        return cls(0, 1, 0.0, CompletionBoard.private(), MoveBoard.private())

    @classmethod
    def connect(
        cls,
        rank: int,
        size: int,
        host: str,
        port: int,
        *,
        timeout_s: float,
        meeting_timeout_s: float | None = None,
        device: Literal["cpu", "cuda"] = "cpu",
        one_shot: bool = True,
        listener: socket.socket | None = None,
    ) -> Self:
        """Meet the other ranks at rank 0's `host`:`port` and return the group; blocks until all have come.

        Rank 0 may bring the `listener` it made with `listen`. For "cuda" the current device is the rank's,
        and `one_shot` lets OneShotSums make small sums where the ranks can map each other's memory.
        Raise TPTimeoutError when some have not come after `meeting_timeout_s` (None: `timeout_s`, which
        bounds every later call of the group). All ranks must share a machine: the boards are shared memory.
        """
        if not 0 <= rank < size:
            raise ValueError(f"rank {rank} of {size}: ranks run from 0 to size - 1")
        check_device(device)
        if size == 1:
            if listener is not None:
                listener.close()
            return cls.single()
        meeting_s = timeout_s if meeting_timeout_s is None else meeting_timeout_s
        return _named_errors(
            f"rank {rank} of {size}: meeting the group at {host}:{port}",
            meeting_s,
            lambda: cls._connect(rank, size, host, port, timeout_s, meeting_s, device, one_shot, listener),
        )

    @classmethod
    def _connect(
        cls,
        rank: int,
        size: int,
        host: str,
        port: int,
        timeout_s: float,
        meeting_s: float,
        device: Literal["cpu", "cuda"],
        one_shot: bool,
        listener: socket.socket | None,
    ) -> Self:
        timeout = timedelta(seconds=meeting_s)
        if rank == 0:
            # A listener of our own: TCPStore by itself would listen on every interface of the machine.
            listener = listener or socket.create_server((host, port), backlog=128)
            store = TCPStore(
                host,
                port,
                size,
                is_master=True,
                timeout=timeout,
                wait_for_workers=False,
                master_listen_fd=listener.detach(),
            )
        else:
            store = TCPStore(host, port, size, is_master=False, timeout=timeout, wait_for_workers=False)
        links = lead(store, size, host, meeting_s) if rank == 0 else [follow(store, rank, host, meeting_s)]
        board = CompletionBoard.shared(store, rank, size)
        moves = MoveBoard.shared(store, rank, size)
        for link in links:
            link.settimeout(timeout_s)
        collectives = process_group(store, rank, size, host, timedelta(seconds=timeout_s), device)
        sums = OneShotSums.connect(store, rank, size, timeout_s) if one_shot and device == "cuda" else None
        spin_s = _SPIN_S if device == "cuda" else 0.0
        group = cls(rank, size, timeout_s, board, moves, collectives, links, store, sums, spin_s)
        if device == "cuda":
            group._watch = PeerWatch(links, group._steps, timeout_s, group._end_collectives)
        return group

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        """Return the sum of the ranks' `part` [rows, size], contiguous, which it may overwrite."""
        if self.one_shot is not None and self.one_shot.takes(part):
            return self.one_shot.sum(part)
        self.all_reduce(part)
        return part

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Sum `tensor` over the ranks, in place on every rank. Any shape; contiguous."""
        self._reduce(tensor, ReduceOp.SUM)

    def maximum(self, tensor: torch.Tensor) -> None:
        """Make each element the largest of the ranks', in place on every rank. Any shape; contiguous."""
        self._reduce(tensor, ReduceOp.MAX)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the ranks' tensors, of one shape, on every rank: [size, *shape]."""
        gathered = tensor.new_empty(self.size, *tensor.shape)
        if self._is_alone:
            return gathered.copy_(tensor)
        options = AllgatherOptions()
        options.asyncOp = False
        part = tensor.contiguous()
        self._run(
            "all_gather", lambda: self._members._allgather_base(gathered.view(-1), part.view(-1), options)
        )
        return gathered

    def agree(self, is_well: bool) -> bool:
        """Tell whether all is well on every rank, by way of the host: no collective of the device takes part,
        which some rank may not have come to. All ranks call it together; rare, it takes a millisecond."""
        store = self._store
        if store is None:
            return is_well
        self._num_agreements += 1
        name, said = f"agreement_{self._num_agreements}", "yes" if is_well else ""
        return _named_errors(
            f"rank {self.rank}: agreeing",
            self._timeout_s,
            lambda: all(exchange(store, name, self.rank, self.size, said, self._timeout_s)),
        )

    @property
    def step_timeout_s(self) -> float | None:
        """How long a step's collectives may take on the device; None: there are none."""
        return self._timeout_s if self.size > 1 else None

    def check_peers(self) -> None:
        """Raise TPPeerLostError when the process at the other end of a plan link is gone, or collectives have
        been ended because of a rank: what the device has computed since is worth nothing."""
        self._check_watch()
        if any(map(has_hung_up, self._links)):
            raise TPPeerLostError("a rank closed its connection")

    def broadcast_plan(self, plan: bytes) -> None:
        """Send a plan to every follower (rank 0). Returns when the kernel has it; a lost peer raises."""
        assert self.rank == 0
        self._check_watch()
        self._num_plans += bool(plan)
        for follower, link in enumerate(self._links, start=1):
            try:
                if has_hung_up(link):
                    raise TPPeerLostError(f"rank {follower} closed its connection")
                link.sendall(_LENGTH.pack(len(plan)) + plan)
            except TimeoutError:
                raise TPTimeoutError(f"rank {follower} took no plan for {self._timeout_s} s") from None
            except OSError as error:
                raise TPPeerLostError(f"rank {follower} is gone: {error}") from error

    def has_plan(self, timeout_s: float) -> bool:
        """Tell whether rank 0 has sent something, or is gone; wait for it at most so long (followers)."""
        assert self.rank > 0
        try:
            return self._has_come(timeout_s)
        except OSError as error:
            raise TPPeerLostError(f"rank 0 is gone: {error}") from error

    def receive_plan(self, timeout_s: float) -> bytes:
        """Return rank 0's next plan (followers). Raise TPTimeoutError when none begins within `timeout_s`.

        A plan that has begun is read to its end within the group's own timeout.
        """
        assert self.rank > 0
        try:
            if not self._has_come(timeout_s):
                raise TPTimeoutError(f"rank 0 sent no plan for {timeout_s} s")
            link = self._links[0]
            (num_bytes,) = _LENGTH.unpack(receive(link, _LENGTH.size))
            if num_bytes > _MAX_PLAN_BYTES:
                raise TPPeerLostError(f"rank 0 announced a plan of {num_bytes} bytes: not our protocol")
            self._num_plans += bool(num_bytes)
            return receive(link, num_bytes)
        except TimeoutError:
            raise TPTimeoutError(f"rank 0 stopped within a plan for {self._timeout_s} s") from None
        except OSError as error:
            raise TPPeerLostError(f"rank 0 is gone: {error}") from error

    def see_off(self, timeout_s: float) -> bool:
        """Wait until all followers have left, or are lost (rank 0, behind its last plan; others: at once).

        A follower may still be in the last step's collectives, and those end with rank 0's membership. Return
        False where one is still there after `timeout_s`.
        """
        if self._watch is not None:
            self._watch.stop()  # the first that leaves is no rank that is lost
        end_s = time.monotonic() + timeout_s
        for link in self._links if self.rank == 0 else []:
            link.settimeout(max(0.001, end_s - time.monotonic()))
            try:
                while link.recv(1):
                    pass
            except TimeoutError:
                return False
            except OSError:
                continue  # lost
        return True

    def abort(self) -> None:
        """Take no more part: this rank's collectives end with an error, the device's too, and its peers see
        that it is gone. The boards can still be read and written. Idempotent."""
        if self._watch is not None:
            self._watch.stop()
        for link in self._links:
            link.close()
        self._links = []
        self._end_collectives()

    def close(self) -> None:
        """Leave the group: peers still in a collective, or waiting for a plan, get an error. Idempotent."""
        self.abort()
        self._store = None
        self.board.close()
        self.moves.close()

    def _has_come(self, timeout_s: float) -> bool:
        """Tell whether the link to rank 0 can be read, be it to its end; wait for it at most so long."""
        self._check_watch()
        if not self._links:
            raise TPPeerLostError(f"rank {self.rank} has left its group")
        link, now_s = self._links[0], time.monotonic()
        end_s, sleep_s = now_s + timeout_s, now_s + min(timeout_s, self._spin_s)
        while now_s < sleep_s:
            if can_read(link):
                return True
            now_s = time.monotonic()
        return can_read(link, max(0.0, end_s - now_s))

    def _reduce(self, tensor: torch.Tensor, operation: ReduceOp.RedOpType) -> None:
        if self._is_alone:
            return
        options = AllreduceOptions()
        options.reduceOp = ReduceOp(operation)
        options.asyncOp = False
        self._run("all_reduce", lambda: self._members.allreduce([tensor], options))

    @property
    def _is_alone(self) -> bool:
        return self.size == 1 and self._process_group is None

    @property
    def _members(self) -> Collectives:
        """Return what connects the ranks; nobody keeps it. Raise TPPeerLostError once the group is left."""
        if self._process_group is None:
            self._check_watch()
            raise TPPeerLostError(f"rank {self.rank} has left its group")
        return self._process_group

    def _check_watch(self) -> None:
        """Raise TPPeerLostError with the reason for which the watch has ended collectives, if it has."""
        if self._watch is not None and self._watch.reason is not None:
            raise TPPeerLostError(self._watch.reason)

    def _steps(self) -> tuple[int, int]:
        """How many steps have begun on this rank, and how many are complete."""
        return self._num_plans, self.board.counts()[self.rank]

    def _end_collectives(self) -> None:
        with self._ending:  # this rank's thread and its watch's
            if self._process_group is None:
                return
            hang_up(self._links)  # first: from now on what this rank computes is worth nothing
            if self.one_shot is not None:
                self.one_shot.end()
            held = [self._process_group]
            self._process_group = None
            end_collectives(held)

    def _run(self, name: str, enqueue: Callable[[], Work | None]) -> None:
        """Run a collective; on CUDA on the current stream, for which the host does not wait."""

        def run() -> None:
            work = enqueue()
            if work is not None:
                work.wait()

        try:
            _named_errors(f"rank {self.rank}: {name}", self._timeout_s, run)
        except TPGroupError:
            self._check_watch()
            raise


def _named_errors(action: str, timeout_s: float, call: Callable[[], T]) -> T:
    """Run `call`; torch's and the sockets' errors become typed ones that say what was tried.

    What took most of `timeout_s` timed out. The text does not tell: gloo calls a killed peer a timeout too.
    """
    started_s = time.monotonic()
    try:
        return call()
    except TPGroupError:
        raise
    except (RuntimeError, OSError) as error:  # torch raises DistError and plain RuntimeError alike
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, TimeoutError) or time.monotonic() - started_s > 0.9 * timeout_s:
            raise TPTimeoutError(f"{action}: {reason}") from error
        raise TPPeerLostError(f"{action}: {reason}") from error
