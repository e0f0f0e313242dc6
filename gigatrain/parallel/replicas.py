"""What goes between replicas that may die: sums over the living, and the state of one that lives for one that returns.

Each replica is a world of its own, with process groups that end with it. Rank r of every living replica holds the same boxes of the same parameters, and
those ranks meet in a process group that is made anew whenever the living change (`Between`). It is no group of torch's default world, so that its end ends
nothing else.

A failure between replicas is `Lost`, raised on all ranks of a replica or on none: nothing of the step has reached the weights by then, and it is made again.
A failure within a replica is that replica's end, as it is for any run.
"""

import contextlib
import datetime
import hashlib
import hmac
import json
import socket
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from gigatrain.parallel.mesh import AXES, Mesh
from gigatrain.parallel.places import Piece, State
from gigatrain.parallel.quorum import sign

CONNECT_S = 10.0  # to meet the others of a new group: one that died meanwhile must not hold them longer
TAG = 0


class Lost(Exception):
    """Another replica went while this one needed it; or its sums are not to be trusted. The step is made again by those who live."""


class Damaged(Exception):
    """What another replica sent is not what it says it is."""


class Store:
    """The place where the living meet to make a group, served by the first rank of each replica on one address alone."""

    def __init__(self, host: str) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listens = socket.create_server((host, 0), family=family, backlog=1024)
        port = listens.getsockname()[1]
        self.address = [host, port]
        # Torch's own server would listen on every interface; it is given this socket instead.
        self.served = distributed.TCPStore(
            host,
            port,
            is_master=True,
            master_listen_fd=listens.detach(),
            wait_for_workers=False,
            timeout=datetime.timedelta(seconds=CONNECT_S),
        )


class Between:
    """The ranks of all living replicas that hold what this one holds."""

    def __init__(self, mesh: Mesh, host: str, timeout_s: float) -> None:
        """`host`: this node's address on the network of the replicas; nothing listens on another."""
        self.mesh, self.host, self.timeout = mesh, host, datetime.timedelta(seconds=timeout_s)
        self.index, self.count = 0, 1
        self._group: Any = None
        self._kept: list[Any] = []  # the store must outlive the group

    def connect(self, index: int, count: int, store: Sequence[Any], name: str) -> None:
        """A new group of `count` replicas, of which this is number `index`, met at a `Store`'s address under a name that was never used. Raises Lost."""
        self.leave()
        made = True
        if count > 1:
            try:
                self._make(index, count, str(store[0]), int(store[1]), f"{name}/{self.mesh.rank}")
            except (RuntimeError, ValueError, OSError):
                made = False
        self._agree(made)
        self.index, self.count = index, count

    def _make(self, index: int, count: int, host: str, port: int, name: str) -> None:
        within = datetime.timedelta(seconds=CONNECT_S)
        met = distributed.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=within)
        store = distributed.PrefixStore(name, met)
        if self.mesh.device.type == "cuda":
            chosen = distributed.ProcessGroupNCCL.Options()  # type: ignore[attr-defined]
            chosen._timeout = self.timeout
            self._group = distributed.ProcessGroupNCCL(store, index, count, chosen)  # type: ignore[attr-defined]
        else:
            chosen = distributed.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            chosen._devices = [distributed.ProcessGroupGloo.create_device(hostname=self.host)]  # type: ignore[attr-defined]
            chosen._timeout = within
            self._group = distributed.ProcessGroupGloo(store, index, count, chosen)  # type: ignore[attr-defined]
            self._group._set_default_timeout(self.timeout)
        self._kept = [met, store]

    def leave(self) -> None:
        """End the group; whoever waits in it for this replica fails at once."""
        if self._group is not None:
            with contextlib.suppress(RuntimeError):
                self._group.abort()
        self._group, self._kept, self.index, self.count = None, [], 0, 1

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Sum tensors over the living replicas, in place, alike in every bit on each. Waits for the device. Raises Lost; the tensors are then anything."""
        if self.count == 1:
            return
        went = True
        try:
            self._wait([self._group.allreduce([tensor]) for tensor in tensors])
        except RuntimeError:
            went = False
        self._agree(went)

    def _wait(self, works: Sequence[Any]) -> None:
        for work in works:
            work.wait(self.timeout)
        if self.mesh.device.type == "cuda":
            # A wait on NCCL's work only orders the stream; whether peers still live is known when the stream got there.
            done, end = torch.cuda.Event(), time.monotonic() + self.timeout.total_seconds()
            done.record()
            while not done.query():
                if time.monotonic() > end:
                    self.leave()
                    raise RuntimeError("the other replicas did not answer in time")
                time.sleep(1e-4)

    def _agree(self, went: bool) -> None:
        """Lost on all ranks of this replica if on one."""
        group = self.mesh.group(*AXES)
        if group is not None:
            flag = torch.tensor(int(went), device=self.mesh.device)
            distributed.all_reduce(flag, distributed.ReduceOp.MIN, group)
            went = bool(flag.item())
        if not went:
            self.leave()
            raise Lost

    # ---- A state for one that returns ----

    def give(self, to: int, live: State, state: dict[str, Any], key: bytes) -> None:
        """Send this rank's pieces, and what else a checkpoint has, to this rank of another replica. RuntimeError where it is gone."""
        pieces, listed = [], []
        for group, name, piece in _each(live):
            held = piece.tensor.detach().contiguous()
            pieces.append(held)
            listed.append([group, name, *_described(piece), _hash(held)])
        text = json.dumps({"state": state, "pieces": listed})
        data = f"{sign(key, 'state', text)}{text}".encode()
        self._send(torch.tensor(len(data)), to)
        self._send(torch.frombuffer(bytearray(data), dtype=torch.uint8), to)
        for held in pieces:
            if held.numel():
                self._send(held, to)

    def take(self, source: int, live: State, key: bytes) -> dict[str, Any]:
        """Fill the live pieces with those of another replica, bit by bit; returns what else came. RuntimeError: it is gone. Damaged: it is not the state
        that this rank holds, or not whole."""
        length = torch.tensor(0)
        self._receive(length, source)
        if not 64 < int(length) < 1 << 30:
            raise Damaged(f"a list of {int(length)} bytes")
        data = torch.empty(int(length), dtype=torch.uint8)
        self._receive(data, source)
        mark, text = (part.decode() for part in (bytes(data[:64].numpy()), bytes(data[64:].numpy())))
        if not hmac.compare_digest(mark, sign(key, "state", text)):
            raise Damaged("a list that is not signed with the run's token")
        found = json.loads(text)
        mine = [(piece, [group, name, *_described(piece)]) for group, name, piece in _each(live)]
        if [here for _, here in mine] != [said[:-1] for said in found["pieces"]]:
            raise Damaged("other tensors than this rank holds")
        for (piece, here), said in zip(mine, found["pieces"], strict=True):
            room = torch.empty(piece.tensor.shape, dtype=piece.tensor.dtype, device=piece.tensor.device)
            if room.numel():
                self._receive(room, source)
            if _hash(room) != said[-1]:
                raise Damaged(f"{here[0]} {here[1]} arrived with other bytes than were sent")
            piece.tensor.copy_(room)
        return found["state"]

    def settle(self, went: bool) -> None:
        """What `give` and `take` came to, told to all ranks of this replica. Raises Lost."""
        self._agree(went)

    def _send(self, tensor: Tensor, to: int) -> None:
        self._group.send([tensor.to(self.mesh.device)], to, TAG).wait()

    def _receive(self, tensor: Tensor, source: int) -> None:
        room = tensor if tensor.device.type == self.mesh.device.type else tensor.to(self.mesh.device)
        self._group.recv([room], source, TAG).wait()
        if room is not tensor:
            tensor.copy_(room)


def _each(live: State) -> list[tuple[str, str, Piece]]:
    return [(group, name, live[group][name]) for group in sorted(live) for name in sorted(live[group])]


def _described(piece: Piece) -> list[Any]:
    return [str(piece.tensor.dtype), list(piece.tensor.shape), list(piece.place.start), list(piece.place.shape)]


def _hash(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data if flat.numel() else b"").hexdigest()
