"""Why an attempt of a run failed, and where it hangs: read from what its ranks left (logs.py writes it, hang.py the hangs). Free of torch.

A log without its end is of a rank that was killed, or still runs.
"""

import contextlib
import datetime
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gigatrain.observe.logs import folder_of, newest, printable

TAIL_BYTES = 1 << 16
FULL_BYTES = 1 << 20  # a disk with less is called full
_MARK = re.compile(rb"^\[gigatrain\] rank (\d+) of (\d+) on (\S+), pid (\d+), (begins|ends) (\S+)(?:: code (\d+))?$", re.MULTILINE)


def failures(run: Path, number: int | None = None, *, since: float = 0.0) -> list[dict[str, Any]]:
    """What ranks of an attempt (default: the newest) recorded, primary failures first, each kind in the order in which they happened.

    Between ranks of one node time is that node's monotonic clock; between nodes it is wall-clock, which is as good as their synchronisation.
    """
    counts = _present(run, number)
    found = [record for record in _records(run, number) if record["time_s"] >= since and counts(record["rank"], record["time_s"])]
    offsets: dict[str, float] = {}
    for record in found:
        offsets.setdefault(record["node"], record["time_s"] - record["monotonic_s"])
    return sorted(found, key=lambda record: (record["secondary"], record["monotonic_s"] + offsets[record["node"]], record["rank"]))


def silent(run: Path, number: int | None = None, *, since: float = 0.0) -> list[tuple[int, str]]:
    """Ranks of an attempt, and their nodes, whose log has no end: they were killed, their node is gone, or they still run.

    Outside of jobs all starts share one attempt: logs that say nothing after `since`, and those of ranks that the newest start does not have, are of others.
    """
    number = newest(run) if number is None else number
    if number is None:
        return []
    last = [marks[-1] for path in sorted(folder_of(run, number).glob("rank-*.log")) if (marks := _marks(path, whole=since > 0))]
    ranks = int(max(last, key=lambda mark: _time_s(mark[5]))[1]) if last else 0
    return [
        (int(mark[0]), mark[2].decode("utf-8", "replace"))
        for mark in last
        if mark[4] == b"begins" and _time_s(mark[5]) >= since and int(mark[0]) < ranks
    ]


def _present(run: Path, number: int | None) -> Callable[[int, float], bool]:
    """Whether what a rank left at a time is of the newest start: a resume with fewer ranks leaves the files of the others where they are."""
    number = newest(run) if number is None else number
    marks = _marks(folder_of(run, number) / "rank-00000.log") if number is not None else []
    begins = [mark for mark in marks if mark[4] == b"begins"]
    if not begins:
        return lambda rank, time_s: True
    ranks, began_s = int(begins[-1][1]), _time_s(begins[-1][5])
    return lambda rank, time_s: rank < ranks or time_s >= began_s


def first_failure(run: Path, number: int | None = None, *, since: float = 0.0) -> str | None:
    """Why an attempt (default: the newest) failed: the first rank that failed by itself, above all others; None if nothing failed.

    Call it when the ranks have ended: one that still runs has left no word of its end either. `since` leaves
    out what was recorded before that time (seconds since 1970).
    """
    number = newest(run) if number is None else number
    if number is None:
        return None
    found, quiet = failures(run, number, since=since), silent(run, number, since=since)
    if not found and not quiet:
        return None
    lines = []
    stuck = hung(run, number, since=since) if not found or found[0]["secondary"] else None
    if stuck:  # nobody failed by itself: who waits until a collective's limit is ended by it, NCCL's watchdog without a word
        lines += stuck.splitlines()
    if found and not (found[0]["secondary"] and quiet):
        first = found[0]
        where = f", at step {first['step']}" if first["step"] is not None else f", in {first['phase']}"
        lines.append(f"rank {first['rank']} of {first['ranks']} on {first['node']} failed first ({first['time']}{where}): {first['type']}")
        lines += first["traceback"].rstrip().splitlines() if first["ours"] else first["message"].splitlines()
    if quiet:
        nodes = dict.fromkeys(node for _, node in quiet)
        more = f" and {len(nodes) - 8} more" if len(nodes) > 8 else ""
        why = "killed (out of memory?)"
        if stuck:
            why = "ended by the time limit of a collective, killed"
        elif _full(run):
            why = "its disk, which is full, could not keep one, or it was killed"
        lines.append(f"{_named(rank for rank, _ in quiet)} left no word: {why}, or the node was lost ({', '.join(list(nodes)[:8])}{more})")
    others = found[1:] if found and not (found[0]["secondary"] and quiet) else found
    for secondary, what in ((False, "failed too"), (True, "stopped because of another")):
        if ranks := [record["rank"] for record in others if record["secondary"] == secondary]:
            lines.append(f"{_named(ranks)} {what}")
    told = found[0]["rank"] if found and not found[0]["secondary"] else quiet[0][0] if quiet else found[0]["rank"]
    lines.append(f"its log: {folder_of(run, number) / f'rank-{told:05d}.log'}")
    return printable("\n".join(lines))


def hung(run: Path, number: int | None = None, *, since: float = 0.0) -> str | None:
    """Which ranks of an attempt wait in which phase, and which say nothing; None if no rank reported a hang."""
    found = hangs(run, number, since=since)
    if not found:
        return None
    by_phase: dict[tuple[str, int | None], list[dict[str, Any]]] = {}
    for record in found:
        by_phase.setdefault((record["phase"], record["step"]), []).append(record)
    lines = []
    for (phase, step), records in sorted(by_phase.items(), key=lambda item: -len(item[1])):
        longest = max(record["seconds"] for record in records)
        lines.append(f"{_named(record['rank'] for record in records)}: no progress for {longest:.0f} s in {phase}, after step {step or 0}")
    quiet = sorted(set(range(found[0]["ranks"])) - {record["rank"] for record in found})
    if quiet:
        lines.append(f"{_named(quiet)}: no report of a hang: at work, stopped, or lost; look there first")
    lines.append(f"stacks: {found[0]['path']}")
    return "\n".join(lines)


def hangs(run: Path, number: int | None = None, *, since: float = 0.0) -> list[dict[str, Any]]:
    """The hangs that ranks of an attempt reported after `since` and that are not over, by rank."""
    number = newest(run) if number is None else number
    found, counts = [], _present(run, number)
    if number is not None:
        for path in sorted((folder_of(run, number) / "errors").glob("rank-*-hang.txt")):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
                with path.open(encoding="utf-8", errors="replace") as file:
                    record = json.loads(file.readline(65536))
                if (at := _time_s(record["time"].encode())) < since or not counts(int(record["rank"]), at):
                    continue
                found.append(
                    {key: record[key] for key in ("time", "rank", "ranks", "node", "step", "phase", "seconds")} | {"path": str(path)}
                )
    return found


def _records(run: Path, number: int | None) -> Iterator[dict[str, Any]]:
    number = newest(run) if number is None else number
    if number is None:
        return
    for path in sorted((folder_of(run, number) / "errors").glob("rank-*.json")):
        with contextlib.suppress(
            OSError, ValueError, KeyError, TypeError, RecursionError
        ):  # half written by a rank that was killed meanwhile
            record = json.loads(path.read_text(encoding="utf-8"))
            if not all(isinstance(record[key], str) for key in ("time", "node", "type", "message", "traceback")):
                continue
            yield record | {"time_s": float(record["time_s"]), "monotonic_s": float(record["monotonic_s"]), "rank": int(record["rank"])}


def _marks(path: Path, *, whole: bool = False) -> list[Sequence[bytes]]:
    """The marks at the end of a log; if its last bytes have none, those at its beginning, or with `whole` the last of all."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            for tail in (TAIL_BYTES // 16, TAIL_BYTES):  # most logs end with one
                file.seek(max(0, size - tail))
                if found := _MARK.findall(file.read(tail)):
                    return found
            end = size
            while whole and end > 0:
                begin = max(0, end - (1 << 20))
                file.seek(begin)
                if found := _MARK.findall(file.read(end - begin + 512)):  # 512: a mark on the border
                    return found
                end = begin
            file.seek(0)
            return [mark for mark in _MARK.findall(file.read(TAIL_BYTES)) if mark[4] == b"begins"]
    except OSError:
        return []


def node_of(run: Path, number: int | None, rank: int) -> str | None:
    """The node that a rank of an attempt says that it is on; None: it left no log, or says nothing there."""
    marks = [] if number is None else _marks(folder_of(run, number) / f"rank-{rank:05d}.log")
    return marks[-1][2].decode("utf-8", "replace") if marks else None


def _time_s(said: bytes) -> float:
    """Seconds since 1970 of a mark's time; what is none is of now, so that nothing is left out for it."""
    try:
        return datetime.datetime.fromisoformat(said.decode("ascii")).timestamp()
    except (ValueError, OverflowError):
        return float("inf")


def _full(run: Path) -> bool:
    """Whether the run's disk has no room for a failure's record."""
    with contextlib.suppress(OSError):
        return shutil.disk_usage(run).free < FULL_BYTES
    return False


def _named(ranks: Iterable[int]) -> str:
    """`rank 3`, `ranks 0-2, 7`: runs of numbers, at most eight of them."""
    ordered = sorted(set(ranks))
    spans: list[list[int]] = []
    for rank in ordered:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    shown = ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in spans[:8])
    shown += f" and {sum(last - first + 1 for first, last in spans[8:])} more" if len(spans) > 8 else ""
    return f"rank{'s' if len(ordered) > 1 else ''} {shown}"
