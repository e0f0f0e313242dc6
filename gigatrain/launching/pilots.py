"""`gigatrain plan --pilots DIR`: short runs of the layouts that a search found best, to decide among them by a clock. Free of torch.

An estimate errs by several per cent, and the best five are nearer to each other than that; the fastest of five that were timed is nearly always within a
per cent of the best there is. DIR holds

    pilot-N.json    the recipe of each, with its layout, 30 steps and nothing written but the two saves that every run makes
    pilot-N.sh      what the scheduler will be handed, to be read
    pilots.sh       starts them all: through the queue, or one after another where there is none
    pilots.json     what was expected of each
    README.md       what to type, and how to decide
"""

import json
import math
import shlex
import shutil
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gigatrain import load
from gigatrain.config import Recipe
from gigatrain.errors import GigatrainError, RunError
from gigatrain.launching import submit
from gigatrain.planning.estimate.candidates import Found, overrides, seconds, table, tree

WARM = 10  # steps until autotuning, allocator and clocks have settled
STEPS = 20  # that are timed
EVERY = 5  # steps of one window of metrics.jsonl


@dataclass(frozen=True)
class Pilots:
    """What was written: the pilots' run folders, none of which is there yet, and what starts them."""

    folder: Path
    runs: tuple[Path, ...]
    start: Path
    takes: str = ""  # how long they take, in words


def write(
    folder: Path, found: Found, request: submit.Request, *, nodes: int | None = None, measure: Callable[[Any], Any] | None = None
) -> Pilots:
    """A pilot of each candidate of `found`, of the recipe, overrides and site of `request`; submits nothing.

    Raises RunError where `folder` holds something or cannot be written, and what `submit.prepare` raises.
    """
    folder = Path(folder).expanduser().absolute()
    if folder.exists() and any(folder.iterdir()):
        raise RunError(f"{folder} already holds something; name another folder with --pilots")
    site = load.site(request.site)
    local = site.scheduler.kind == "none"
    files: dict[str, str] = {}
    lines, runs = [], []
    ranks = found.candidates[0].layout.ranks
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number, candidate in enumerate(found.candidates, 1):
            recipe = _short(load.recipe(request.recipe, [*request.overrides, *overrides(candidate)]), number)
            path, run = folder / f"pilot-{number}.json", folder / f"run-{number}"
            path.write_text(
                json.dumps(recipe.model_dump(mode="json", by_alias=True, exclude_unset=True), indent=1) + "\n", encoding="utf-8"
            )
            one = replace(
                request, recipe=str(path), overrides=(), sweep=(), chain=1, folder=str(run), nodes=nodes, gpus=ranks, megawatts=None
            )
            prepared = submit.prepare(one, measure=measure)
            files[f"pilot-{number}.sh"] = submit.preview(prepared)
            lines.append(shlex.join(_command(one, prepared.job.python, local)))
            runs.append(run)
        script = _SCRIPT.format(
            what="one after another: each has this machine to itself" if local else "each a job of its own", commands="\n".join(lines)
        )
        files |= {
            "pilots.sh": script,
            "pilots.json": json.dumps(tree(found), indent=1) + "\n",
            "README.md": _readme(found, folder, len(lines)),
        }
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
            if name.endswith(".sh"):
                (folder / name).chmod(0o755)
    except OSError as failure:
        raise RunError(f"{failure.filename or folder} cannot be written: {failure.strerror}; name another folder with --pilots") from None
    except GigatrainError:
        shutil.rmtree(folder)  # of which nothing was there before
        raise
    steps = [(WARM + STEPS) * candidate.estimate.step_s for candidate in found.candidates]
    whole = sum(steps) if local else max(steps)
    long = seconds(whole) if whole < 7200 else f"{whole / 3600:.1f} h"
    takes = f"about {long} of steps {'in all' if local else 'each'}"
    return Pilots(folder, tuple(runs), folder / "pilots.sh", f"{takes}, starts and saves not counted")


def _short(recipe: Recipe, number: int) -> Recipe:
    """The recipe as a pilot: WARM + STEPS steps, nothing validated, exported, sampled or kept beyond what every run writes."""
    steps = WARM + STEPS
    return recipe.model_copy(
        update={
            "name": f"{recipe.name[: 64 - len('-pilot-9')]}-pilot-{number}",
            "summary": f"pilot {number} of {recipe.name}: {steps} steps",
            "train": recipe.train.model_copy(update={"steps": steps, "tokens": None}),
            "schedule": recipe.schedule.model_copy(update={"warmup": min(recipe.schedule.warmup, steps)}),
            "validation": recipe.validation.model_copy(update={"every": 0, "max_samples": 1}),
            "checkpoint": recipe.checkpoint.model_copy(update={"every": steps, "keep": 1}),
            "report": recipe.report.model_copy(update={"every": EVERY, "trackers": ()}),
            "sample": recipe.sample.model_copy(update={"prompt": None}),
            "profile": recipe.profile.model_copy(update={"steps": ()}),
            "export": False,
        }
    )


def _command(request: submit.Request, python: str, local: bool) -> list[str]:
    """What starts one pilot."""
    begin = [python if local else "gigatrain"] + (["-m", "gigatrain"] if local else [])
    run = ["--run", str(request.folder)]
    if local:
        return [*begin, "train", request.recipe, "--site", _site(request.site), *run, "--set", f"train.nproc={request.gpus}"]
    asked = ["--site", _site(request.site), "--gpus", str(request.gpus)]
    for name, value in (("--account", request.account), ("--hosts", request.hosts), ("--as", request.form)):
        asked += [name, value] if value else []
    if request.spares:
        asked += ["--spares", str(request.spares)]
    if request.time_s:
        asked += ["--time", f"{request.time_s // 3600:02}:{request.time_s // 60 % 60:02}:{request.time_s % 60:02}"]
    asked += ["--launcher", request.launcher] + ([] if request.preflight else ["--no-preflight"])
    return [*begin, "launch", request.recipe, *asked, *run]


def _site(name: str) -> str:
    """A shipped site by its name, a file by its whole path: the script may be started from anywhere."""
    return name if name in load.sites() else str(Path(name).expanduser().absolute())


_SCRIPT = """#!/usr/bin/env bash
# Written by `gigatrain plan --pilots`: starts the pilots, {what}.
set -euo pipefail
{commands}
"""


def _readme(found: Found, folder: Path, count: int) -> str:
    where = shlex.quote(str(folder))
    runs = " ".join(shlex.quote(str(folder / f"run-{number}")) for number in range(1, count + 1))
    listed = "\n".join(f"    {line}" for line in table(found))
    return f"""# {count} pilots

{listed}

Each is {WARM + STEPS} steps of the recipe in one of these layouts, of which the last {STEPS} are timed. Nothing is validated, exported or sampled; as every run
does, each saves its state at its start and its end, which of a large model is most of a pilot's time.

    bash {where}/pilots.sh                                 start them
    gigatrain plan --decide {where}                        which is fastest, beside what was expected
    gigatrain report {runs} -o {where}/pilots.html         side by side
    gigatrain plan --calibrate {runs}                      fit the estimates to these machines

Then give the winner's settings to the real run: `overrides` in pilots.json, as `--set`.
"""


@dataclass(frozen=True)
class Timed:
    """One pilot's clock: median seconds of a step after WARM, None while it has none, beside what was expected."""

    number: int
    step_s: float | None
    expected_s: float
    low_s: float
    high_s: float
    overrides: tuple[str, ...]


def timed(folder: Path) -> list[Timed]:
    """Every pilot of a folder, by its number. Raises RunError where the folder was not written by `--pilots`."""
    folder = Path(folder).expanduser().absolute()
    path = folder / "pilots.json"
    try:
        said = json.loads(path.read_text(encoding="utf-8"))["candidates"]
        return [
            Timed(
                number, _clock(folder / f"run-{number}"), float(one["step_s"]), float(one["low_s"]), float(one["high_s"]), tuple(one["overrides"])
            )
            for number, one in enumerate(said, 1)
        ]  # fmt: skip
    except OSError as failure:
        raise RunError(f"{path} cannot be read: {failure.strerror}; `gigatrain plan --pilots DIR` writes it") from None
    except (ValueError, KeyError, TypeError, RecursionError) as failure:
        raise RunError(f"{path} is not what --pilots writes ({type(failure).__name__}: {failure}); write the pilots again") from None


def _clock(run: Path) -> float | None:
    """Median step of the windows behind WARM."""
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    steps = []
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue  # a line that is being written
        took = row.get("step_s")
        if row.get("step", 0) > WARM and isinstance(took, int | float) and math.isfinite(took):
            steps.append(float(took))
    return statistics.median(steps) if steps else None


def decided(folder: Path) -> list[str]:
    """Lines for a reader: the pilots by their clock, and the settings of the fastest. Raises RunError as `timed` does, and where none has run."""
    pilots = timed(folder)
    ran = sorted((one for one in pilots if one.step_s is not None), key=lambda one: one.step_s or 0.0)
    if not ran:
        raise RunError(
            f"no pilot of {folder} has come to its timed steps yet; start them with: bash {shlex.quote(str(Path(folder) / 'pilots.sh'))}"
        )
    best = ran[0]
    lines = []
    for one in ran:
        assert one.step_s is not None
        assert best.step_s is not None
        inside = "" if one.low_s <= one.step_s <= one.high_s else ", outside of its interval"
        lines.append(
            f"pilot {one.number}  {seconds(one.step_s)} a step, {one.step_s / best.step_s - 1:+.1%}; expected {seconds(one.expected_s)} "
            f"({one.expected_s / one.step_s - 1:+.0%}{inside})"
        )
    lines += [f"pilot {one.number}  has not been timed" for one in pilots if one.step_s is None]
    lines.append("the fastest: " + " ".join(f"--set {shlex.quote(text)}" for text in best.overrides))
    return lines
