"""The judgement over all nodes of a job: who is fit, who is slow beside the others, who said nothing; and who trains.

Slow is said by robust statistics over nodes of the same hardware. With m the median and s = max(1.4826 MAD, FLOOR m), a node is slow where its figure is
worse than m by more than 5 s. For normal noise that is one false alarm in three million nodes; the floor of 2 % (CPUs, whose cores are shared: 10 %) means
that nothing within 10 % (50 %) of the median is ever called slow, so two to four nodes that are about equal never are. Of two nodes no one can say which is
slow. A node that is 15 % slower is found where the others scatter by less than 2 % (of three nodes, whose scatter is hardly
known, one in six is missed). Slow nodes are suspect: a spare is taken instead if there is one.
"""

import fcntl
import json
import os
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gigatrain.errors import RunError
from gigatrain.preflight import verdict as verdicts
from gigatrain.preflight.findings import HUNG, RAISED, Finding, Health, State
from gigatrain.preflight.network import PARTS
from gigatrain.preflight.verdict import Verdict

TIMES = 5.0
FLOOR = {"cuda": 0.02, "cpu": 0.10}
# A synced write scatters much: only one that is slower than a fifth of the median stands out. A latency depends on how many switches the pairs are apart.
FLOORS = {"scratch write": 0.16, "latency": 0.20}
# Findings whose value is a figure of the node's own, and which way is better. On CPUs the nodes of a test share cores and one loopback: only the burn.
COMPARED: dict[str, Literal["higher", "lower"]] = {
    "burn": "higher",
    "device memory": "higher",
    "host to device": "higher",
    "host memory": "higher",
    "links": "higher",
    "gpu links": "higher",
    "latency": "lower",
    "scratch write": "higher",
}
COMPARED_CPU = ("burn",)
# Work on the device: what was done on some nodes and not on another is doubtful there.
WORKED = ("torch gpus", "burn", "device memory", "gpu links", "host to device", "kernel", "host memory")
# What is wrong with a node's own parts, and will be tomorrow. All else (late, silent, another clock or version, the run's folder) costs this attempt only.
LASTING = (
    "ecc",
    "recovery",
    "throttle",
    "temperature",
    "pcie",
    "nvlink",
    "kernel log",
    "gpus",
    "amd gpus",
    "burn",
    "under load",
    "burn equality",
    "network cards",
    "memory",
    "links",
    "scratch",
    "scratch space",
    "scratch write",
    "scratch lock",
)


@dataclass
class Row:
    """One node: what became of it and why."""

    node: str
    health: Health
    reasons: list[str]
    chosen: bool = False
    excluded: bool = False


@dataclass
class Judgement:
    """`chosen` train, in order; `short` says what is missing where they are too few; `notes` what a reader should know beside the rows."""

    rows: list[Row]
    chosen: list[str]
    wanted: int
    notes: list[str] = field(default_factory=list)

    @property
    def short(self) -> str | None:
        if len(self.chosen) >= self.wanted:
            return None
        bad = sum(row.health == "bad" for row in self.rows)
        return (
            f"{len(self.chosen)} of {len(self.rows)} nodes can train and {self.wanted} are wanted; {bad} {'is' if bad == 1 else 'are'} bad, see above. "
            "Ask for more spares (gigatrain launch --spares), or mend what is named"
        )


def slow(figures: Mapping[str, float], better: Literal["higher", "lower"] = "higher", floor: float = FLOOR["cuda"]) -> dict[str, float]:
    """Node -> its figure over the median, of those that stand out on the worse side."""
    if len(figures) < 3:
        return {}
    middle = statistics.median(figures.values())
    if middle <= 0:
        return {}
    spread = 1.4826 * statistics.median(abs(value - middle) for value in figures.values())
    limit = TIMES * max(spread, floor * middle)
    sign = 1 if better == "higher" else -1
    return {node: value / middle for node, value in figures.items() if sign * (middle - value) > limit}


def judge(
    folder: Path,
    nodes: int,
    expect: Sequence[str] = (),
    excluded: Path | None = None,
    run: str = "",
    down: Sequence[str] = (),
) -> Judgement:
    """Read every verdict of `folder`, compare them, choose `nodes` of them and append those whose fault lasts (LASTING) to `excluded`.

    The order is that of `expect` (the allocation's), else of the ranks, which Slurm gives by its node list: by topology where the site has one. A fault
    that more than half of the nodes share (a full file system, a launcher's mistake) is no node's own: it keeps them from training, and nobody is excluded;
    a warning that as many share (a limit of the site's, a port that is not cabled) puts none of them behind the others. Silence alone puts a node on the
    list only if it is one of `down`, those that the scheduler itself calls down.
    Raises RunError where there is no folder.
    """
    if not folder.is_dir():
        raise RunError(f"{folder} is not a folder of verdicts; `gigatrain doctor --out {folder}` on each node writes them")
    read = {path.stem: verdicts.read(path) for path in folder.glob("*.json")}
    order = list(dict.fromkeys(expect)) or sorted(read, key=lambda node: (read[node].rank, node))
    added: dict[str, list[Finding]] = defaultdict(list)
    for node in order:
        if node not in read:
            added[node].append(Finding("verdict", "bad", "it said nothing: the doctor did not start there, or died"))
        elif read[node].running is not None:
            said = f"the doctor did not come to its end there: it stopped in {read[node].running}"
            added[node].append(Finding("verdict", "bad", said))
    order += _unnamed(read, added) if not expect else []
    here = {node: read[node] for node in order if node in read}
    blamed = _meeting(here)
    _compare(here, added)
    findings = {
        node: [blamed.get((node, one.name), one) for one in (here[node].findings if node in here else [])] + added[node] for node in order
    }
    rows = [_row(node, findings[node]) for node in order]
    judgement = Judgement(rows, [], nodes)
    _choose(judgement, findings)
    if told := _all_reduce(here.values()):
        judgement.notes.append(told)
    untested = [{one.name for one in found.findings if one.state == "untested"} for found in here.values()]
    if everywhere := set.intersection(*untested) if untested else set():
        judgement.notes.append(f"not tested on any node: {', '.join(sorted(everywhere))}")
    if blamed:
        judgement.notes.append("the network between the nodes was not tested: the host of their meeting, rank 0, is at fault")
    if outside := sorted(set(read) - set(order)):
        judgement.notes.append(f"not asked for, and left out: {', '.join(outside[:8])}{' …' if len(outside) > 8 else ''}")
    _exclude(judgement, findings, excluded, run, set(order) & set(down) - set(read))
    return judgement


def _unnamed(read: Mapping[str, Verdict], added: dict[str, list[Finding]]) -> list[str]:
    """Tasks of the job that left no verdict, where nobody said which nodes there are: known by their rank only, and so never put on a list."""
    ranks = max((found.ranks for found in read.values()), default=1)
    missing = sorted(set(range(ranks)) - {found.rank for found in read.values()}) if ranks > 1 else []
    names = [f"rank {rank}" for rank in missing]
    for name in names:
        added[name].append(Finding("verdict", "bad", "it said nothing, and --expect did not say which node it is"))
    return names


def _row(node: str, findings: Sequence[Finding]) -> Row:
    whole = Verdict(node, list(findings))
    return Row(node, whole.health, whole.reasons)


def _meeting(read: Mapping[str, Verdict]) -> dict[tuple[str, str], Finding]:
    """Where the host of the meeting itself is silent or did not meet, the others' failure to meet is not their own."""
    host = next((one for one in read.values() if one.rank == 0 and one.ranks > 1), None)
    met = host is not None and host.running is None and any(one.name == "rendezvous" and one.state == "ok" for one in host.findings)
    if met:
        return {}
    return {
        (node, one.name): Finding(one.name, "untested", f"{one.said} (the meeting's host, rank 0, is at fault)", one.value, one.limit)
        for node, found in read.items()
        if found.rank != 0
        for one in found.findings
        if one.name in PARTS and one.state == "bad"
    }


def _all_reduce(read: Iterable[Verdict]) -> str | None:
    """What the all-reduce over all nodes reached, where that is less than half of what the site's network gives: no node's fault that it could tell."""
    found = [one for verdict in read for one in verdict.findings if one.name == "all-reduce" and one.state == "ok"]
    low = [one for one in found if isinstance(one.value, float) and isinstance(one.limit, float) and one.value < 0.5 * one.limit]
    return f"all-reduce: {low[0].said}; the slowest node and the longest way set it" if low else None


def _compare(read: Mapping[str, Verdict], added: dict[str, list[Finding]]) -> None:
    """Add to each node what only the others show: work that it did not do, a slow figure, another result of the burn."""
    states = {node: {one.name: one.state for one in found.findings} for node, found in read.items()}
    done = {name for told in states.values() for name in WORKED if told.get(name, "untested") != "untested"}
    for node, told in states.items():
        if missed := [name for name in WORKED if name in done and told.get(name) == "untested"]:
            said = f"{', '.join(missed)}: tested on other nodes, not on this one"
            added[node].append(
                Finding("work", "warn", said, len(missed), 0, "a GPU or a file system that is slow to start; see its verdict")
            )
    alike: dict[tuple[str, str], list[str]] = defaultdict(list)
    for node, found in read.items():
        alike[str(found.facts.get("hardware")), str(found.facts.get("device", "cpu"))].append(node)
    for (hardware, device), nodes in alike.items():
        for name, better in COMPARED.items():
            if device == "cpu" and name not in COMPARED_CPU:
                continue
            figures = {
                node: float(one.value)
                for node in nodes
                for one in read[node].findings
                if one.name == name and one.state in ("ok", "warn") and isinstance(one.value, (int, float))
            }
            for node, share in slow(figures, better, FLOORS.get(name, FLOOR.get(device, FLOOR["cuda"]))).items():
                middle = statistics.median(figures.values())
                said = f"{name} is {share:.0%} of the median of {len(figures)} nodes ({figures[node]:g}, median {middle:g})"
                added[node].append(Finding(f"slow {name}", "warn", said, figures[node], middle, "exclude the node if it stays so"))
        # One build of torch on one kind of hardware gives one result; where several do, the odd ones compute wrong.
        digests = {node: (read[node].facts["digest"], read[node].versions.get("torch")) for node in nodes if read[node].facts.get("digest")}
        counts = Counter(digests.values())
        if len(counts) > 1:
            usual, most = counts.most_common(1)[0]
            for node, found in digests.items():
                if found != usual and found[1] == usual[1] and most * 2 > len(digests):
                    said = f"its product is {found[0]}, {most} nodes of the same hardware ({hardware}) agree on {usual[0]}"
                    added[node].append(Finding("burn equality", "bad", said, found[0], usual[0], "it computes wrong numbers: exclude it"))


def _shared(findings: Mapping[str, Sequence[Finding]], state: State) -> set[str]:
    """Names of what more than half of the nodes have in this state."""
    counts = Counter(name for found in findings.values() for name in {one.name for one in found if one.state == state})
    return {name for name, count in counts.items() if count >= 2 and count * 2 > len(findings)}


def _choose(judgement: Judgement, findings: Mapping[str, Sequence[Finding]]) -> None:
    shared = _shared(findings, "warn")
    fit = [row for row in judgement.rows if row.health != "bad"]
    own = {row.node for row in fit if any(one.state == "warn" and one.name not in shared for one in findings[row.node])}
    healthy = [row for row in fit if row.node not in own][: judgement.wanted]
    suspects = [row for row in fit if row.node in own][: judgement.wanted - len(healthy)]
    if shared:
        judgement.notes.append(f"warnings of more than half of the nodes, which put none behind another: {', '.join(sorted(shared))}")
    for row in (*healthy, *suspects):
        row.chosen = True
    judgement.chosen = [row.node for row in judgement.rows if row.chosen]
    if suspects:
        names = ", ".join(row.node for row in suspects)
        judgement.notes.append(f"no healthy node was left: {names} train{'s' if len(suspects) == 1 else ''} though suspect")


def _exclude(judgement: Judgement, findings: Mapping[str, Sequence[Finding]], excluded: Path | None, run: str, lost: Set[str]) -> None:
    """Append the nodes whose fault lasts, and those `lost`, to the site's list, each with its own reasons; several jobs may append at once."""
    shared = _shared(findings, "bad")
    if shared:
        judgement.notes.append(
            f"shared by more than half of the nodes, so no node's own fault and no reason to exclude one: {', '.join(sorted(shared))}"
        )
    lines: list[str] = []
    for row in judgement.rows:
        own = [f"{one.name}: {one.said}" for one in findings[row.node] if row.node in lost or (_lasting(one) and one.name not in shared)]
        named = row.node in findings and not row.node.startswith("rank ")
        if own and named and excluded is not None:
            row.excluded = True
            lines.append(json.dumps({"node": row.node, "reason": "; ".join(own)[:1000], "time": verdicts.now(), "run": run}) + "\n")
    if excluded is not None and lines:
        excluded.parent.mkdir(parents=True, exist_ok=True)
        _append(excluded, lines)


def _lasting(finding: Finding) -> bool:
    """A check that hung or failed itself has found nothing: the next attempt asks again."""
    return finding.state == "bad" and finding.name in LASTING and finding.way_out not in (HUNG, RAISED)


def _append(path: Path, lines: Iterable[str]) -> None:
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("".join(lines))
        file.flush()
        os.fsync(file.fileno())
