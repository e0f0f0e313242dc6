"""The faults: how each is done to a run, and what the run promises in return. Free of torch.

A fault is a function of a `Case`: it starts the run, waits for its moment, does the harm, and sees the run through to its end. What it returns is the
outcome in a word; a promise that is not kept raises Broken. Moments are drawn from the row's seed and met by watching the run's own files, never by a clock
alone.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from gigatrain.bench.subject import EVERY, STEPS, Broken, Engine, Lab, Subject, Undisturbed, committed, jsonl
from gigatrain.errors import REQUEUE

SMALL_BYTES = 24 << 20  # of the disks that run full
SETTLED = 12  # steps after which a step has a usual length, and a hang is known by it
LEFT = 75  # the code of a run that was asked to leave, and saved
PHASES = ("start", "load", "step", "save", "validation", "end")
_NOTICED = ("was ended by", "lost another rank", "no progress", "HANG", "stuck", "start", "is gone", "saved at step")


class Skipped(Exception):
    """The fault cannot be made here, and why."""


@dataclass
class Harm:
    """One injection and what came of it; None: not seen, or it has no such time."""

    moment: str
    at_step: int
    rank: int | None = None
    detect_s: float | None = None
    recover_s: float | None = None
    lost_steps: int | None = None
    code: int | None = None  # of the command, where it ended


@dataclass
class Case:
    """A row while it happens: a run, the draw of its seed, and the harms so far."""

    lab: Lab
    engine: Engine
    subject: Subject
    draw: random.Random
    kills: int = 1
    harms: list[Harm] = field(default_factory=list)
    old: frozenset[str] = frozenset()  # processes that were there when the last harm was done

    # ---- moments ----

    def launch(self, *sets: str) -> None:
        """The command, from the beginning or from what there is."""
        self.subject.start("--continue", *sets)

    def at(self, moment: str, least: int = 0) -> str:
        """Waits for a moment of the run, of a step not before `least`; says which it was. The command may end first, and then the moment is `ended`."""
        subject, oracle = self.subject, self.lab.undisturbed(self.engine)
        now = subject.step()
        trained = self._reports()

        def gone() -> bool:
            return subject.command is None or subject.command.poll() is not None

        def wait(what: Callable[[], bool]) -> bool:
            subject.until(lambda: what() or gone(), f"the moment {moment!r}", alive=False)
            return not gone()

        delay_s = 0.0
        match moment:
            case "start":
                delay_s = self.draw.uniform(0, oracle.launch_s)
            case "step":
                target = max(now, least) + self.draw.randint(1, 8)
                if not wait(lambda: subject.step() >= min(target, STEPS - 1)):
                    return "ended"
                delay_s = self.draw.uniform(0, oracle.step_s)
            case "save":
                begun = {path.name for path in self._writing()}
                if not wait(lambda: any(path.name not in begun for path in self._writing())):
                    return "ended"
                delay_s = self.draw.uniform(0, 0.03)
            case "load":  # the newest process has the run's folder, and has not begun to train
                if not wait(lambda: subject.process() not in (None, *self.old)):
                    return "ended"
                delay_s = self.draw.uniform(0, 0.8)
            case "validation":
                half = STEPS // 2
                if now >= half or not wait(lambda: subject.step() >= half):
                    return self.at("step") if not gone() else "ended"
                delay_s = self.draw.uniform(0, 0.1)
            case "end":
                if not wait(lambda: subject.step() >= STEPS):
                    return "ended"
                delay_s = self.draw.uniform(0, 0.5)
        end = time.monotonic() + delay_s
        early = moment in ("start", "load")  # both are over with the first step
        while time.monotonic() < end and not gone() and not (early and self._reports() > trained):
            time.sleep(0.001)
        return "ended" if gone() else moment

    def _reports(self) -> int:
        return sum(event["event"] == "report" for event in self.subject.events())

    def _writing(self) -> list[Path]:
        return list((self.subject.folder / "checkpoints").glob(".writing-*"))

    # ---- what follows ----

    def recovers(self, moment: str, harm: Callable[[], int | None], *, waits: bool = True, in_place: bool = False) -> Harm:
        """Does the harm, and waits until the run trains again, in place or by a new command; fills in the three figures.

        in_place: of several ranks the command must not end for it. Without `waits` it comes back as soon as the run was started again, so that the next
        harm meets it before it trains.
        """
        subject = self.subject
        self.old = old = subject.processes()
        printed = len(subject.lines)
        found = Harm(moment, subject.step())
        self.harms.append(found)
        began, wall = time.monotonic(), time.time()
        found.rank = harm()
        ended = None

        def new() -> bool:
            nonlocal ended
            ended = subject.command.poll() if subject.command is not None else None
            return ended is not None or _steps(subject, old) is not None or (not waits and subject.process() not in (None, *old))

        subject.until(new, "training again", alive=False)
        if ended is not None and _steps(subject, old) is None:
            if found.detect_s is None:
                found.detect_s = time.monotonic() - began
            code = found.code = ended if ended >= 0 else 128 - ended
            if code in (2, 3, 4, 5, 6):
                raise Broken(f"the command ended with {code}: {subject.tail()}")
            subject.alone()
            if subject.finished():
                found.lost_steps, found.recover_s = 0, None
                return found
            if in_place and self.engine.ranks > 1 and found.rank is not None and found.rank >= 0:
                raise Broken(f"the command ended with {code}, and one rank of {self.engine.ranks} was harmed: {subject.tail()}")
            self.launch()
        if not waits:
            return found
        found.detect_s = self._noticed_s(printed, began, wall) if found.detect_s is None else found.detect_s
        subject.until(lambda: _trains(subject, old) or subject.finished(), "training again")
        found.recover_s = time.monotonic() - began
        resumed, reached = _steps(subject, old), _reached(subject, old)
        found.lost_steps = max(0, reached - resumed) if resumed is not None else 0
        return found

    def _noticed_s(self, printed: int, began: float, wall: float) -> float | None:
        """Seconds from the harm to the first word of it: the supervisor's record, else a line of the command after the first `printed`."""
        told = jsonl(self.subject.folder / "logs" / "restarts.jsonl")
        records = [event["time_s"] - wall for event in told if event["event"] == "ended" and event["time_s"] >= wall - 0.1]
        said = (at - began for at, line in self.subject.lines[printed:] if any(word in line for word in _NOTICED))
        return max(0.0, records[0]) if records else next(said, None)

    def finishes(self, *sets: str) -> str:
        """Sees the run through to its end, starting it again where it left; then holds it against the undisturbed one."""
        subject = self.subject
        for _ in range(3):
            if subject.command is None or subject.command.poll() is not None:
                if subject.finished():
                    break
                subject.alone()
                self.launch(*sets)
            if (code := subject.ended()) not in (0, LEFT):
                raise Broken(f"the command ended with {code}: {subject.tail()}")
        return self.equals()

    def equals(self, *counted: str) -> str:
        """Bitwise, or Broken; `counted` metrics aside, which count what was done."""
        if why := self.lab.undisturbed(self.engine).differs(Undisturbed.read(self.subject.folder, self.subject.orders), counted):
            raise Broken(f"not the undisturbed run's: {why}")
        return "bitwise equal"

    def victim(self) -> tuple[int, int]:
        """A rank that lives, and its process; any process of the run where no rank has said a word yet."""
        ranks = self.subject.ranks()
        if not ranks:  # none has said a word yet
            return -1, self.draw.choice(sorted(self.subject.pids()))
        rank = self.draw.choice(sorted(ranks))
        return rank, ranks[rank]

    def hit(self, number: int) -> Callable[[], int | None]:
        """A signal to a random rank."""

        def harm() -> int | None:
            rank, pid = self.victim()
            self.subject.signal(pid, number)
            return rank

        return harm

    def restarted(self) -> int:
        """How often a process of the run began."""
        return sum(event["event"] == "start" for event in self.subject.events())


def _steps(subject: Subject, old: frozenset[str]) -> int | None:
    """The step at which a process that is none of the `old` ones began to train."""
    return next((event["step"] for event in reversed(subject.events()) if event["event"] == "steps" and event["process"] not in old), None)


def _reached(subject: Subject, old: frozenset[str]) -> int:
    """The step that the newest of the `old` ones that trained had come to; 0: none trained."""
    own = (event["step"] for event in reversed(subject.events()) if event["event"] in ("steps", "report") and event["process"] in old)
    return next(own, 0)


def _trains(subject: Subject, old: frozenset[str]) -> bool:
    """Whether a process that is none of the `old` ones has done a step."""
    return any(event["event"] == "report" and event["process"] not in old for event in subject.events())


# ---- processes ----


def _ended(number: int) -> Callable[[Case], str]:
    def fault(case: Case) -> str:
        """A signal that ends a rank at once, `kills` times, at moments of every kind."""
        case.launch()
        moments = [case.draw.choice(PHASES[:-2] if count else PHASES) for count in range(case.kills)]
        for moment, after in zip(moments, [*moments[1:], ""], strict=True):
            met = case.at(moment)
            if met == "ended":
                break
            case.recovers(met, case.hit(number), waits=after not in ("start", "load"), in_place=True)
        return case.finishes()

    return fault


def launcher(case: Case) -> str:
    """The process that started the ranks is killed; they must not go on unseen, nor keep the folder."""
    case.launch()
    moment = case.at(case.draw.choice(("step", "save", "validation")))

    def harm() -> int | None:
        assert case.subject.command is not None
        case.subject.signal(case.subject.command.pid, signal.SIGKILL)
        return None

    if moment != "ended":
        case.recovers(moment, harm)
    return case.finishes()


def store(case: Case) -> str:
    """Rank 0, which hosts the store where ranks meet, is killed."""
    case.launch()
    moment = case.at(case.draw.choice(("step", "save")))

    def harm() -> int | None:
        case.subject.signal(case.subject.ranks().get(0, case.victim()[1]), signal.SIGKILL)
        return 0

    if moment != "ended":
        case.recovers(moment, harm, in_place=True)
    return case.finishes()


def node(case: Case) -> str:
    """All processes of the run at once, as when its machine loses power."""
    case.launch()
    moment = case.at(case.draw.choice(("step", "save", "validation")))

    def harm() -> int | None:
        for pid in case.subject.pids():
            case.subject.signal(pid, signal.SIGKILL)
        return None

    if moment != "ended":
        case.recovers(moment, harm)
    return case.finishes()


def _asked_to_leave(number: int) -> Callable[[Case], str]:
    def fault(case: Case) -> str:
        """A signal that asks the run to leave, to the command or to any one rank: it saves and loses nothing."""
        case.launch()
        moment = case.at(case.draw.choice(("start", "step", "save", "validation")))
        if moment == "ended":
            return case.finishes()
        whole = case.draw.random() < 0.5

        def harm() -> int | None:
            rank, pid = case.victim()
            assert case.subject.command is not None
            case.subject.signal(case.subject.command.pid if whole else pid, number)
            return None if whole else rank

        found = case.recovers(moment, harm)
        if moment != "start" and found.lost_steps:
            raise Broken(f"{found.lost_steps} steps were lost, and it was asked to leave")
        if moment != "start" and found.code not in (None, 0, REQUEUE):  # before its first line, as any program: 128 and the signal
            raise Broken(f"the command ended with {found.code}, and {REQUEUE} says that it was asked to leave and saved")
        return case.finishes()

    return fault


def hang(case: Case) -> str:
    """A rank is stopped (SIGSTOP) and never goes on: it is named, and the run goes on without that process."""
    case.launch()
    if case.at("step", SETTLED) != "ended":
        _is_named(case, case.recovers("step", case.hit(signal.SIGSTOP), in_place=True))
    return case.finishes()


def gil(case: Case) -> str:
    """A rank's C code holds the interpreter's lock and never gives it back."""
    case.launch()

    def harm() -> int | None:
        rank, _ = case.victim()
        case.subject.order(max(rank, 0), do="gil")
        return rank

    if case.at("step", SETTLED) != "ended":
        _is_named(case, case.recovers("step", harm, in_place=True))
    return case.finishes()


def _is_named(case: Case, found: Harm) -> None:
    """Whether the supervisor knew that it was a hang, and whose."""
    told = [event for event in jsonl(case.subject.folder / "logs" / "restarts.jsonl") if event["event"] == "ended"]
    if case.engine.ranks > 1 and not any(event.get("hung") and event.get("rank") == found.rank for event in told):
        raise Broken(f"rank {found.rank} hung, and what was told of it is {told[-1:] or 'nothing'}")


def slow(case: Case) -> str:
    """A rank gets half of its processor for three seconds: the run is slower, and nothing is ended for it."""
    case.launch()
    if case.at("step") == "ended":
        return case.finishes()
    rank, pid = case.victim()
    case.harms.append(Harm("step", case.subject.step(), rank))
    end = time.monotonic() + 3
    while time.monotonic() < end and Path(f"/proc/{pid}").exists():
        for number in (signal.SIGSTOP, signal.SIGCONT):
            case.subject.signal(pid, number)
            time.sleep(0.1)
    found = case.finishes()
    if case.restarted() != 1:
        raise Broken(f"a slow rank is no dead one, and {case.restarted() - 1} restarts were made for it")
    return f"{found}, no restart"


def clock(case: Case) -> str:
    """The wall-clock of rank 0 is set back an hour, or forward: nothing hangs on it, and the classes of time still add up."""
    case.launch()
    if case.at("step") == "ended":
        return case.finishes()
    case.harms.append(Harm("step", case.subject.step(), 0))
    case.subject.order(0, do="clock", seconds=case.draw.choice((-3600, 3600)))
    found = case.finishes()
    if case.restarted() != 1:
        raise Broken(f"{case.restarted() - 1} restarts were made because a clock was set")
    return found


# ---- memory ----


def oom(case: Case) -> str:
    """The kernel kills a rank that is beyond its cgroup's memory."""
    group = Path("/sys/fs/cgroup/memory") / f"gigatrain-faults-{os.getpid()}"
    if os.geteuid() or not group.parent.is_dir():
        raise Skipped("needs root and the memory controller of cgroup v1")
    case.launch()
    if case.at("step") == "ended":
        return case.finishes()
    try:
        group.mkdir()
    except OSError as failure:
        raise Skipped(f"no memory cgroup can be made here: {failure.strerror}") from None
    try:

        def harm() -> int | None:
            rank, pid = case.victim()
            (group / "cgroup.procs").write_text(str(pid))
            (group / "memory.limit_in_bytes").write_text(str(48 << 20))
            case.subject.order(max(rank, 0), do="eat", bytes=256 << 20)
            return rank

        case.recovers("step", harm)
        return case.finishes()
    finally:
        case.subject.end()
        for _ in range(50):
            with contextlib.suppress(OSError):
                group.rmdir()
                break
            time.sleep(0.1)


def memory(case: Case) -> str:
    """An allocation of the run's own fails: the same would happen again, so it is told and never tried again unchanged."""
    step = case.draw.randrange(EVERY + 1, STEPS - 1)
    (case.subject.orders / "always.json").write_text(json.dumps({"do": "raise", "kind": "memory", "step": step}))
    case.launch()
    began = time.monotonic()
    code = case.subject.ended()
    case.harms.append(Harm("step", step, None, time.monotonic() - began))
    if case.restarted() > 1:
        raise Broken(f"it was tried {case.restarted()} times, and memory does not grow")
    if code != 7 or not case.subject.said("out of memory"):
        raise Broken(f"it ended with {code}, and 7 says that a run cannot go on: {case.subject.tail()}")
    (case.subject.orders / "always.json").unlink()
    case.subject.alone()
    case.launch()
    return f"code {code}, not tried again; then {case.finishes()}"


# ---- never to be tried again ----


def crash_loop(case: Case) -> str:
    """Every process crashes at the same step: three restarts without a step gained, and the run stops with a code of its own."""
    step = case.draw.randrange(2, EVERY)
    (case.subject.orders / "always.json").write_text(json.dumps({"do": case.draw.choice(("abort", "segv", "kill")), "step": step}))
    began = time.monotonic()
    case.launch("recovery.restarts=3", "recovery.supervised=true")
    code = case.subject.ended()
    case.harms.append(Harm("step", step, None, time.monotonic() - began))
    starts = case.restarted()
    if code != 93:
        raise Broken(f"ended with {code} after {starts} starts, and 93 says that no step is gained: {case.subject.tail()}")
    if starts > 5:
        raise Broken(f"{starts} starts, and three restarts without progress are the limit")
    return f"code 93 after {starts} starts"


def recipe(case: Case) -> str:
    """A recipe that is wrong is refused by name before anything starts."""
    wrong, word = case.draw.choice(
        (
            ("train.batch=0", "train.batch"),
            ("train.bach=8", "train.bach"),
            ("optim.lr=nan", "optim.lr"),
            ("model.architecture.heads=3", "heads"),
        )
    )
    began = time.monotonic()
    case.launch(wrong)
    code = case.subject.ended()
    case.harms.append(Harm("start", -1, None, time.monotonic() - began))
    if code not in (2, 4) or not case.subject.said(word):
        raise Broken(f"{wrong} ended with {code}: {case.subject.tail()}")
    if "Traceback" in case.subject.tail(40) or case.subject.folder.exists():
        raise Broken(f"{wrong} left a traceback or a folder")
    return f"code {code}, named, nothing started"


# ---- disks ----


@contextlib.contextmanager
def mounted(at: Path, *arguments: str) -> Iterator[None]:
    """A file system at a folder, until the end of the block; Skipped where that may not be done."""
    if os.geteuid():
        raise Skipped("needs root, to mount")
    at.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", *arguments, str(at)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Skipped(f"mount: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(at)], capture_output=True, check=False)


def _unsaved(case: Case, since: int) -> str | None:
    """The line that says that a save was not made, after the first `since` lines."""
    return next((line for _, line in case.subject.lines[since:] if "NOT SAVED" in line), None)


def _whole(case: Case) -> None:
    """The newest committed checkpoint is as it was committed, while its disk refuses."""
    import hashlib

    newest = committed(case.subject.folder)[-1]
    record = json.loads((newest / "manifest.json").read_bytes())
    for name, entry in record["files"].items():
        if hashlib.sha256((newest / name).read_bytes()).hexdigest() != entry["sha256"]:
            raise Broken(f"{newest.name}/{name} was harmed while the disk refused")


def _refusing(case: Case, refuse: Callable[[], None], relent: Callable[[], None], *sets: str) -> str:
    """A disk refuses for two saves: the run goes on, says so, keeps its last good checkpoint, and saves again once the disk takes it."""
    subject = case.subject
    case.launch(*sets)
    subject.until(lambda: committed(subject.folder), "the first checkpoint")
    moment = case.at(case.draw.choice(("step", "save")))
    if moment == "ended":
        raise Broken(f"it ended before the fault: {subject.tail()}")
    printed, step = len(subject.lines), subject.step()
    if step > STEPS - 3 * EVERY:  # the last save must be made, or the run is not finished: that a disk refuses it is an error, and rightly
        raise Skipped(f"its moment came at step {step} of {STEPS}, when no two saves were left that may fail; another seed")
    case.harms.append(Harm(moment, step))
    began = time.monotonic()
    refuse()
    try:
        subject.until(lambda: _unsaved(case, printed), "saying that it could not save", 30)
        case.harms[-1].detect_s = time.monotonic() - began
        _whole(case)
    finally:
        relent()
    relented = time.monotonic()
    newest = committed(subject.folder)[-1].name
    subject.until(lambda: committed(subject.folder)[-1].name > newest, "the next save", 30)
    case.harms[-1].recover_s, case.harms[-1].lost_steps = time.monotonic() - relented, 0
    found = case.finishes()
    if case.restarted() != 1:
        raise Broken("training did not go on: it was started again")
    return f"{found}, training went on"


def full(case: Case) -> str:
    """The checkpoints' disk runs full, in a save or between two, and later has room again (tmpfs)."""
    at = case.subject.folder / "checkpoints"
    with mounted(at, "-t", "tmpfs", "-o", f"size={SMALL_BYTES}", "tmpfs"):
        filler = at / "filler"

        def refuse() -> None:
            free = shutil.disk_usage(at).free
            with contextlib.suppress(OSError), filler.open("wb") as file:
                file.write(b"\0" * max(0, free - (64 << 10)))

        return _refusing(case, refuse, lambda: filler.unlink(missing_ok=True))


def full_run(case: Case) -> str:
    """The disk of the whole run folder, logs and metrics included, runs full and later has room again."""
    at = case.subject.folder
    with mounted(at, "-t", "tmpfs", "-o", f"size={SMALL_BYTES}", "tmpfs"):
        filler = at / "filler"

        def refuse() -> None:
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while file.write(b"\0" * 4096):
                    pass

        return _refusing(case, refuse, lambda: filler.unlink(missing_ok=True))


def full_at_start(case: Case) -> str:
    """There is no room for a first checkpoint: refused with the numbers before a step is trained."""
    at = case.subject.folder / "checkpoints"
    with mounted(at, "-t", "tmpfs", "-o", "size=256k", "tmpfs"):
        began = time.monotonic()
        case.launch()
        code = case.subject.ended()
        case.harms.append(Harm("start", -1, None, time.monotonic() - began))
        if code != 6 or not case.subject.said("free") or case.subject.step() > 0:
            raise Broken(f"ended with {code}, at step {case.subject.step()}: {case.subject.tail()}")
    return "code 6, before a step"


def read_only(case: Case) -> str:
    """The checkpoints' folder turns read-only, and later writable again (a bind mount: root may write where modes say no)."""
    at = case.subject.folder / "checkpoints"
    with mounted(at, "-t", "tmpfs", "-o", f"size={SMALL_BYTES}", "tmpfs"):

        def turn(how: str) -> None:
            done = subprocess.run(["mount", "-o", f"remount,bind,{how}", str(at)], capture_output=True, text=True, check=False)
            if done.returncode:
                raise Skipped(f"remount: {done.stderr.strip()}")

        return _refusing(case, lambda: turn("ro"), lambda: turn("rw"))


def syncs(case: Case) -> str:
    """The disk says EIO to fsync: what was written may be lost, so it is no checkpoint. Planted in the run's processes (within.py), which therefore save."""
    path = case.subject.orders / "syncs.json"
    return _refusing(case, path.touch, lambda: path.unlink(missing_ok=True), "checkpoint.background=false")


def stall(case: Case) -> str:
    """The checkpoints' file system freezes for three seconds (fsfreeze on a loop device): whoever writes waits, and nothing else comes of it."""
    if os.geteuid() or not shutil.which("fsfreeze", path=_PATH) or not shutil.which("mkfs.ext4", path=_PATH):
        raise Skipped("needs root, fsfreeze and mkfs.ext4")
    image, at = case.subject.folder.with_suffix(".img"), case.subject.folder / "checkpoints"
    image.parent.mkdir(parents=True, exist_ok=True)
    with image.open("wb") as file:
        file.truncate(2 * SMALL_BYTES)
    environment = os.environ | {"PATH": _PATH}
    made = subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], capture_output=True, text=True, env=environment, check=False)
    if made.returncode:
        raise Skipped(f"mkfs.ext4: {made.stderr.strip()}")
    try:
        with mounted(at, "-o", "loop", str(image)):
            (at / "lost+found").rmdir()
            case.launch()
            moment = case.at(case.draw.choice(("step", "save")))
            case.harms.append(Harm(moment, case.subject.step()))
            began = time.monotonic()
            subprocess.run(["fsfreeze", "-f", str(at)], env=environment, check=True, capture_output=True)
            try:
                time.sleep(3)
            finally:
                subprocess.run(["fsfreeze", "-u", str(at)], env=environment, check=True, capture_output=True)
            found = case.finishes()
            case.harms[-1].recover_s, case.harms[-1].lost_steps = time.monotonic() - began, 0
            if case.restarted() != 1:
                raise Broken("a disk that stalled is no reason to start again")
            return found
    finally:
        image.unlink(missing_ok=True)


def _writing(number: int, pause_s: float) -> Callable[[Case], str]:
    def fault(case: Case) -> str:
        """A signal to the processes that write checkpoints behind training, in a save: the run goes on, and saves again."""
        subject = case.subject
        case.launch()
        pids = subject.until(
            lambda: [pid for pid in subject.pids() if b"writing.py" in _command(pid)], "a process that writes checkpoints beside the run"
        )
        if (moment := case.at("save")) == "ended":
            raise Broken(f"it ended before the fault: {subject.tail()}")
        case.harms.append(Harm(moment, subject.step()))
        began = time.monotonic()
        for pid in pids:
            subject.signal(pid, number)
        time.sleep(pause_s)
        newest = committed(subject.folder)
        for pid in pids:
            subject.signal(pid, signal.SIGCONT)
        subject.until(lambda: committed(subject.folder)[-1:] > newest[-1:], "the next save", 60)
        case.harms[-1].recover_s, case.harms[-1].lost_steps = time.monotonic() - began, 0
        found = case.finishes()
        if case.restarted() != 1:
            raise Broken("training did not go on: it was started again")
        return f"{found}, training went on"

    return fault


def _command(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


# ---- what lies on disk ----


def _damaged(damage: Callable[[Case, list[Path]], str]) -> Callable[[Case], str]:
    def fault(case: Case) -> str:
        """All processes die; then the newest checkpoint is damaged. It is refused by name, and the one before it taken."""
        subject = case.subject
        case.launch()
        subject.until(lambda: len(committed(subject.folder)) >= 3, "three checkpoints")
        if case.at("step") == "ended":
            return case.finishes()
        for pid in subject.pids():
            subject.signal(pid, signal.SIGKILL)
        subject.alone()
        known, old, before = committed(subject.folder), subject.processes(), subject.step()
        name = damage(case, known)
        began = time.monotonic()
        case.harms.append(Harm("rest", before))
        case.launch()
        subject.until(lambda: _trains(subject, old) or subject.finished(), "training again")
        case.harms[-1].recover_s = time.monotonic() - began
        resumed = _steps(subject, old)
        if resumed is None or resumed != int(known[-2].name.removeprefix("step-")):
            raise Broken(f"it went on at step {resumed} with {known[-1].name} damaged ({name}), and {known[-2].name} before it")
        case.harms[-1].lost_steps = before - resumed
        if name and not subject.said("REFUSED", name):
            raise Broken(f"it went on at step {resumed}, and said nothing of {name}")
        found = case.finishes()
        return f"{'refused by name' if name else 'not seen'}, {found}"

    return fault


def _shard(case: Case, folder: Path) -> Path:
    return case.draw.choice(sorted(path for path in folder.iterdir() if path.name != "COMMITTED"))


def _flip(case: Case, known: list[Path]) -> str:
    """One bit of one file."""
    path = _shard(case, known[-1])
    data = bytearray(path.read_bytes())
    place = case.draw.randrange(8 * len(data))
    data[place // 8] ^= 1 << place % 8
    path.write_bytes(data)
    return path.name


def _cut(case: Case, known: list[Path]) -> str:
    """A file loses its end."""
    path = _shard(case, known[-1])
    size = path.stat().st_size
    os.truncate(path, size - case.draw.randint(1, size))
    return path.name


def _swap(case: Case, known: list[Path]) -> str:
    """Two tensor files change places."""
    files = sorted(known[-1].glob("*.safetensors"))
    one, other = case.draw.sample(files, 2)
    held = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(held)
    return known[-1].name


def _foreign(case: Case, known: list[Path]) -> str:
    """A tensor file of an earlier step, whole in itself."""
    path = case.draw.choice(sorted(known[-1].glob("[ow]*.safetensors")))
    shutil.copyfile(known[-2] / path.name, path)
    return path.name


def _lost(case: Case, known: list[Path]) -> str:
    """A tensor file is gone."""
    path = case.draw.choice(sorted(known[-1].glob("*.safetensors")))
    path.unlink()
    return path.name


def _unmarked(case: Case, known: list[Path]) -> str:
    """The commit marker is gone: a save that was cut short, so it never was a checkpoint."""
    (known[-1] / "COMMITTED").unlink()
    return ""


def all_damaged(case: Case) -> str:
    """Every checkpoint is damaged: an error that names each, never a silent start from step 0."""
    subject = case.subject
    case.launch()
    subject.until(lambda: len(committed(subject.folder)) >= 2, "two checkpoints")
    for pid in subject.pids():
        subject.signal(pid, signal.SIGKILL)
    subject.alone()
    names = [_flip(case, [folder]) for folder in committed(subject.folder)]
    began = time.monotonic()
    case.launch()
    code = subject.ended()
    case.harms.append(Harm("rest", subject.step(), None, time.monotonic() - began))
    missing = [name for name in names if not subject.said(name)]
    if code != 6 or missing:
        raise Broken(f"ended with {code}, {len(missing)} of {len(names)} damaged files not named: {subject.tail()}")
    return f"code 6, {len(names)} refused by name"


# ---- numbers ----


def nan(case: Case) -> str:
    """One rank's gradient is not a number, once: the update is refused on all ranks, counted, and the weights stay finite."""
    if case.engine.name.startswith("zero"):
        raise Skipped("DeepSpeed owns its gradients: its own overflow check is tested in tests/engines/test_deepspeed.py")
    step = case.draw.randrange(EVERY, STEPS - EVERY)
    rank = case.draw.randrange(case.engine.ranks)
    case.subject.order(rank, do="nan", step=step)
    case.harms.append(Harm("step", step, rank))
    case.launch()
    if code := case.subject.ended():
        raise Broken(f"ended with {code}: {case.subject.tail()}")
    case.harms[-1].lost_steps = 1
    rows = [row for row in jsonl(case.subject.folder / "metrics.jsonl") if "bad_steps" in row]
    oracle = case.lab.undisturbed(case.engine)
    if rows[-1]["bad_steps"] == 0:  # the step was made again on the same data, and was well
        if not any(row.get("class") == "transient" for row in jsonl(case.subject.folder / "numerics.jsonl")):
            raise Broken("no update was refused, nothing was said, and one gradient was not a number")
        if (counted := rows[-1].get("transient")) != 1:
            raise Broken(f"{counted} faults that passed were counted, and there was one")
        return f"made again as a fault that passed, {case.equals('transient')}"
    if rows[-1]["bad_steps"] != 1:
        raise Broken(f"{rows[-1]['bad_steps']} updates were refused, and one was not a number")
    losses = [[row["loss"] for row in told if "bad_steps" in row] for told in (rows, oracle.metrics)]
    same = next((count for count, (a, b) in enumerate(zip(*losses, strict=True)) if a != b), STEPS)
    if not all(loss is None or abs(loss) < 1e6 for loss in losses[0]) or same < step:
        raise Broken(f"losses are the undisturbed run's for {same} steps, and step {step} was the first that was harmed")
    return "update refused on all ranks, counted"


def copies(case: Case) -> str:
    """One bit of one rank's copy of a weight turns over: it is named before the next save, and the run goes on from the one before."""
    if not case.engine.name.startswith("ddp"):
        raise Skipped("of ranks that hold whole copies (ddp-2)")
    subject = case.subject
    step = case.draw.randrange(2 * EVERY, STEPS - EVERY)
    rank = case.draw.randrange(case.engine.ranks)
    subject.order(
        rank, do="flip", step=step, element=case.draw.getrandbits(30), bit=case.draw.randrange(20)
    )  # of the fraction: no spike tells it
    case.harms.append(Harm("step", step, rank))
    case.launch()
    code = subject.ended()
    if code != 7 or not subject.said("ranks that should hold the same bits do not"):
        raise Broken(f"ended with {code}, and two copies differ since step {step}: {subject.tail()}")
    found = next(row for row in jsonl(subject.folder / "numerics.jsonl") if row.get("tensors"))
    if not all(one["name"].split(" of ")[0] in ("weight", "exp_avg", "exp_avg_sq") and rank in one["ranks"] for one in found["tensors"]):
        raise Broken(f"named is {found['tensors'][:3]}, and a weight of rank {rank} was flipped")
    if not step <= found["step"] <= step + EVERY:
        raise Broken(f"found at step {found['step']}, and a save is made every {EVERY} steps: the bit turned over at {step}")
    if max(int(path.name.removeprefix("step-")) for path in committed(subject.folder)) > step:
        raise Broken("a checkpoint was made of copies that differ")
    subject.alone()
    case.launch()
    return f"named {found['step'] - step} steps later, not saved; gone on, {case.finishes()}"


def tokens(case: Case) -> str:
    """A shard of the corpus is damaged while nothing runs: refused by name when the run goes on."""
    subject = case.subject
    cache = case.lab.folder / f"cache-{case.draw.getrandbits(32):08x}"
    case.launch(f"data.folder={cache}")
    subject.until(lambda: len(committed(subject.folder)) >= 2, "two checkpoints")
    for pid in subject.pids():
        subject.signal(pid, signal.SIGKILL)
    subject.alone()
    shard = case.draw.choice(sorted(cache.rglob("*.bin")))
    data = bytearray(shard.read_bytes())
    data[case.draw.randrange(len(data))] ^= 1 << case.draw.randrange(8)
    shard.write_bytes(data)
    began = time.monotonic()
    case.launch(f"data.folder={cache}")
    code = subject.ended()
    case.harms.append(Harm("rest", subject.step(), None, time.monotonic() - began))
    shutil.rmtree(cache, ignore_errors=True)
    if code != 5 or not subject.said(shard.name):
        raise Broken(f"ended with {code} and {shard.name} is damaged: {subject.tail()}")
    return "code 5, refused by name"


_PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))


@dataclass(frozen=True)
class Fault:
    """A row's kind: its name in the table, what is done, and the promise (RELIABILITY.md) that it tries."""

    name: str
    promise: str
    do: Callable[[Case], str]
    least: int = 1  # ranks without which it is none
    weight: float = 1.0  # how often it is drawn in a long run


FAULTS = {
    one.name: one
    for one in (
        Fault("kill", "P1", _ended(signal.SIGKILL), weight=8),
        Fault("segv", "P1", _ended(signal.SIGSEGV)),
        Fault("abort", "P1", _ended(signal.SIGABRT)),
        Fault("launcher", "P2", launcher, 2),
        Fault("store", "P2", store, 2),
        Fault("node", "P2", node),
        Fault("term", "P17", _asked_to_leave(signal.SIGTERM), weight=2),
        Fault("usr1", "P17", _asked_to_leave(signal.SIGUSR1), weight=2),
        Fault("int", "P17", _asked_to_leave(signal.SIGINT)),
        Fault("stop", "P3", hang, 2),
        Fault("gil", "P3", gil, 2),
        Fault("slow", "P3", slow, 2),
        Fault("clock", "P19", clock),
        Fault("oom", "P5", oom),
        Fault("memory", "P5", memory),
        Fault("crashloop", "P5", crash_loop),
        Fault("recipe", "P5", recipe),
        Fault("enospc", "P8", full),
        Fault("enospcrun", "P8", full_run),
        Fault("fullstart", "P8", full_at_start),
        Fault("erofs", "P8", read_only),
        Fault("eio", "P8", syncs),
        Fault("stall", "P8", stall),
        Fault("writerkill", "P8", _writing(signal.SIGKILL, 0)),
        Fault("writerstop", "P8", _writing(signal.SIGSTOP, 2)),
        Fault("bitflip", "P7", _damaged(_flip), weight=2),
        Fault("truncate", "P7", _damaged(_cut)),
        Fault("swap", "P7", _damaged(_swap)),
        Fault("foreign", "P7", _damaged(_foreign)),
        Fault("lost", "P7", _damaged(_lost)),
        Fault("unmarked", "P6", _damaged(_unmarked)),
        Fault("alldamaged", "P10", all_damaged),
        Fault("nan", "P14", nan),
        Fault("copies", "P15", copies, 2),
        Fault("corpus", "P13", tokens),
    )
}
