"""The nodes of one job together: who came, whose clock, versions, files and links differ, and who hangs; nobody waits for a dead one longer than a limit.

Rank 0 holds a store (torch's TCPStore), at MASTER_ADDR:MASTER_PORT, else, in a step of Slurm, where its note in the folder of verdicts says.
Every node tells what it has seen, rank 0 compares and publishes; a heart beats through a
connection of its own, so that a node which is stopped is told from one that is only waiting. Links are measured in rounds of pairs, each pair with a process
group of its own: a hanging node costs its partner of one round one time limit, and no other node anything. `Network` needs no process group to exist.
"""

import datetime
import json
import os
import secrets
import socket
import statistics
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gigatrain.preflight import host
from gigatrain.preflight.findings import Check, Finding

JOIN_S = 20.0  # after rank 0 is ready: others may still be importing torch
STALE_S = 3.0  # a heart that beats once a second
TRANSFER_S = 5.0  # of one pair
ROUNDS = 3
SKEW_S, SKEW_BAD_S = 0.5, 5.0
SIZE_CPU, SIZE_CUDA = 8 << 20, 256 << 20
SERIOUS = ("python", "torch", "gigatrain", "triton", "deepspeed", "nvidia-nccl-cu12", "nvidia-nccl-cu13", "module nvidia", "module amdgpu")
_WAY = "NCCL_DEBUG=INFO shows its way; compare with the other nodes"
PARTS = (
    "rendezvous",
    "clock",
    "versions equal",
    "visible",
    "links",
    "all-reduce",
)  # whose failure may be the host's fault; judge.py reads it


class Network:
    """This node's part in the meeting; `checks()` are run in order by findings.run, each with what the former learned.

    `now` is the wall clock (a test skews it), `folder` a folder that all nodes should see, `out` that of the verdicts, `links` how many GPUs to
    measure with (0: gloo on CPUs), `nic_gbit_s` what the site's network gives each accelerator of `devices` GPUs. A node that is not `fit` (its GPU computes
    wrong, or hangs) meets, compares, and stays away from the links. `left` names what hung in a thread and was left behind.
    """

    def __init__(
        self,
        rank: int,
        ranks: int,
        node: str,
        versions: Mapping[str, str],
        folder: Path | None,
        *,
        links: int = 0,
        nic_gbit_s: float | None = None,
        devices: int = 1,
        join_s: float = JOIN_S,
        now: Callable[[], float] = time.time,
        out: Path | None = None,
        fit: bool = True,
    ) -> None:
        self.rank, self.ranks, self.node, self.versions, self.folder = rank, ranks, node, dict(versions), folder
        self.links, self.nic_gbit_s, self.devices, self.join_s, self.now = links, nic_gbit_s, devices, join_s, now
        self.note = meeting_note(out)
        self.fit, self.unfit = fit, []
        self.left: list[str] = []
        self.address = ""
        self.store: Any = None
        self.roster: list[int] = []
        self.names: dict[int, str] = {}
        self.common: dict[str, tuple[str, int]] = {}
        self.members: list[int] = []  # of the roster, those that are fit
        self.healthy: list[int] = []  # of these, those whose links work
        self.measured: dict[str, float] = {}
        self.latency_us: float | None = None
        self.gone = threading.Event()
        self.busy: str | None = None
        self.met = False

    @property
    def transfer_s(self) -> float:
        """How long one group may take: NCCL's first of each GPU takes seconds to find its way."""
        return 12.0 if self.links else TRANSFER_S

    def checks(self) -> list[Check]:
        def part(name: str, run: Callable[[], Finding | Sequence[Finding]], limit_s: float) -> Check:
            def guarded() -> Finding | Sequence[Finding]:
                if self.busy:
                    return Finding(name, "untested", f"{self.busy} still hangs")
                if not self.met and name == "leave":
                    return []
                if not self.met and name != "rendezvous":
                    return Finding(name, "untested", "the nodes did not meet")
                self.busy = name
                try:
                    return run()
                finally:  # one part that failed is no reason to leave out the others
                    self.busy = None

            return Check(name, guarded, limit_s, alone=False)

        return [
            part("rendezvous", self.meet, self.join_s + 8),
            part("clock", self.clock, 8),
            part("versions equal", self.equal, 4),
            part("visible", self.visible, 14),
            part("links", self.pairs, 12 + 2 * self.transfer_s),
            part("all-reduce", self.all_reduce, 8 + self.transfer_s),
            part("leave", self.leave, 6),
        ]

    # The meeting

    def meet(self) -> Finding:
        """A store that every node finds, and who came within `join_s`."""
        from torch.distributed import TCPStore

        begin = time.monotonic()
        place = self._place(begin)
        if isinstance(place, Finding):
            return place
        self.address, port = place
        where = f"{self.address}:{port}"
        if self.rank == 0 and port and (found := host.bindable(port)).state == "bad":
            return Finding("rendezvous", "bad", f"{found.said}, so no node can find another", found.value, None, found.way_out)
        seconds = datetime.timedelta(seconds=self.join_s)
        try:
            self.store = TCPStore(self.address, port, None, self.rank == 0, seconds, wait_for_workers=False)
            beating = TCPStore(self.address, self.store.port, None, False, seconds, wait_for_workers=False)
        except (RuntimeError, ValueError) as failure:
            said = f"rank 0's store at {where} was not reached in {time.monotonic() - begin:.0f} s: {str(failure).splitlines()[0][:160]}"
            return Finding(
                "rendezvous", "bad", said, where, self.join_s, "does rank 0's node run, does its name resolve, is the port open?"
            )
        if self.rank == 0 and not port:
            where = f"{self.address}:{self.store.port}"
            self._leave_note(self.store.port)
        threading.Thread(target=self._beat, args=(beating,), name="doctor heart", daemon=True).start()
        self._tell("here", {"node": self.node, "versions": self.versions, "links": self.links, "fit": self.fit})
        self.store.add("came", 1)
        if self.rank == 0:
            self._gather_all(begin)
        told = self._told("roster", self.join_s + 4)
        if told is None:
            way = "its node hangs, or left: see its verdict"
            return Finding("rendezvous", "bad", f"rank 0 at {where} has said nothing for {self.join_s + 4:g} s", where, None, way)
        absent = set(told["absent"])
        if self.rank in absent:
            said = f"this node came too late: the others waited {self.join_s:g} s"
            return Finding(
                "rendezvous", "bad", said, round(time.monotonic() - begin, 1), self.join_s, "slow to start: its file system or its cores"
            )
        self.roster = [rank for rank in range(self.ranks) if rank not in absent]
        self.unfit = told["unfit"]
        self.healthy = self.members = [rank for rank in self.roster if rank not in self.unfit]
        self.common = {name: (value, count) for name, (value, count) in told["common"].items()}
        self.links = told["links"]
        self.met = True
        shown = f"{len(self.roster)} of {self.ranks} nodes met at {where} in {time.monotonic() - begin:.1f} s"
        if absent:
            return Finding("rendezvous", "ok", f"{shown}; without rank {_shown(sorted(absent))}, which never came", len(absent), 0)
        return Finding("rendezvous", "ok", shown, 0, 0)

    def _place(self, begin: float) -> tuple[str, int] | Finding:
        """Where rank 0's store is, or is to be; port 0: a free one, of which its note will tell the others."""
        address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
        if address and port and port.isdecimal():
            return address, int(port)
        if self.note is None:
            said = f"the network was not tested: MASTER_ADDR={address!r}, MASTER_PORT={port!r} in the environment of {self.ranks} tasks"
            return Finding(
                "rendezvous",
                "untested",
                said,
                None,
                None,
                "export both: rank 0's node and a free port; a step of Slurm with --out needs none",
            )
        if self.rank == 0:
            return socket.gethostname(), 0
        while time.monotonic() - begin < self.join_s:
            if told := host.text(self.note):
                address, port = json.loads(told)
                return str(address), int(port)
            time.sleep(0.1)
        said = f"rank 0 left no note of its store in {self.note} for {self.join_s:g} s"
        return Finding("rendezvous", "bad", said, None, self.join_s, "does rank 0's node run, is the folder the same there?")

    def _leave_note(self, port: int) -> None:
        assert self.note is not None
        new = self.note.with_suffix(".new")
        new.write_text(json.dumps([self.address, port]))
        new.replace(self.note)

    def _gather_all(self, begin: float) -> None:
        """Rank 0: wait for all, but not longer; then say who is absent and what most have in common."""
        while time.monotonic() - begin < self.join_s and self.store.add("came", 0) < self.ranks:
            time.sleep(0.05)
        there = self._heard("here", range(self.ranks), 0.5)
        names = {name for one in there.values() for name in one["versions"]}
        common = {}
        for name in sorted(names):
            value, count = Counter(one["versions"].get(name, "none") for one in there.values()).most_common(1)[0]
            common[name] = (value, count)
        absent = [rank for rank in range(self.ranks) if rank not in there]
        unfit = [rank for rank, one in there.items() if not one["fit"]]
        links = min((one["links"] for one in there.values() if one["fit"]), default=0)
        self.store.set("roster", json.dumps({"absent": absent, "unfit": unfit, "common": common, "links": links}))

    def _beat(self, store: Any) -> None:
        count = 0
        while not self.gone.wait(1.0):
            count += 1
            try:
                store.set(f"beat/{self.rank}", str(count))
            except RuntimeError:  # rank 0 has gone
                return

    def _tell(self, what: str, value: Any) -> None:
        self.store.set(f"{what}/{self.rank}", json.dumps(value))

    def _told(self, what: str, limit_s: float) -> Any:
        """What rank 0 published, or None."""
        try:
            self.store.wait([what], datetime.timedelta(seconds=limit_s))
        except RuntimeError:
            return None
        return json.loads(self.store.get(what))

    def _heard(self, what: str, ranks: Sequence[int] | range, limit_s: float) -> dict[int, Any]:
        """What each rank told, of those that did within the limit."""
        keys = [f"{what}/{rank}" for rank in ranks]
        try:
            self.store.wait(keys, datetime.timedelta(seconds=limit_s))
            there = list(ranks)
        except RuntimeError:
            there = [rank for rank, key in zip(ranks, keys, strict=True) if self.store.check([key])]
        values = self.store.multi_get([f"{what}/{rank}" for rank in there]) if there else []
        return {rank: json.loads(value) for rank, value in zip(there, values, strict=True)}

    def _name(self, rank: int) -> str:
        if rank not in self.names:
            told = self._heard("here", [rank], 0.5)
            self.names[rank] = told[rank]["node"] if told else f"rank {rank}"
        return self.names[rank]

    def _stale(self, ranks: Sequence[int]) -> list[int]:
        """Those whose heart stands still, looked at over more than a beat."""

        def beats() -> dict[int, Any]:
            return self._heard("beat", ranks, 0.2)

        before = beats()
        time.sleep(STALE_S / 2 + 0.5)
        after = beats()
        return [rank for rank in ranks if before.get(rank) == after.get(rank)]

    # What the nodes compare

    def clock(self) -> Finding:
        """This node's wall clock against the median of all; the error is half a round trip to rank 0."""
        offset, error = 0.0, 0.0
        server = None
        if self.rank == 0:
            server = socket.create_server(("", 0), backlog=1024)
            threading.Thread(target=_tells_time, args=(server, self.now), name="doctor clock", daemon=True).start()
            self.store.set("clock", json.dumps(server.getsockname()[1]))
        else:
            port = self._told("clock", 4)
            if port is None:
                return Finding("clock", "untested", "rank 0 told no time")
            try:
                offset, error = _offset(self.address, port, self.now)
            except OSError as failure:
                return Finding("clock", "untested", f"rank 0 was not asked for its time: {failure}")
        self._tell("offset", offset)
        if self.rank == 0:
            offsets = self._heard("offset", self.roster, 4)
            self.store.set("median", json.dumps([statistics.median(offsets.values()), max(offsets.values(), key=abs), len(offsets)]))
        told = self._told("median", 6)
        if server is not None:
            server.shutdown(socket.SHUT_RDWR)  # ends the thread that waits for calls
            server.close()
        if told is None:
            return Finding("clock", "untested", "rank 0 told no time")
        median, farthest, count = told
        # Of two clocks nobody can say which is wrong: both warn.
        apart = farthest if count == 2 else offset - median
        whose = "the other node's" if count == 2 else f"the median of {count} nodes"
        shown = f"{abs(apart) * 1e3:,.1f} ms {'behind' if apart > 0 else 'ahead of'} {whose}, ± {error * 1e3:.1f} ms"
        state = "bad" if abs(apart) - error > SKEW_BAD_S and count > 2 else "warn" if abs(apart) - error > SKEW_S else "ok"
        return Finding(
            "clock", state, shown, round(apart, 4), SKEW_S, "chronyc tracking; is its time server reached?" if state != "ok" else ""
        )

    def equal(self) -> Finding:
        """What this node runs against what most run."""
        parts = []
        for name, (value, count) in self.common.items():
            mine = self.versions.get(name, "none")
            if count == len(self.roster):
                continue
            tied = count * 2 <= len(self.roster)
            if mine != value or tied:
                said = f"{name} is {mine}, on {count} of {len(self.roster)} nodes {value}"
                parts.append((tied or name not in SERIOUS, said, mine, value))
        if not parts:
            return Finding("versions equal", "ok", f"{len(self.common)} versions are those of most of {len(self.roster)} nodes")
        hard = [part for part in parts if not part[0]]
        way = "install the same image or environment on it, or exclude it"
        _, _, mine, value = (hard or parts)[0]
        return Finding("versions equal", "bad" if hard else "warn", "; ".join(part[1] for part in parts), mine, value, way)

    def visible(self) -> Finding:
        """A file written here is read by the next two nodes, and theirs here: the run's folder is one folder."""
        if self.folder is None:
            return Finding("visible", "untested", "no folder that all nodes share was named (--out or --run)")
        place, count = self.roster.index(self.rank), len(self.roster)
        if count < 2:
            return Finding("visible", "untested", "no other node met")
        name, word = f".doctor-seen-{self.rank}-{secrets.token_hex(4)}", secrets.token_hex(32)
        path = self.folder / name
        try:
            try:
                with path.open("x") as file:
                    file.write(word)
                    file.flush()
                    os.fsync(file.fileno())
                self._tell("file", [name, word])
            except OSError as failure:
                self._tell("file", [None, str(failure)])
            seen = {}
            for step in range(1, min(3, count)):
                writer = self.roster[place - step]
                seen[writer] = self._read(writer, 5.0 / min(2, count - 1))
            self._tell("seen", {str(writer): why for writer, why in seen.items()})
            if self.rank == 0:
                self.store.set("unseen", json.dumps(self._unseen(self._heard("seen", self.roster, 7))))
            told = self._told("unseen", 9)
        finally:
            path.unlink(missing_ok=True)
        if told is None:
            return Finding("visible", "untested", "rank 0 did not compare")
        blind, doubtful = told
        mine = {writer: why for writer, why in seen.items() if why}
        way = f"is {self.folder} the same mounted file system on every node?"
        if self.rank in blind:
            said = f"{self.folder}: what it writes others do not see, or it does not see theirs" + "".join(
                f"; {self._name(writer)}: {why}" for writer, why in mine.items()
            )
            return Finding("visible", "bad", said, len(mine), 0, way)
        if self.rank in doubtful:
            shown = "; ".join(f"{self._name(writer)}: {why}" for writer, why in mine.items()) or "a file of it was not seen"
            return Finding("visible", "warn", f"{self.folder}: {shown}", len(mine), 0, way)
        return Finding("visible", "ok", f"{self.folder}: files of {min(2, count - 1)} other nodes were read here, and this node's there")

    def _read(self, writer: int, limit_s: float) -> str | None:
        """Why the file of `writer` was not read here, or None."""
        end = time.monotonic() + limit_s
        told = self._heard("file", [writer], limit_s)
        if not told:
            return "it wrote nothing"
        name, word = told[writer]
        if name is None:
            return f"it could not write: {word}"
        assert self.folder is not None
        why = "not there"
        while True:
            try:
                found = (self.folder / name).read_text()
                if found == word:
                    return None
                why = "its file has other contents"
            except OSError as failure:
                why = f"its file cannot be read: {failure.strerror}"
            if time.monotonic() > end:
                return f"{why} after {limit_s:g} s"
            time.sleep(0.1)

    def _unseen(self, seen: Mapping[int, Mapping[str, str | None]]) -> tuple[list[int], list[int]]:
        """`(blind, doubtful)`: those all of whose files and readings failed, and those a part of which did though no blind one had part in it."""
        links = [(reader, int(writer), why is None) for reader, theirs in seen.items() for writer, why in theirs.items()]
        # Of two nodes both are blind: nobody can say which has the wrong folder.
        blind = [rank for rank in self.roster if (mine := [well for one, other, well in links if rank in (one, other)]) and not any(mine)]
        doubtful = {rank for one, other, well in links if not well and not {one, other} & set(blind) for rank in (one, other)}
        return blind, sorted(doubtful)

    # Links

    def pairs(self) -> list[Finding]:
        """Bandwidth and latency with one partner a round; `value` is the best of the rounds in GB/s, so that a slow partner is not this node's fault."""
        if not self.fit:
            return [Finding("links", "untested", "this node is bad already and stays away from the others")]
        if len(self.members) < 2:
            return [Finding("links", "untested", "no other fit node met")]
        results: dict[str, Any] = {}
        hung: set[int] = set()
        for turn, partner in enumerate(partners(self.members, self.rank, 2 if self.links else ROUNDS)):
            if partner is None or partner in hung:
                continue
            why = self._wait_for(partner, turn)
            if why is None:
                try:
                    self._group_measured(
                        f"pair/{turn}/{min(self.rank, partner)}", sorted((self.rank, partner)), self.transfer_s, str(partner), results
                    )
                    continue
                except (RuntimeError, TimeoutError) as failure:
                    why = str(failure).splitlines()[0][:120]
            hung.add(partner)
            results[str(partner)] = why
        self._tell("pairs", results)
        if self.rank == 0:
            blamed = self._blamed(self._heard("pairs", self.members, 3 + self.transfer_s))
            self.store.set("blamed", json.dumps(blamed))
        blamed = self._told("blamed", 7 + self.transfer_s)
        return self._links(results, [] if blamed is None else blamed)

    def _wait_for(self, partner: int, turn: int) -> str | None:
        """Until the partner is in this round too; why not, where its heart stands still."""
        self._tell(f"turn/{turn}", 1)
        end = time.monotonic() + 10
        while time.monotonic() < end:
            if self._heard(f"turn/{turn}", [partner], 1.0):
                return None
            if self._stale([partner]):
                return "it hangs: its heart stands still"
        return "it did not come to this round in 10 s"

    def _blamed(self, told: Mapping[int, Mapping[str, Any]]) -> list[int]:
        """Nodes that reported nothing, and those none of whose pairs worked though a partner that did report is well otherwise."""
        silent = [rank for rank in self.members if rank not in told]
        blamed = set(silent)
        for rank, results in told.items():
            others = {int(partner): found for partner, found in results.items() if int(partner) not in silent}
            if others and not any(isinstance(found, dict) for found in others.values()):
                blamed.add(rank)
        return sorted(blamed)

    def _links(self, results: Mapping[str, Any], blamed: Sequence[int]) -> list[Finding]:
        self.healthy = [rank for rank in self.members if rank not in blamed]
        well = {self._name(int(partner)): found for partner, found in results.items() if isinstance(found, dict)}
        failed = {int(partner): why for partner, why in results.items() if not isinstance(why, dict)}
        self.measured = {name: found["gbyte_s"] for name, found in well.items()}
        silent = "".join(f"; {self._name(partner)} does not answer: {why}" for partner, why in failed.items() if partner in blamed)
        way = "a cable, a card or a switch port of this node: exclude it"
        if self.rank in blamed:
            shown = "; ".join(f"{self._name(partner)}: {why}" for partner, why in failed.items())
            return [Finding("links", "bad", f"no link of this node works: {shown}", 0, None, way)]
        if not well:
            return [Finding("links", "untested", "no partner answered" + silent)]
        broken = [f"the link to {self._name(partner)} fails: {why}" for partner, why in failed.items() if partner not in blamed]
        best = max(self.measured.values())
        latency = min(found["latency_us"] for found in well.values())
        kind = f"nccl on {self.links} GPUs" if self.links else "gloo on CPUs"
        shown = ", ".join(f"{rate:,.2f} GB/s with {name}" for name, rate in self.measured.items()) + f" ({kind})"
        finding = Finding(
            "links", "warn" if broken else "ok", "; ".join([*broken, shown]) + silent, round(best, 3), None, way if broken else ""
        )
        wanted = self.wanted_gbyte_s
        if wanted is not None and best < 0.75 * wanted:
            # All pairs cross the network at once: where it is tapered, or a dragonfly, nobody reaches his own card's rate. judge.py compares the nodes.
            said = f"{finding.said}; the site's network gives {wanted:,.0f} GB/s"
            finding = replace(finding, state="warn", said=said, limit=round(wanted, 1), way_out=way if broken else _WAY)
        return [
            finding,
            Finding("latency", "ok", f"{latency:,.0f} µs for a small all-reduce of two", round(latency, 1)),
        ]

    @property
    def wanted_gbyte_s(self) -> float | None:
        """What the site's network gives to the GPUs that were measured with; gloo's rate says nothing of a network."""
        return self.links / self.devices * self.nic_gbit_s / 8 if self.links and self.nic_gbit_s else None

    def all_reduce(self) -> Finding:
        """One all-reduce over all that are well; `value` is the bus bandwidth in GB/s."""
        members = self.healthy
        if self.rank not in members or len(members) < 2:
            return Finding(
                "all-reduce", "untested", "this node is not among those that are well" if self.rank not in members else "no other is well"
            )
        results: dict[str, Any] = {}
        try:
            self._group_measured("all", members, self.transfer_s, "all", results)
        except (RuntimeError, TimeoutError) as failure:
            hung = [self._name(rank) for rank in self._stale([rank for rank in members if rank != self.rank])]
            whose = f"{', '.join(hung)} hangs" if hung else str(failure).splitlines()[0][:160]
            return Finding("all-reduce", "untested", f"over {len(members)} nodes it did not end: {whose}")
        rate = results["all"]["gbyte_s"]
        size = (SIZE_CUDA if self.links else SIZE_CPU) >> 20
        shown = f"{rate:,.2f} GB/s of bus bandwidth over {len(members)} nodes, {size} MiB a {'GPU' if self.links else 'node'}"
        # The slowest node and the length of the way set it for all: it is told, never held against a node.
        wanted = self.wanted_gbyte_s
        against = "" if wanted is None else f"; the site's network gives {wanted:,.0f} GB/s"
        return Finding("all-reduce", "ok", shown + against, round(rate, 3), None if wanted is None else round(wanted, 1))

    def _group_measured(self, prefix: str, members: Sequence[int], limit_s: float, name: str, results: dict[str, Any]) -> None:
        """All-reduces over a group of these members' own: GB/s that each sends over all its links (NCCL's bus bandwidth), and the time of a small one.

        Raises RuntimeError or TimeoutError where the group does not come together or does not end in time. It works in a thread: NCCL's first call waits
        for its peer without a limit.
        """
        found: dict[str, Any] = {}
        done = threading.Event()

        def work() -> None:
            try:
                found["well"] = self._reductions(prefix, members, limit_s)
            except BaseException as failure:
                found["failure"] = failure
            done.set()

        threading.Thread(target=work, name=f"doctor {prefix}", daemon=True).start()
        if not done.wait(limit_s + 2):
            self.left.append(prefix)
            raise TimeoutError(f"the group did not come together in {limit_s:g} s")
        if "failure" in found:
            raise found["failure"]
        results[name] = found["well"]

    def _reductions(self, prefix: str, members: Sequence[int], limit_s: float) -> dict[str, float]:
        import torch
        from torch.distributed import PrefixStore, ProcessGroupGloo

        place, count = members.index(self.rank), len(members)
        devices = [torch.device("cuda", link) for link in range(self.links)] or [torch.device("cpu")]
        # NCCL's watchdog would end the process of a healthy node whose partner hangs; our own limit is _reduced's.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")
        groups: list[Any] = []
        try:
            for link, device in enumerate(devices):
                store = PrefixStore(f"{prefix}/{link}", self.store)
                if device.type == "cuda":
                    from torch.distributed import ProcessGroupNCCL

                    torch.cuda.set_device(device)
                    options = ProcessGroupNCCL.Options()
                    options._timeout = datetime.timedelta(minutes=10)
                    groups.append(ProcessGroupNCCL(store, place, count, options))
                else:
                    groups.append(ProcessGroupGloo(store, place, count, datetime.timedelta(seconds=limit_s)))
            size = SIZE_CUDA if self.links else SIZE_CPU
            large = [torch.ones(size // 4, device=device) for device in devices]
            small = [torch.ones(2, device=device) for device in devices]
            _reduced(groups, small, limit_s)  # connects
            tiny = min(_reduced(groups[:1], small[:1], limit_s) for _ in range(10))
            seconds = min(_reduced(groups, large, limit_s) for _ in range(4))
            sent = len(devices) * size * 2 * (count - 1) / count
            return {"gbyte_s": sent / seconds / 1e9, "latency_us": tiny * 1e6}
        finally:
            for group in groups:
                group.abort() if self.links else group.shutdown()

    def leave(self) -> list[Finding]:
        """Rank 0 holds the store until the others need it no more."""
        self._tell("done", 1)
        if self.rank == 0:
            self._heard("done", self.healthy, 5)
            if self.note is not None:
                self.note.unlink(missing_ok=True)
        self.gone.set()
        return []


def meeting_note(out: Path | None) -> Path | None:
    """The file in which rank 0 says where its store is: of this step of this start of this job. None outside Slurm, where an old one could not be told."""
    step = [os.environ.get(name) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID")]
    if out is None or None in step:
        return None
    return out / f".meeting-{'-'.join(map(str, step))}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"


def partners(roster: Sequence[int], rank: int, rounds: int) -> list[int | None]:
    """Whom `rank` meets in each of the first `rounds` rounds of a tournament, in which everyone meets one at a time; None: nobody this time."""
    places: list[int | None] = [*roster, None] if len(roster) % 2 else list(roster)
    half, found = len(places) // 2, []
    for _ in range(min(rounds, len(places) - 1)):
        table = list(zip(places[:half], reversed(places[half:]), strict=True))
        found.append(next(other if one == rank else one for one, other in table if rank in (one, other)))
        places = [places[0], places[-1], *places[1:-1]]
    return found


def _reduced(groups: Sequence[Any], tensors: Sequence[Any], limit_s: float) -> float:
    """Seconds of one all-reduce on every link at once."""
    begin = time.perf_counter()
    works = [group.allreduce([tensor]) for group, tensor in zip(groups, tensors, strict=True)]
    for work, tensor in zip(works, tensors, strict=True):
        if tensor.device.type == "cpu":
            work.wait()  # raises after the group's own limit
            continue
        while not work.is_completed():  # NCCL's wait would only order streams
            if time.perf_counter() - begin > limit_s:
                raise TimeoutError(f"an all-reduce did not end in {limit_s:g} s")
            time.sleep(0)
    return time.perf_counter() - begin


def _tells_time(server: socket.socket, now: Callable[[], float]) -> None:
    """Answer each byte of each connection with this node's time, until the socket is closed."""

    def answer(connection: socket.socket) -> None:
        with connection:
            connection.settimeout(4)
            try:
                while connection.recv(1):
                    connection.sendall(struct.pack("!d", now()))
            except OSError:
                return

    while True:
        try:
            connection, _ = server.accept()
        except OSError:
            return
        threading.Thread(target=answer, args=(connection,), daemon=True).start()


def _offset(address: str, port: int, now: Callable[[], float]) -> tuple[float, float]:
    """`(rank 0's clock minus ours, error)` in seconds, by the fastest of eight questions."""
    found = []
    with socket.create_connection((address, port), timeout=4) as connection:
        for _ in range(8):
            sent, begin = now(), time.perf_counter()
            connection.sendall(b"?")
            told = b""
            while len(told) < 8:
                piece = connection.recv(8 - len(told))
                if not piece:
                    raise ConnectionError("rank 0 closed its clock")
                told += piece
            took = time.perf_counter() - begin
            found.append((took / 2, struct.unpack("!d", told)[0] - (sent + took / 2)))
    error, offset = min(found)
    return offset, error


def _shown(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
