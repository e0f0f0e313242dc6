"""One hour of everything at once: what a run is after it, against one that nothing was done to, and what it held meanwhile.

    python benchmarks/soak.py                    an hour: experts and dense, each on the native engine (FSDP2) and then on DeepSpeed (ZeRO-2)
    python benchmarks/soak.py --minutes 2        the short form; what is too short to tell a leak says so

A leg is one recipe on four processes, trained twice for the same steps: undisturbed, then with ranks killed (SIGKILL, started again in place) at exponential
times and, on the native engine, gradients that are no numbers. Both pack documents, of which some are bad, keep checkpoints behind training and in /dev/shm,
measure a package of 40 W in a tree of files, write TensorBoard, and are scraped by two readers of Prometheus. Memory is what is a process's own (RssAnon,
RssShmem), and a leak what it gains once it is WARM_S old, while its allocators fill. `judged` has all that is promised; the command ends with 9 where one
promise is broken, and its folder stays. Moments and ranks are drawn from --seed.
"""

import argparse
import contextlib
import csv
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "observe")]

from rapl import Rapl  # noqa: E402
from test_report_page import Read  # noqa: E402

from gigatrain.bench import faults  # noqa: E402
from gigatrain.bench.subject import Broken, Engine, Lab, Subject, Undisturbed, committed, jsonl  # noqa: E402
from gigatrain.launching import agent  # noqa: E402
from gigatrain.observe import goodput  # noqa: E402
from gigatrain.observe.report.collect import collect  # noqa: E402

RANKS, KEEP, WINDOW, WATTS = 4, 2, 5, 40.0
LOOK_S, SCRAPE_S, WARM_S, AGE_S = 0.5, 2.0, 40.0, 3.0  # AGE_S: how old ranks of two starts are when they are compared
PART, TRIAL = 0.36, 40  # of a leg's time for the undisturbed run, the killed one takes longer; steps that tell how long one takes
MOST_MIB, MOST_FILES, MOST_OTHER = 4.0, 2.0, 0.05
SETS = (
    "data.packing=packed", "train.sequence=128", "validation.every=200", "checkpoint.every=100", f"checkpoint.keep={KEEP}", "checkpoint.near_every=25",
    "recovery.restarts=1000", "recovery.hang_floor_s=60", f"report.every={WINDOW}", 'report.trackers=["tensorboard"]',
)  # fmt: skip
EXPERTS = (f"model.architecture.{one}" for one in ("family=mixtral", "experts=4", "experts_per_token=2", "tied=false"))
MODELS = {"moe": (*SETS, *EXPERTS), "dense": SETS}
ENGINES = {
    "native": Engine("native", RANKS, (f"train.nproc={RANKS}",)),
    "zero2": Engine("zero2", RANKS, (f"train.nproc={RANKS}", "engine.name=deepspeed", "engine.zero=2")),
}
BAD_FILES = {"bad-binary.py": b"\xff\xfe\0x", "bad-latin.py": b"caf\xe9 = 1\n" * 9, "bad-empty.py": b" \n"}
BAD_LINES = (b'{"text": "cut of', b'{"text": NaN}', b'{"body": "no text"}', b'{"text": "caf\xe9"}')
BAD = {"undecodable": 3, "unparsable": 3, "empty": 1}
COLUMNS = ("commit", "date", "device", "versions", "seed", "minutes", "leg", "steps", "kills", "check", "found", "bound", "kept")
ROLES = {b"writing.py": "writer", b"recovery.standby": "standby", b"--serve": "watch"}
GIGATRAIN = [sys.executable, "-m", "gigatrain"]
Points = list[tuple[float, float]]
Check = tuple[str, str, str, bool | None]  # what is promised, what was found, the bound, and whether it was kept; None: too short to tell


def role(pid: int, supervisor: int) -> str:
    """What a process of a run is there for."""
    name, line = (Path(f"/proc/{pid}/{file}").read_bytes() for file in ("comm", "cmdline"))
    if name.startswith(b"gigatrain:") or pid == supervisor:
        return "supervisor" if pid == supervisor else f"rank {name.decode().strip().removeprefix('gigatrain:')}"
    return next((said for word, said in ROLES.items() if word in line), "other")


@dataclass
class Ran:
    """A run while it is watched. `held` has MiB and descriptors by (role, process), each a line of (seconds, value); `folders` a row a look."""

    subject: Subject
    near: Path
    held: dict[str, dict[tuple[str, int], Points]] = field(default_factory=lambda: {name: defaultdict(list) for name in ("MiB", "files")})
    folders: list[dict[str, float]] = field(default_factory=list)
    scrapes: dict[str, list[bool]] = field(default_factory=lambda: defaultdict(list))
    last: str = ""  # what `watch --serve` said last
    kills: int = 0
    planted: int = 0  # gradients that are no numbers
    wall_s: float = 0.0
    joules: float = 0.0  # that the tree's counter grew by

    def processes(self) -> Iterator[tuple[str, int]]:
        """Those that live, by what they are."""
        assert self.subject.command is not None
        for pid in self.subject.pids():
            with contextlib.suppress(OSError):
                yield role(pid, self.subject.command.pid), pid

    def look(self) -> None:
        """Reads /proc and the folders."""
        now, run = time.monotonic(), self.subject.folder
        for key in self.processes():
            with contextlib.suppress(OSError):
                status, count = Path(f"/proc/{key[1]}/status").read_text(errors="replace"), len(os.listdir(f"/proc/{key[1]}/fd"))
                kib = sum(int(line.split()[1]) for line in status.splitlines() if line.startswith(("RssAnon:", "RssShmem:")))
                self.held["MiB"][key].append((now, kib / 1024))
                self.held["files"][key].append((now, count))
        assert self.subject.command is not None
        children, near = agent.children(self.subject.command.pid), list(self.near.glob("*/step-*"))
        counts = {"children": children, "checkpoints": committed(run), "near": near}
        sizes = {"near_kib": kib_of(self.near), "rest_kib": kib_of(run, without="checkpoints")}
        self.folders.append({name: len(found) for name, found in counts.items()} | sizes)

    def kill(self, rank: int) -> None:
        """SIGKILL, if all ranks live; while they start there is nobody whose death would be another's news."""
        ranks = {name: pid for name, pid in self.processes() if name.startswith("rank ")}
        if len(ranks) == RANKS:
            self.subject.signal(ranks[f"rank {rank}"], signal.SIGKILL)
            self.kills += 1


def kib_of(folder: Path, without: str = "") -> float:
    """Of all files below, but for the folders of one name."""
    total = 0
    for path, names, files in os.walk(folder):
        names[:] = [name for name in names if name != without]
        for name in files:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(path, name)).st_size
    return total / 1024


def grown(points: Points) -> float | None:
    """What points gain from the first to the last, by the median slope of those that are half of them apart; None of fewer than 8."""
    half = len(points) // 2
    slopes = [(late - early) / (to - since) for (since, early), (to, late) in zip(points, points[half:], strict=False)]
    return statistics.median(slopes) * (points[-1][0] - points[0][0]) if half >= 4 else None


def gained(series: dict[tuple[str, int], Points]) -> dict[str, float]:
    """By role, what the worst of its processes gained by itself; and in `later ranks` what young ranks gained from start to start."""
    found: dict[str, float] = {}
    young: dict[str, Points] = defaultdict(list)
    for (name, _), points in series.items():
        warm = [(x, y) for x, y in points if x >= points[0][0] + WARM_S]
        if warm and warm[-1][0] - warm[0][0] > 10 and (more := grown(warm)) is not None:
            kind = name.partition(" ")[0]
            found[kind] = max(found.get(kind, more), more)
        if name.startswith("rank ") and (at := next((y for x, y in points if x >= points[0][0] + AGE_S), None)) is not None:
            young[name].append((len(young[name]), at))
    later = [more for points in young.values() if len(points) > 1 and (more := grown(points)) is not None]
    return found | ({"later ranks": max(later)} if later else {})


def prepared(folder: Path, model: str) -> Lab:
    """A lab whose recipe is ours, with bad documents among its files and records."""
    lab = Lab(folder, sets=MODELS[model])
    paths = sorted(path for path in (folder / "corpus").glob("*.py") if path.name not in BAD_FILES)
    records = [json.dumps({"text": part}).encode() for path in paths for part in path.read_text().split("\n\n") if part.strip()]
    for number, line in enumerate(BAD_LINES):
        records.insert(100 * (number + 1), line)
    (folder / "records.jsonl").write_bytes(b"\n".join(records) + b"\n")
    for name, data in BAD_FILES.items():
        (folder / "corpus" / name).write_bytes(data)
    more = f'weight = 0.2 }}, {{ kind = "jsonl", path = {json.dumps(str(folder / "records.jsonl"))}, weight = 0.8 }}]'
    lab.recipe.write_text(lab.recipe.read_text().replace('pattern = "*.py" }]', f'pattern = "*.py", {more}'))
    return lab


def scraped(run: Path, url: str) -> str:
    """What a server of the run's metrics says; nothing where there is none."""
    with contextlib.suppress(OSError, ValueError):
        secret = (run / "logs" / "prometheus.token").read_text().strip()
        with urllib.request.urlopen(urllib.request.Request(url, headers={"Authorization": f"Bearer {secret}"}), timeout=5) as answer:
            return answer.read().decode()
    return ""


def trained(
    subject: Subject, tree: Rapl, shm: Path, steps: int, limit_s: float, draw: random.Random | None = None, mtbf_s: float = 0
) -> Ran:
    """The run from its command to its end, looked at; with a `draw` its ranks are killed. Raises Broken where it ends otherwise than well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ran, run = Ran(subject, shm / subject.folder.name), subject.folder
    began, joules, looked, asked, due, url = time.monotonic(), tree.joules(), 0.0, 0.0, 0.0, ""
    sets = (f"train.steps={steps}", f"checkpoint.near={ran.near}", f"power.sysfs={tree.root}", f"report.prometheus={port}")
    subject.start("--continue", *sets)
    nans = [steps * tenth // 10 for tenth in (2, 5, 8)] if draw is not None and subject.engine.name == "native" else []
    while subject.command is not None and subject.command.poll() is None:
        now = time.monotonic()
        if now - began > limit_s:
            raise Broken(f"it had not ended after {limit_s:.0f} s, at step {subject.step()} of {steps}: {subject.tail()}")
        if now - looked >= LOOK_S:
            looked = now
            ran.look()
        if not url and subject.step() > 0:
            words = [*GIGATRAIN, "watch", str(run), "--serve", "127.0.0.1:0"]
            server = subprocess.Popen(words, env=subject.environment(), stdout=subprocess.PIPE, text=True)  # the subject ends it
            url = server.stdout.readline().split(",")[0] if server.stdout else ""
        if url and now - asked >= SCRAPE_S:
            asked, ran.last = now, scraped(run, url)
            ran.scrapes["watch --serve"].append(bool(ran.last))
            ran.scrapes["report.prometheus"].append(bool(scraped(run, f"http://127.0.0.1:{port}/metrics")))
        if draw is not None and subject.step() >= steps // 10:
            due = due or now + draw.uniform(0, mtbf_s)
            if nans and subject.step() >= nans[0]:
                nans.pop(0)
                ran.planted += 1
                subject.order(draw.randrange(RANKS), do="nan")
            if now >= due and not subject.finished():
                ran.kill(draw.randrange(RANKS))
                due = now + draw.expovariate(1 / mtbf_s)
        time.sleep(0.02)
    ran.wall_s, ran.joules = time.monotonic() - began, tree.joules() - joules
    if code := subject.ended():
        raise Broken(f"it ended with {code} at step {subject.step()} of {steps}: {subject.tail(8)}")
    ran.last = scraped(run, url)
    return ran


def judged(lab: Lab, calm: Ran, ran: Ran, steps: int) -> Iterator[Check]:
    """Every promise of a leg."""
    run = ran.subject.folder
    oracle, found = (Undisturbed.read(one.subject.folder, one.subject.orders) for one in (calm, ran))
    why = oracle.differs(found, ("transient",))
    yield "weights, optimizer, metrics, samples", why or f"{found.weights_sha256[:16]}, {len(found.tensors)} tensors", "bitwise", not why
    told = Counter(row["event"] for row in jsonl(run / "logs" / "restarts.jsonl"))
    again = told["restarted"]
    words = f"{ran.kills}, {told['ended']} starts ended by one, {again} times training again"
    yield "kills", words, "in this order", 0 < again <= told["ended"] <= ran.kills
    for unit, most in (("MiB", MOST_MIB), ("files", MOST_FILES)):
        for how, one in (("undisturbed", calm), ("killed", ran)):
            more = gained(one.held[unit])
            words = ", ".join(f"{kind} {value:+.2f}" for kind, value in sorted(more.items()))
            yield f"{unit} gained, {how}", words or "too short", f"{most:g}", max(more.values()) <= most if more else None
    for what, most, of in (("children", RANKS + 1, statistics.median), ("checkpoints", KEEP + 1, max), ("near", 3, max)):
        count = of([row[what] for row in ran.folders])
        yield f"{what} at once, {of.__name__}", f"{count:.0f}", f"{most}", count <= most
    each = [row["near_kib"] / row["near"] for row in ran.folders if row["near"]]  # KiB of a step
    early, late = (max(part, default=0.0) for part in (each[: len(each) // 2], each[len(each) // 2 :]))
    rest, left = ran.folders[-1]["rest_kib"], [*ran.near.glob("*/*")]
    well = late <= 1.1 * early and not left
    yield "/dev/shm", f"{early:.0f} KiB a step, then {late:.0f}, {len(left)} left", "not 10 % more, none left", well
    most = 512 + 2 * steps + 64 * (again + 1)
    yield "run folder but checkpoints", f"{rest:.0f} KiB", f"{most} KiB: 512, 2 a step, 64 a start", rest <= most
    events = ran.subject.events()
    sessions = goodput.sessions_of(events).all  # to the end of the one that finished it: a rank may be killed as it leaves
    classes, wall_s = goodput.classes(events), sessions[-1].last["time_s"] - sessions[0].first["time_s"]
    off, other = abs(sum(classes.values()) / wall_s - 1), classes["other"] / wall_s
    words = ", ".join(f"{name} {100 * spent / wall_s:.1f} %" for name, spent in classes.items() if spent > 0.0005 * wall_s)
    well = off <= 1e-3 and other <= MOST_OTHER
    yield "seconds by class", f"off by {100 * off:.3f} %: {words}", f"0.1 %, other {100 * MOST_OTHER:.0f} %", well
    path = next((lab.folder / "cache").rglob("skipped.jsonl"))
    skipped, lines = json.loads(path.with_name("manifest.json").read_bytes())["skipped"], (lab.folder / "records.jsonl").read_bytes()
    places = {f"records.jsonl:{lines.index(line)}" for line in BAD_LINES} | {f"{name}:0" for name in BAD_FILES}
    names = {row["document"] for row in jsonl(path)} ^ places
    yield "bad documents", f"{skipped}, {len(names)} named wrongly", f"{BAD}", skipped == BAD and not names
    if ran.planted:
        faulty = Counter(row.get("class") for row in jsonl(run / "numerics.jsonl"))
        yield "no numbers", f"{ran.planted} planted, {dict(faulty)}", "made again", 0 < faulty["transient"] == faulty.total() <= ran.planted
    out = run.with_suffix(".html")
    done = subprocess.run([*GIGATRAIN, "report", str(run), "-o", str(out)], capture_output=True, text=True, check=False)
    value, text = collect(run), " ".join(Read(out.read_text(encoding="utf-8")).words) if not done.returncode else ""
    lacking = [word for word in ("faults", "goodput", "restart", "joule") if word not in text.lower()]
    why = done.stderr or ", ".join((*lacking, *value["missing"])) or value["summary_differs"]
    count = len(value["restarts"])
    yield "report", why or f"readable, {count} restarts", "as progress.jsonl has", not why and count == len(sessions) - 1
    joules, drawn = json.loads((run / "summary.json").read_bytes())["energy"]["joules"]["device"] or 0.0, WATTS * wall_s
    well = abs(joules / drawn - 1) < 0.03 and joules <= 1.01 * ran.joules
    yield "joules", f"{joules:.0f} of {drawn:.0f} drawn meanwhile", "3 %, no more than from launch to exit", well
    words = ", ".join(f"{name} {sum(said)} of {len(said)}" for name, said in ran.scrapes.items())
    counted = ran.last.partition("\ngigatrain_restarts{")[2].partition("\n")[0].endswith(f" {float(count)}")
    well = all(ran.scrapes["watch --serve"]) and any(ran.scrapes["report.prometheus"]) and counted
    yield "scrapers", words, "watch always, the run's own while it lives; restarts", well
    losses = scalars(run)
    yield "tensorboard", f"{len(losses)} losses", "of every window", losses.keys() >= set(range(WINDOW, steps + 1, WINDOW))


def scalars(run: Path) -> dict[int, float]:
    """Step -> loss, of all the files that the starts of a run left."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[int, float] = {}
    for path in sorted(run.rglob("events.out.tfevents*")):
        read = EventAccumulator(str(path), {"scalars": 0}).Reload()
        found |= {one.step: one.value for one in (read.Scalars("loss") if "loss" in read.Tags()["scalars"] else ())}
    return found


def leg(
    lab: Lab, engine: Engine, shm: Path, tree: Rapl, budget_s: float, draw: random.Random, mtbf_s: float
) -> tuple[int, int, list[Check]]:
    """One recipe on one engine: a trial that tells a step's time, the undisturbed run, the killed one. Steps, kills, and what became of the promises."""
    with Subject(lab, engine, lab.folder / f"{engine.name}-trial") as subject:
        trial = trained(subject, tree, shm, TRIAL, 600)
        first, *_, last = (event for event in subject.events() if event["event"] == "report")
        step_s = (last["time_s"] - first["time_s"]) / (last["step"] - first["step"])
    steps = max(120, round(PART * (budget_s - trial.wall_s) / step_s / WINDOW) * WINDOW)
    with Subject(lab, engine, lab.folder / f"{engine.name}-undisturbed") as subject:
        calm = trained(subject, tree, shm, steps, 4 * budget_s + 300)
    with Subject(lab, engine, lab.folder / f"{engine.name}-killed") as subject:
        ran = trained(subject, tree, shm, steps, 8 * budget_s + 600, draw, mtbf_s)
    print(f"  {1e3 * step_s:.0f} ms a step, {steps} steps, undisturbed {calm.wall_s:.0f} s, killed {ran.kills} times {ran.wall_s:.0f} s")
    return steps, ran.kills, list(judged(lab, calm, ran, steps))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="of all legs together, about (default: %(default)g)")
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--models", choices=(*MODELS, "both"), default="both")
    parser.add_argument("--mtbf", type=float, default=20.0, help="seconds between kills, less in the short form (default: %(default)g)")
    parser.add_argument("--work", type=Path, help="a folder that stays (default: one of /tmp, which goes where all is well)")
    parser.add_argument("--csv", type=Path, default=ROOT / "benchmarks" / "results" / "soak.csv", help="to which rows are added")
    options = parser.parse_args()
    legs = [(model, name) for model in MODELS for name in ENGINES if options.models in (model, "both")]
    work, shm = (options.work or Path(tempfile.mkdtemp(prefix="gigatrain-soak-"))).absolute(), Path(tempfile.mkdtemp(dir="/dev/shm"))
    budget_s, bad, fresh = 60 * options.minutes / len(legs), 0, not options.csv.is_file()
    beside = faults.provenance() | {"seed": options.seed, "minutes": options.minutes}
    print(f"seed {options.seed}, {len(legs)} legs of {budget_s:.0f} s, work in {work}", flush=True)
    try:
        with Rapl(work / "sys", WATTS) as tree, options.csv.open("a", encoding="utf-8", newline="") as file:
            out = csv.writer(file)
            if fresh:
                out.writerow(COLUMNS)
            for model, name in legs:
                print(f"{model}, {name}", flush=True)
                draw, mtbf_s = random.Random(f"soak {options.seed} {model} {name}"), min(options.mtbf, budget_s / 8)
                try:
                    steps, kills, checks = leg(prepared(work / model, model), ENGINES[name], shm / model, tree, budget_s, draw, mtbf_s)
                except Broken as failure:
                    steps, kills, checks = 0, 0, [("the run", str(failure), "it ends well", False)]
                for check, found, bound, well in checks:
                    kept = {True: "kept", False: "BROKEN", None: "too short"}[well]
                    bad += well is False
                    print(f"  {kept:9} {check:37} {found}   [{bound}]", flush=True)
                    out.writerow((*beside.values(), f"{model}, {name}", steps, kills, check, found, bound, kept))
                file.flush()
    finally:
        shutil.rmtree(shm, ignore_errors=True)
        if not bad and not options.work and sys.exc_info()[0] is None:
            shutil.rmtree(work, ignore_errors=True)
    print(f"{bad} promises broken; what was left is in {work}" if bad else "every promise kept")
    return 9 if bad else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the runs go too
    sys.exit(main())
