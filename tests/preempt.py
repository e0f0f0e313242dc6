"""Signals at any moment of a run, from a process of their own: `python tests/preempt.py --count 100 --seed 1` prints what came of each.

A run is started again and again with `--continue`, and each time but the last one of its processes gets SIGTERM or SIGUSR1, at a random moment or once it is
at a named phase; or all processes of its group do, as a scheduler's signals go. What must hold is said by `check`; the last start is left alone, and the
weights must then be those of a run that nobody disturbed, bit for bit.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gigatrain.errors import REQUEUE

GRACE_S = 30.0  # the shortest that schedulers give; the machine of a test does other things too
STEPS = 30
# One update is told of at a time, and a validation takes as long as many steps.
SETS = {
    "train.steps": STEPS, "train.batch": 12, "report.every": 1, "checkpoint.every": 7, "checkpoint.keep": 3, "validation.every": 10,
    "validation.max_samples": 400, "data.validation": 0.3, "sample.prompt": '"def "', "sample.tokens": 60,
}  # fmt: skip
PHASES = ("boot", "torch", "corpus", "build", "first save", "step", "validation", "save", "export", "sample")


@dataclass(frozen=True)
class Told:
    """One signal, and what came of it."""

    ranks: int
    moment: str
    name: str
    victim: str
    code: int
    seconds: float
    step: int  # that is committed afterwards
    reached: int  # the last that was told of before the signal
    heard: bool  # False: it was sent before Python had come to our first line, and ends the process as any signal ends any program


def command(recipe: Path, run: Path, ranks: int, *sets: str) -> list[str]:
    said = [f"{name}={value}" for name, value in SETS.items()] + [f"train.nproc={ranks}", *sets]
    return [
        sys.executable, "-m", "gigatrain", "train", str(recipe), "--run", str(run), "--continue", *(part for one in said for part in ("--set", one)),
    ]  # fmt: skip


def committed(run: Path) -> int:
    return max((int(path.parent.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*/COMMITTED")), default=-1)


def reported(run: Path) -> list[dict]:
    try:
        return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    except (OSError, ValueError):
        return []


def at(phase: str, run: Path, cache: Path, pids: list[int]) -> bool:
    """Whether the run is at `phase`, from what can be seen of it."""
    saves = [path.name for path in (run / "checkpoints").glob(".writing-*")] if run.exists() else []
    if phase == "boot":
        return bool(pids)
    if not any("libtorch_cpu" in Path(f"/proc/{pid}/maps").read_text() for pid in pids if os.path.exists(f"/proc/{pid}/maps")):
        return False  # of the starts before this one
    if phase == "torch":
        return True
    if phase == "corpus":
        return any(cache.rglob("tokenizer*")) and not any(cache.rglob("manifest.json"))
    if phase == "build":
        return any(cache.rglob("manifest.json")) and any((run / "logs").glob("attempt-*/rank-*"))
    if phase == "first save":
        return any(name.startswith(".writing-00000000") for name in saves)
    if phase == "step":
        return bool(reported(run))
    if phase == "validation":
        rows = reported(run)
        return bool(rows) and rows[-1]["step"] % 10 == 0 and "val_loss" not in rows[-1]
    if phase == "save":
        return any(not name.startswith(".writing-00000000") for name in saves)
    if phase == "export":
        return bool(list(run.glob(".export.*")))
    return (run / "summary.json").exists()


def ranks_of(parent: int) -> list[int]:
    """Processes of a run that are told: the one that was started, and its ranks."""
    found = [parent]
    try:
        for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
            if b"gigatrain\0train" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(int(child))
    except OSError:
        pass
    return found


def hears(pid: int) -> bool:
    """Whether a process catches SIGTERM, or keeps it for later."""
    try:
        masks = [line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(("SigCgt:", "SigBlk:"))]
    except OSError:
        return False
    return any(int(mask, 16) >> (signal.SIGTERM - 1) & 1 for _, mask in masks)


def left_over(run: Path) -> list[str]:
    """Processes that still have the run's folder in their command or open files."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                words = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if str(run).encode() in words:
                found.append(f"{entry.name}: {words[:200]!r}")
    return found


def tell(recipe: Path, run: Path, ranks: int, moment: str | float, chance: random.Random, cache: Path) -> tuple[Told, str]:
    """Start the run, send one signal, and wait for its end; what came of it, and what it said."""
    began = len(reported(run))
    process = subprocess.Popen(
        command(recipe, run, ranks),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    end = time.monotonic() + (moment if isinstance(moment, float) else 120)
    while time.monotonic() < end and process.poll() is None:
        if isinstance(moment, str) and (moment != "step" or len(reported(run)) > began) and at(moment, run, cache, ranks_of(process.pid)):
            time.sleep(chance.uniform(0, 0.1 if moment == "boot" else 0.02))
            break
        time.sleep(0.001)
    number = chance.choice((signal.SIGTERM, signal.SIGUSR1))
    known = ranks_of(process.pid)
    pid = chance.choice(known)
    group = chance.random() < 0.25
    heard = hears(pid)
    reached, begun = max((row["step"] for row in reported(run)), default=-1), time.monotonic()
    if process.poll() is None:
        try:
            os.killpg(pid, number) if group else os.kill(pid, number)
            if chance.random() < 0.5:  # schedulers send more than one
                time.sleep(chance.uniform(0, 0.3))
                os.kill(pid, signal.SIGTERM)
        except ProcessLookupError:
            pass
    try:
        said, _ = process.communicate(timeout=4 * GRACE_S)
    except subprocess.TimeoutExpired:
        for one in ranks_of(process.pid):
            os.kill(one, signal.SIGKILL)
        said = process.communicate()[0] + "\nIT DID NOT LEAVE"
    victim = f"{'group of ' if group else ''}{'starter' if ranks > 1 and pid == process.pid else f'rank {max(0, known.index(pid) - (ranks > 1))}'}"
    where = moment if isinstance(moment, str) else f"{moment:.2f} s"
    return Told(ranks, where, number.name, victim, process.returncode, time.monotonic() - begun, committed(run), reached, heard), said


def check(told: Told, run: Path, said: str) -> list[str]:
    """What is wrong with one outcome; nothing."""
    wrong = []
    over = (run / "summary.json").exists() and told.code == 0
    if told.code != REQUEUE and not over and (told.heard or told.code != -signal.Signals[told.name]):
        wrong.append(f"exit code {told.code}")
    if told.seconds > GRACE_S and not over:
        wrong.append(f"took {told.seconds:.1f} s")
    if told.step < told.reached:
        wrong.append(f"step {told.reached} was done and {told.step} is saved")
    if "Traceback" in said:
        wrong.append("a traceback")
    end = time.monotonic() + 5
    while (still := left_over(run)) and time.monotonic() < end:
        time.sleep(0.05)
    return wrong + [f"still running: {one}" for one in still]


def campaign(
    recipe: Path,
    folder: Path,
    count: int,
    seed: int,
    choices: tuple[int, ...] = (1, 2, 3, 4),
    say: Callable[[str], None] = print,
    life_s: float = 9.0,
) -> list[Told]:
    """`count` signals over as many runs as that takes; AssertionError with the seed if anything does not hold."""
    chance = random.Random(seed)
    found: list[Told] = []
    expected: dict[int, str] = {}
    number = 0
    while len(found) < count:
        ranks = choices[number % len(choices)]
        number += 1
        if ranks not in expected:
            ended = subprocess.run(
                command(recipe, folder / f"alone-{ranks}", ranks), capture_output=True, text=True, timeout=300, check=False
            )
            assert ended.returncode == 0, ended.stderr
            expected[ranks] = json.loads((folder / f"alone-{ranks}" / "summary.json").read_text())["weights_sha256"]
        run, cache = folder / f"run-{number}", folder / f"cache-{number}"
        mine = folder / f"recipe-{number}.toml"
        shared = json.dumps(str(folder / "cache"))
        assert shared in recipe.read_text()
        mine.write_text(recipe.read_text().replace(shared, json.dumps(str(cache))))  # its own corpus, built anew
        for _ in range(min(4, count - len(found))):
            over = {"corpus"} if any(cache.rglob("manifest.json")) else set()  # these do not come again
            over |= {"first save"} if committed(run) >= 0 else set()
            over |= {"step", "validation", "save"} if committed(run) == STEPS else set()
            moment = chance.choice([phase for phase in PHASES if phase not in over]) if chance.random() < 0.7 else chance.uniform(0, life_s)
            told, said = tell(mine, run, ranks, moment, chance, cache)
            wrong = check(told, run, said)
            say(f"{len(found) + 1:4} {ranks} ranks  {told.moment:>11}  {told.name:8} {told.victim:16} code {told.code:3}  {told.seconds:5.1f} s  "
                f"reached {told.reached:3}  saved {told.step:3}" + "".join(f"  WRONG: {one}" for one in wrong))  # fmt: skip
            assert not wrong, f"seed {seed}, signal {len(found) + 1}: {wrong}\n{said[-3000:]}"
            found.append(told)
            if told.code == 0:
                break
        ended = subprocess.run(command(mine, run, ranks), capture_output=True, text=True, timeout=300, check=False)
        assert ended.returncode == 0, f"seed {seed}: {ended.stdout[-2000:]}{ended.stderr[-2000:]}"
        assert json.loads((run / "summary.json").read_text())["weights_sha256"] == expected[ranks], (
            f"seed {seed}, run {number}: other weights"
        )
        assert (run / "export" / "config.json").is_file()
        assert not list((run / "checkpoints").glob(".writing-*"))
    return found


def main() -> None:
    from tinyrecipe import TINY

    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--count", type=int, default=100)
    options.add_argument("--seed", type=int, default=int(time.time()))
    options.add_argument("--ranks", default="1,2,3,4")
    options.add_argument("folder", type=Path)
    given = options.parse_args()
    folder = given.folder.absolute()
    folder.mkdir(parents=True)
    text = folder / "text"
    text.mkdir()
    for path in sorted(Path(os.__file__).parent.glob("*.py"))[:60]:
        if 1_000 < path.stat().st_size < 12_000:
            (text / path.name).write_bytes(path.read_bytes())
    recipe = folder / "tiny.toml"
    recipe.write_text(TINY.format(corpus=text, cache=folder / "cache"))
    print(f"seed {given.seed}", flush=True)
    found = campaign(recipe, folder, given.count, given.seed, tuple(map(int, given.ranks.split(","))), lambda line: print(line, flush=True))
    told = [one for one in found if one.code == REQUEUE]
    slowest = max(one.seconds for one in told)
    print(
        f"{len(found)} signals, exit codes {dict(Counter(one.code for one in found))}; slowest {slowest:.1f} s; all resumed to equal weights"
    )
    for phase in (*PHASES, "random"):
        of = [one for one in found if one.moment == phase or (phase == "random" and one.moment.endswith(" s"))]
        print(f"  {phase:11} {len(of):3} signals  codes {dict(Counter(one.code for one in of))}")


if __name__ == "__main__":
    main()
