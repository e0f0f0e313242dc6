"""The near tier: every few steps each rank's pieces in its node's memory or NVMe, with copies at peer nodes, and the resume from what is left of them.

    steps  ──> staged: a copy in host memory (the stall) ──> a thread: files of this node's folder, then through a gloo group to the peer node's
    resume ──> what each node's folder holds, verified ──> the newest step of which some node has every rank's part ──> pieces travel to who lacks them

The peer of a node is the next in the mesh's order, never the node itself. Ranks agree on nothing but small sums at the next near save: whether all of the
last step is there. A step that is not whole is never loaded; where none is, the shared file system's newest is. `begin` writes down which attempt's
steps count from now on, so that a node that was away cannot bring back steps that the run has done again since.
"""

import contextlib
import errno
import functools
import json
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from gigatrain.checkpoint.files import write_tensors, write_text
from gigatrain.checkpoint.folder import FORMAT, Folder, Part, joined, opened
from gigatrain.checkpoint.reshard import meets
from gigatrain.checkpoint.saves import Checkpoints
from gigatrain.checkpoint.table import Found, table_of
from gigatrain.checkpoint.travel import destinations, file_bytes, keep_file, message, pairs, received, sources
from gigatrain.errors import CheckpointError
from gigatrain.parallel.agree import agreed, gathered, told
from gigatrain.parallel.places import State
from gigatrain.parallel.ranks import TIMEOUT

MOST_FAILURES = 3  # near saves in a row that may fail before the tier is given up
_ATTEMPT = re.compile(r"[0-9a-f]{12}")

Tensors = dict[str, dict[str, Tensor]]  # by file and name


class Near:
    """The near tier of a run. Collective, but where it says otherwise; `off` says why there is none (any more), and every call then does nothing."""

    def __init__(self, near: str | None, copies: int, saves: Checkpoints, say: Callable[[str], None]) -> None:
        """`near`: where, None: there is none. `saves`: the run's checkpoints. `say` tells the user, on rank 0."""
        mesh = saves.mesh
        self.saves, self.mesh, self.say, self.run_folder = saves, mesh, say, saves.folder.parent
        self.node, local = divmod(mesh.rank, mesh.node)
        self.leads = local == 0
        self.copies = min(copies, -(-mesh.count // mesh.node) - 1)
        self.off: str | None = None if near is not None else "checkpoint.near is not set"
        self.attempt = told(mesh, os.urandom(6).hex())
        self.stall_s: list[float] = []  # of each near save, on this rank
        self.lag_s: list[float] = []  # from its stall until this rank's part and copies are committed
        self.part_bytes = 0  # that this rank writes at a near save
        self.skipped = 0
        self._failures = 0
        self._kept: tuple[int, str] | None = None  # step and attempt of the newest that is known to be whole
        self._started: tuple[int, str] | None = None
        self._thread: threading.Thread | None = None
        self._failed: str | None = None  # why this rank's last near save came to nothing
        self._broken: str | None = None  # why there can be no near saves any more
        self._full = self._begun = False
        self._buffers: dict[tuple[str, str], Tensor] = {}
        self._groups: dict[int, distributed.ProcessGroup] | None = None
        self._sizes: list[int] = []
        self._chosen: dict[int, list[int]] | None = None  # of the step that is being loaded: origin -> ranks whose node has its part
        self.folder = Folder(near or "/", run=saves.run, node=self.node, plan_sha256=saves.plan_sha256, run_folder=self.run_folder)
        if self.off is None:
            self._open()

    def _open(self) -> None:
        try:
            with agreed(self.mesh, CheckpointError, functools.partial(_words, self.folder.path)):
                if self.leads:
                    for path in self.folder.take():
                        print(f"near tier: removed {path}, which a run that is gone left", flush=True)  # into this rank's log
        except CheckpointError as failure:
            self._leave(str(failure))
            return
        if self.copies < 1 and self.mesh.count > 0:
            alone = "one node" if self.mesh.count <= self.mesh.node else "checkpoint.near_copies is 0"
            self.say(f"near tier in {self.folder.path}: {alone}, so that a lost node's steps come from the shared file system")

    def _leave(self, why: str) -> None:
        """All ranks, for the same reason, give the tier up."""
        self.off = why
        self.say(f"NEAR TIER OFF: {why}; training goes on, with checkpoints on the shared file system alone")
        self._wait(10.0)
        self.folder.release(remove=True)

    def begin(self) -> None:
        """From now on only steps of this attempt, and the one that `latest` gave, are the run's. Before the first step, and again after a `latest` by which a
        run goes back within a process: what it kept of the steps behind that is then no part of it any more."""
        if self._begun:
            self.attempt, self._started, self._failed = told(self.mesh, os.urandom(6).hex()), None, None
        self._begun = True
        path = self.run_folder / "near.json"
        try:
            with agreed(self.mesh, CheckpointError, functools.partial(_words, path)):
                if self.mesh.rank == 0 and self.off is None:
                    origin = {"step": self._kept[0], "attempt": self._kept[1]} if self._kept else None
                    write_text(path, json.dumps({"attempt": self.attempt, "from": origin}) + "\n")
                elif self.mesh.rank == 0:
                    path.unlink(missing_ok=True)
        except CheckpointError as failure:
            if self.off is None:
                self._leave(str(failure))

    # Saving

    @torch.no_grad()
    def save(self, step: int, state: State, extra: Mapping[str, Any]) -> None:
        """Keep a step: a copy now, files and copies at peers beside training. `extra` is rank 0's. What fails costs the step, or the tier, and not the run."""
        if self.off is not None:
            return
        began = time.monotonic()
        files, table = self.saves.share(state)
        if not self._sizes:
            self.part_bytes = sum(tensor.numel() * tensor.element_size() for named in files.values() for tensor in named.values())
            self._sizes = told(self.mesh, gathered(self.mesh, self.part_bytes))
            try:
                self._groups = pairs(self.mesh, self.copies)
            except RuntimeError as failure:  # torch's
                self._broken = f"it cannot meet its peers: {str(failure).splitlines()[0][:200]}"
        if not self._ready(step):
            return
        staged = self._staged(files)
        self._started, self._failed = (step, self.attempt), "the thread that keeps it ended by itself"
        extra = dict(extra) if self.mesh.rank == 0 else {}
        self._thread = threading.Thread(target=self._keep, args=(step, staged, table, extra), name="near", daemon=True)
        self._thread.start()
        self.stall_s.append(time.monotonic() - began)

    def _ready(self, step: int) -> bool:
        """Whether all ranks may write; what became of the last near save is known then, too."""
        busy = self._thread is not None and self._thread.is_alive()
        failed = None if busy else self._failed
        if self.leads and not busy and self._broken is None:
            try:
                self._full = self._full or not self._fits(step)
            except OSError as failure:  # somebody removed it
                self._broken = _words(self.folder.path, failure)
        numbers = [int(busy), int(failed is not None), int(self._full), int(self._broken is not None)]
        sums = self.mesh.sum(torch.tensor(numbers, dtype=torch.int64, device=self.mesh.device)).tolist()
        if sums[3]:
            self._leave(self._first_word(self._broken))
            return False
        if sums[2]:
            need = sum(self._sizes) * (1 + self.copies) // max(1, -(-self.mesh.count // self.mesh.node))
            self._leave(f"{self.folder.root} is too small: a near save takes about {need / 2**20:.0f} MiB of a node, and two are kept")
            return False
        if sums[1]:
            said = self._first_word(failed)
            self._failures += 1
            if self._failures >= MOST_FAILURES:
                self._leave(f"{self._failures} near saves in a row failed, the last because {said}")
                return False
            self.say(f"NEAR STEP NOT KEPT: {said}; training goes on, the next try is at step {step}")
            self._started = self._failed = None
        if sums[0]:
            self.skipped += 1
            if self.skipped == 1:
                self.say(
                    f"near tier: the one before is still being written at step {step}, so that this one is left out; checkpoint.near_every is too short"
                )
            return False
        if self._started is not None and not sums[1]:
            self._kept, self._failures = self._started, 0
        if self.leads:
            with contextlib.suppress(OSError):
                self.folder.prune(*([self._kept] if self._kept else []), (step, self.attempt))
        return True

    def _first_word(self, mine: str | None) -> str:
        """What the lowest rank that has something to say says. Collective."""
        said = gathered(self.mesh, mine)
        return told(self.mesh, next((f"rank {rank}: {one}" for rank, one in enumerate(said) if one is not None), ""))

    def _fits(self, step: int) -> bool:
        """Whether this node's folder takes one more step, once those that are not needed are gone."""
        first = self.node * self.mesh.node
        here = range(first, min(self.mesh.count, first + self.mesh.node))
        from_peers = [other for rank in here for other in sources(rank, self.mesh.count, self.mesh.node, self.copies)]
        need = sum(self._sizes[rank] for rank in (*here, *from_peers)) + (1 << 20)
        kept = self._started if self._started is not None and self._failed is None else self._kept
        return self.folder.free_bytes() + self.folder.freed_bytes(*([kept] if kept else []), (step, self.attempt)) >= need

    def _staged(self, files: Tensors) -> Tensors:
        """Copies in host memory, in buffers that are used again: pinned where the pieces are on a GPU, so that the copies run at the link's rate."""
        staged: Tensors = {}
        for file, named in files.items():
            staged[file] = {}
            for name, tensor in named.items():
                if (file, name) not in self._buffers:
                    self._buffers[file, name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
                staged[file][name] = self._buffers[file, name].copy_(tensor.detach(), non_blocking=True)
        if self.mesh.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        return staged

    def _keep(self, step: int, staged: Tensors, table: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
        """In a thread: this rank's files, then the exchange. Not collective beyond its pairs; it fails by itself, and says so at the next near save."""
        began, folder = time.monotonic(), self.folder.step(step, self.attempt)
        text: bytes | None = None
        failures: list[Exception] = []
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            text = self._write(folder, step, staged, table, extra)
        except (OSError, CheckpointError) as failure:
            failures.append(failure)
        try:
            self._exchange(folder, step, text)
        except (OSError, CheckpointError) as failure:
            failures.append(failure)
        except RuntimeError as failure:  # torch's: a peer is gone
            failures.append(CheckpointError(f"the exchange with a peer ended: {str(failure).splitlines()[0][:200]}"))
        self._full = any(isinstance(failure, OSError) and failure.errno in (errno.ENOSPC, errno.EDQUOT) for failure in failures)
        self.lag_s.append(time.monotonic() - began)
        self._failed = _words(folder, failures[0]) if failures else None

    def _write(self, folder: Path, step: int, staged: Tensors, table: Mapping[str, Any], extra: Mapping[str, Any]) -> bytes:
        about = {"run": self.folder.run, "plan_sha256": self.folder.plan_sha256, "step": step, "attempt": self.attempt}
        metadata = {"format": "pt"} | {key: str(value) for key, value in about.items()}
        files = {file: write_tensors(folder / file, tensors, metadata) for file, tensors in staged.items()}
        if self.mesh.rank == 0:
            files["state.json"] = write_text(folder / "state.json", json.dumps(extra, sort_keys=True))
        ranked = {"format": FORMAT, "rank": self.mesh.rank, "ranks": self.mesh.count}
        return self.folder.commit(folder, about | ranked | {"files": files, "tensors": table})

    def _exchange(self, folder: Path, step: int, text: bytes | None) -> None:
        """Send this rank's part to its peers, and keep theirs, hashed as they come."""
        if self._groups is None or self.copies < 1:
            return
        rank, ranks, node = self.mesh.rank, self.mesh.count, self.mesh.node
        sent: list[tuple[Any, Tensor]] = []
        for peer in destinations(rank, ranks, node, self.copies):
            group = self._groups[peer]
            for data in message(folder, text):
                sent.append((distributed.isend(data, peer, group=group), data))
        failure: Exception | None = None
        for peer in sources(rank, ranks, node, self.copies):
            try:
                self._receive(folder, step, peer)
            except (OSError, CheckpointError) as found:
                failure = failure or found
        for work, _ in sent:
            work.wait()
        if failure is not None:
            raise failure

    def _receive(self, folder: Path, step: int, peer: int) -> None:
        assert self._groups is not None
        group = self._groups[peer]
        length = torch.zeros(1, dtype=torch.int64)
        distributed.recv(length, peer, group=group)
        if int(length) < 0:
            raise CheckpointError(f"rank {peer} could not write its part")
        said = torch.empty(int(length), dtype=torch.uint8)
        distributed.recv(said, peer, group=group)
        text = said.numpy().tobytes()
        manifest = self.folder.checked(text, step, self.attempt, peer, f"the manifest of rank {peer}")
        failure: OSError | CheckpointError | None = None
        for name, record in sorted(manifest["files"].items()):
            try:
                keep_file(folder / name, record, received(group, peer, record["bytes"]))
            except (OSError, CheckpointError) as found:
                failure = failure or found
        if failure is not None:
            raise failure
        self.folder.commit_text(folder, peer, text.decode())

    def _wait(self, seconds: float) -> None:
        if self._thread is not None:
            self._thread.join(seconds)

    def finish(self) -> None:
        """The run ends, or leaves, with a checkpoint of its last step on the shared file system: nothing here is needed any more."""
        if self.off is not None:
            return
        self._wait(TIMEOUT.total_seconds())
        self.mesh.sum(torch.zeros(1, device=self.mesh.device))  # nobody writes any more
        self.folder.release(remove=True)
        self.off = "the run has ended"

    def close(self) -> None:
        """However the process ends; not collective. What the folder holds stays for whoever goes on with the run."""
        self._wait(5.0)
        self.folder.release(remove=False)

    @property
    def beside_s(self) -> float:
        """What a near save takes beside training, mean."""
        return sum(self.lag_s) / len(self.lag_s) if self.lag_s else 0.0

    def summary(self) -> dict[str, Any]:
        """What summary.json says of the tier, of this rank."""
        if not self.stall_s:
            return {"near": None}
        return {
            "near": {
                "saves": len(self.stall_s),
                "skipped": self.skipped,
                "stall_s": round(sum(self.stall_s) / len(self.stall_s), 6),
                "beside_s": round(self.beside_s, 6),
                "bytes": self.part_bytes,
                "copies": self.copies,
            }
        }

    # Resuming

    def latest(self) -> tuple[Found, list[str], str]:
        """The newest step that is whole over all tiers, what is damaged of newer ones, and why it is that one; `bring` then fetches what a node lacks."""
        if self.off is not None:
            found, refused = self.saves.latest()
            return found, refused, ""
        self._wait(TIMEOUT.total_seconds())  # of a run that goes back within a process
        candidates, refused, lacking = self._candidates()
        shared = told(self.mesh, max(self.saves.steps(), default=-1) if self.mesh.rank == 0 else None)
        if candidates and candidates[0]["step"] >= shared and (found := self._first(candidates, refused, shared)):
            return found, refused, self._why(found, f"the shared file system's newest is step {shared}")
        found, more = self.saves.latest()
        refused += more
        left = [one for one in candidates if one["step"] >= found.step]
        if more and left and (near := self._first(left, refused, found.step)):
            return near, refused, self._why(near, f"the shared file system's newest whole one is step {found.step}")
        self._chosen = self._kept = None
        newest = (
            f"the newest whole one in near folders is step {candidates[0]['step']}" if candidates else "no step is whole in near folders"
        )
        return found, refused, newest + "".join(f"; {one}" for one in lacking)

    def _why(self, found: Found, shared: str) -> str:
        assert self._chosen is not None
        nodes = {holder // self.mesh.node for holders in self._chosen.values() for holder in holders}
        return f"near folders of {len(nodes)} of {-(-self.mesh.count // self.mesh.node)} nodes hold all {len(self._chosen)} parts of it; {shared}"

    def _accepts(self) -> dict[str, int | None]:
        """Attempt -> the only step of it that is the run's, None: any. Rank 0's to read."""
        try:
            said = json.loads((self.run_folder / "near.json").read_text())
            origin = said["from"]
            found: dict[str, int | None] = {origin["attempt"]: int(origin["step"])} if origin else {}
            found[said["attempt"]] = None
            if not all(_ATTEMPT.fullmatch(attempt) for attempt in found):
                raise ValueError
            return found
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise CheckpointError(
                f"{self.run_folder}/near.json is not what an attempt writes, so that no near step can be trusted"
            ) from None

    def _candidates(self) -> tuple[list[dict[str, Any]], list[str], list[str]]:
        """Whole steps, newest first, with who holds what; what was refused; and which newer steps lack what. The same on every rank."""
        refused: list[str] = []
        accepts: dict[str, int | None] | None = {}
        try:
            accepts = self._accepts() if self.mesh.rank == 0 else None
        except CheckpointError as failure:
            refused.append(str(failure))
        accepts = told(self.mesh, accepts)
        assert accepts is not None
        parts: list[Part] = []
        try:
            found, more = self.folder.found()
            refused += more
        except OSError as failure:
            found = []
            refused.append(_words(self.folder.root, failure))
        for folder, rank in found[self.mesh.rank % self.mesh.node :: self.mesh.node]:
            try:
                if part := self.folder.part(folder, rank, accepts=accepts):
                    parts.append(part)
            except (CheckpointError, OSError) as failure:
                refused.append(_words(folder, failure))
        self._parts = {(part.step, part.attempt, part.rank): part for part in parts}
        mine = {"parts": [(part.step, part.attempt, part.rank, part.manifest["ranks"]) for part in parts], "refused": refused}
        said = gathered(self.mesh, mine)
        return told(self.mesh, _judged(said) if self.mesh.rank == 0 else None)

    def _first(self, candidates: list[dict[str, Any]], refused: list[str], least: int) -> Found | None:
        """The first of the candidates that can be put together."""
        for one in candidates:
            if one["step"] < least:
                break
            try:
                found = self._put_together(one)
            except CheckpointError as failure:
                refused.append(str(failure))
                continue
            self._kept = (one["step"], one["attempt"])
            return found
        return None

    def _put_together(self, one: Mapping[str, Any]) -> Found:
        step, attempt = one["step"], one["attempt"]
        holders = {int(origin): held for origin, held in one["holders"].items()}
        mine, state = {}, None
        with agreed(self.mesh, CheckpointError, str):
            for origin, held in holders.items():
                if held[0] == self.mesh.rank:
                    part = self._parts[step, attempt, origin]
                    mine[origin] = part.manifest
                    if origin == 0:
                        with opened(part.folder / "state.json") as file:
                            state = json.loads(file.read())
        told_by = gathered(self.mesh, {"manifests": mine, "state": state})
        whole = None
        with agreed(self.mesh, CheckpointError, str):
            if self.mesh.rank == 0:
                manifests = {int(origin): manifest for said in told_by for origin, manifest in said["manifests"].items()}
                state = next(said["state"] for said in told_by if said["state"] is not None)
                whole = joined(manifests, step) | {"run": self.folder.run, "plan_sha256": self.folder.plan_sha256, "ranks": len(holders)}
        whole, state = told(self.mesh, [whole, state])
        self._chosen = holders
        return Found(self.folder.step(step, attempt), step, whole, state, table_of(whole))

    def bring(self, found: Found, live: State) -> None:
        """Fetch the files that this rank's pieces need and its node lacks, from the nodes that have them. Raises CheckpointError on every rank."""
        if self._chosen is None or self.off is not None:
            return
        here = {
            origin for origin, held in self._chosen.items() if any(rank // self.mesh.node == self.node for rank in held)
        }  # and verified
        lacking = set()
        for group, pieces in live.items():
            for name, piece in pieces.items():
                for box in found.table.get(group, {})[name].boxes if name in found.table.get(group, {}) else ():
                    if meets(piece.place, box) and _origin(box.file) not in here:
                        lacking.add(box.file)
        asked = gathered(self.mesh, sorted(lacking))
        orders = told(self.mesh, self._orders(asked) if self.mesh.rank == 0 else None)
        sent: list[tuple[Any, Tensor]] = []
        with agreed(self.mesh, CheckpointError, functools.partial(_words, found.folder)):
            failure: OSError | CheckpointError | None = None
            with contextlib.suppress(OSError):  # what cannot be written below says so, after all was sent and received
                found.folder.mkdir(mode=0o700, exist_ok=True)
            for name, source, target in orders:
                record = found.manifest["files"][name]
                if source == self.mesh.rank:
                    sent += [(distributed.isend(data, target), data) for data in file_bytes(found.folder / name)]
                elif target == self.mesh.rank:
                    try:
                        keep_file(found.folder / name, record, received(None, source, record["bytes"]))
                    except (OSError, CheckpointError) as one:
                        failure = failure or one
            for work, _ in sent:
                work.wait()
            if failure is not None:
                raise failure

    def _orders(self, asked: list[list[str]]) -> list[tuple[str, int, int]]:
        """(file, rank that sends, rank that receives): each file once to a node that needs it, from one of the nodes that have it."""
        assert self._chosen is not None
        wanted: dict[tuple[str, int], int] = {}
        for rank, names in enumerate(asked):
            for name in names:
                wanted.setdefault((name, rank // self.mesh.node), rank)
        orders = []
        for at, ((name, _), target) in enumerate(sorted(wanted.items())):
            holders = self._chosen[_origin(name)]
            orders.append((name, holders[at % len(holders)], target))
        return orders


def _judged(said: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str], list[str]]:
    """Which steps are whole, of what all ranks found in their nodes' folders."""
    steps: dict[tuple[int, str], dict[int, list[int]]] = {}
    sizes: dict[tuple[int, str], set[int]] = {}
    for holder, one in enumerate(said):
        for step, attempt, origin, ranks in one["parts"]:
            steps.setdefault((step, attempt), {}).setdefault(origin, []).append(holder)
            sizes.setdefault((step, attempt), set()).add(ranks)
    refused = [f"rank {holder}: {reason}" for holder, one in enumerate(said) for reason in one["refused"]]
    whole, lacking = [], []
    for (step, attempt), held in sorted(steps.items(), reverse=True):
        count = max(sizes[step, attempt])
        missing = [str(rank) for rank in range(count) if rank not in held]
        if missing or len(sizes[step, attempt]) > 1:
            shown = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
            lacking.append(f"of step {step} no node has the pieces of rank {shown} of {count}")
        else:
            whole.append({"step": step, "attempt": attempt, "holders": held})
    return whole, refused, lacking if not whole else [one for one in lacking if int(one.split()[2]) > whole[0]["step"]]


def _origin(name: str) -> int:
    """The rank that wrote a file."""
    return 0 if name == "state.json" else int(name.removesuffix(".safetensors").rpartition("-")[2])


def _words(path: Path, failure: Exception) -> str:
    if isinstance(failure, OSError):
        return f"{failure.filename or path}: {failure.strerror}"
    return str(failure)
