"""All that only a GPU can say, in passes that fit a short loan: what is right, then what is fast.

    python benchmarks/gpu.py check                    every kernel against fp64 at every case; every kind of step trains; doctor. Side by side, minutes
    python benchmarks/gpu.py kernels                  every kernel beside its peers (`gigatrain bench kernels`), less than nine minutes
    python benchmarks/gpu.py steps                    whole steps beside Trainer, Trainer + Liger and LitGPT, what a step fuses, joules, plan against run
    python benchmarks/gpu.py check --only "doctor;train, fused" --out /tmp/looks

Each stage is processes of its own with a limit in seconds; its output is OUT/<stage>.log, and a line says how it ended. Rows go to
benchmarks/results/, or with --rows to another folder. Stages of `check` run side by side, for nothing is timed there; those of the others one by one.
Without a GPU nothing is begun: exit code 7, and what a processor can say instead.
"""

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).resolve().parents[1]
GIGATRAIN = (sys.executable, "-m", "gigatrain")

# Ways to train that only a GPU can take, or takes otherwise than a processor: keys over quickstart's. Each trains, saves, and says its loss.
WAYS: dict[str, tuple[str, ...]] = {
    "adamw": ("optim.name=adamw", "optim.lr=3e-3"),
    "compile": ("train.compile=true",),
    "graph": ("optim.name=adamw", "optim.lr=3e-3", "train.graph=true"),
    "fused": ("train.fuse=true", "train.main_grads=true"),
    "unfused": ("train.fuse=false", "train.main_grads=false"),
    "release": ("optim.name=adamw", "optim.lr=3e-3", "train.release=true", "optim.clip=false"),
    "lean state": ("optim.name=adamw", "optim.lr=3e-3", "optim.master=bf16+8", "optim.moments=int8"),
    "recompute": ("train.recompute=full",),
    "lean": ("train.recompute=lean",),
    "microbatches": ("train.microbatch=2",),
    "deterministic": ("train.deterministic=true",),
    "reference": ("kernels=reference",),
    "own attention": ('kernels={ attention = "fused" }',),
    "cudnn": ('kernels={ attention = "cudnn" }', "data.packing=document"),
    "flash": ('kernels={ attention = "flash" }', "data.packing=document"),
    "flex": ('kernels={ attention = "flex" }',),
    "rowwise fp8": ("train.precision=fp8", "fp8.least=[16,16]", "model.architecture.hidden=256", "model.architecture.heads=8", "model.architecture.kv_heads=4"),
    "tensorwise fp8": (
        "train.precision=fp8", "fp8.scaling=tensorwise", "fp8.least=[16,16]", "model.architecture.hidden=256", "model.architecture.heads=8",
        "model.architecture.kv_heads=4",
    ),
    "blockwise fp8": (
        "train.precision=fp8", "fp8.scaling=blockwise", "fp8.least=[16,16]", "model.architecture.hidden=1024", "model.architecture.heads=32",
        "model.architecture.kv_heads=16", "model.architecture.intermediate=2048",
    ),
    "experts": (
        "model.architecture.family=qwen3_moe", "model.architecture.experts=8", "model.architecture.experts_per_token=2",
        "model.architecture.expert_intermediate=256",
    ),
    "zero-2": ("engine.name=deepspeed", "engine.zero=2", "optim.name=adamw", "optim.lr=3e-3"),
}  # fmt: skip
BILLION = (
    "model.architecture=llama-3.2-1b", "train.sequence=4096", "train.batch=4", "train.microbatch=2", "optim.name=adamw", "optim.lr=1e-4",
)  # fmt: skip
PEERS = "gigatrain,trainer,trainer+liger,trainer-bf16+liger"


@dataclass(frozen=True)
class Stage:
    """Commands one after another, and the seconds that each may take."""

    name: str
    commands: tuple[tuple[str, ...], ...]
    limit_s: float


def sets(*keys: str) -> tuple[str, ...]:
    return tuple(word for key in keys for word in ("--set", key))


def train(folder: Path, name: str, *keys: str, limit_s: float = 150) -> Stage:
    """A short run of quickstart with a save within it."""
    run = folder / name.replace(" ", "-")
    short = ("train.steps=40", "checkpoint.every=20", "validation.every=40", "report.every=10", "report.trackers=[]")
    return Stage(f"train, {name}", ((*GIGATRAIN, "train", "quickstart", *sets(*short, *keys), "--run", str(run)),), limit_s)


def stages(which: str, rows: Path, folder: Path) -> list[Stage]:
    """What a pass consists of."""
    if which == "check":
        from gigatrain.kernels import ops

        run = str(folder / "resumed")
        begun = (*GIGATRAIN, "train", "quickstart", *sets("train.steps=120", "checkpoint.every=40", "validation.every=60"), "--run", run)
        return [
            Stage("doctor", ((*GIGATRAIN, "doctor"),), 200),
            Stage(
                "train, killed and resumed",
                (
                    (sys.executable, "-c", KILLED, *begun),
                    (*begun, "--resume"),
                    (*GIGATRAIN, "generate", run, "--prompt", "class Connection:", "--temperature", "0"),
                    (*GIGATRAIN, "export", run, str(folder / "export")),
                ),
                120,
            ),
            *(Stage(f"kernel {op}", ((*GIGATRAIN, "bench", "kernels", "--check", "--op", op),), 400) for op in ops.OPERATIONS),
            *(train(folder, name, *keys) for name, keys in WAYS.items()),
            train(folder, "one billion", *BILLION, "train.steps=12", "checkpoint.every=6", limit_s=250),
        ]
    if which == "kernels":
        return [Stage("kernels", ((*GIGATRAIN, "bench", "kernels", "--csv", str(rows / "kernels.csv")),), 560)]
    step = (sys.executable, str(Path(__file__).parent / "step.py"), "--data", "random", "--out", str(rows / "step.csv"))
    quick = ("--rounds", "3", "--steps", "5", "--settle", "1", "--warmup", "4")
    small = ("train.microbatch=4", "train.sequence=2048", "train.steps=100")
    planned = ("train.batch=8", "train.steps=40", "checkpoint.every=20", "validation.every=0")
    return [
        # All stay in memory, with weights and moments: six of them fill an H200; what compiles takes minutes more.
        Stage("step of one billion", ((*step, *quick, "--providers", PEERS, *sets(*BILLION, "train.steps=100")),), 220),
        Stage("plan and run", ((*GIGATRAIN, "train", "quickstart", *sets(*BILLION, *planned), "--run", str(folder / "planned")),), 150),
        Stage("what a step fuses", ((*step, *quick, "--providers", "fusions", *sets(*BILLION, *small)),), 150),
        Stage(
            "power",
            (
                (
                    *(*GIGATRAIN, "bench", "power", "quickstart", "--quick", "--sweep", "precision"),
                    *("--csv", str(rows / "power-variants.csv"), *sets(*BILLION)),
                ),
            ),
            200,
        ),
    ]


# Starts a command, kills it hard when it has saved once, and is content if the killed command was at work.
KILLED = """
import pathlib, signal, subprocess, sys, time
run = pathlib.Path(sys.argv[sys.argv.index("--run") + 1])
process, began = subprocess.Popen(sys.argv[1:]), time.monotonic()
while process.poll() is None and time.monotonic() < began + 100 and not list(run.glob("checkpoints/step-*/COMMITTED")):
    time.sleep(0.05)
process.send_signal(signal.SIGKILL)
process.wait()
print("killed with", [path.name for path in run.glob("checkpoints/*")])
"""


def run(stage: Stage, out: Path) -> tuple[str, int, float, str]:
    """Its name, exit status, seconds, and last line."""
    began, status = time.monotonic(), 0
    path = out / f"{stage.name.replace(' ', '-').replace(',', '')}.log"
    with path.open("w") as log:
        for command in stage.commands:
            try:
                status = subprocess.run(
                    command, stdout=log, stderr=subprocess.STDOUT, timeout=stage.limit_s, cwd=ROOT, env=environment(), check=False
                ).returncode
            except subprocess.TimeoutExpired:
                status = 124
            if status:
                break
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return stage.name, status, time.monotonic() - began, lines[-1] if lines else ""


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "180"}


def refusal(which: str) -> str | None:
    """Why nothing can be begun here, and what a processor can say in its place; None: there is a GPU."""
    from gigatrain import load

    site, why = load.local_site()
    if site.device == "cuda":
        return None
    step = "`python benchmarks/step.py`, and `gigatrain plan` what a GPU is expected to do"
    instead = {"check": "`gigatrain doctor`, `gigatrain bench kernels --check`", "kernels": "`gigatrain bench kernels`", "steps": step}[
        which
    ]
    return f"{which} is for a GPU, and there is none ({why}); on a processor: {instead}"


def main(arguments: list[str] | None = None) -> int:
    """Run a pass; 1 if a stage of it failed, 7 where none can be begun."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0], epilog="Read the head of this file.")
    parser.add_argument("which", choices=("check", "kernels", "steps"))
    parser.add_argument("--only", help="stages whose names begin with one of these, separated by `;`")
    parser.add_argument("--out", type=Path, default=Path("gpu-logs"), help="folder of the logs (default: %(default)s)")
    parser.add_argument("--rows", type=Path, default=RESULTS, help="folder of the rows (default: %(default)s)")
    parser.add_argument("--beside", type=int, default=8, help="stages of `check` that run side by side (default: %(default)s)")
    options = parser.parse_args(arguments)
    said, every = refusal(options.which), stages(options.which, options.rows.resolve(), options.out.resolve() / "runs")
    wanted = tuple(options.only.split(";")) if options.only else ("",)
    chosen = [stage for stage in every if stage.name.startswith(wanted)]
    for name in wanted:
        if said is None and not any(stage.name.startswith(name) for stage in every):
            said = f"no stage of {options.which} begins with {name!r}; there are {'; '.join(stage.name for stage in every)}"
    if said is not None:
        print(f"gpu.py: {said}", file=sys.stderr)
        return 7
    options.out.mkdir(parents=True, exist_ok=True)
    options.rows.mkdir(parents=True, exist_ok=True)
    failed = 0
    with ThreadPoolExecutor(options.beside if options.which == "check" else 1) as pool:
        for done in as_completed(pool.submit(run, stage, options.out) for stage in chosen):
            name, status, seconds, last = done.result()
            failed += bool(status)
            print(f"{'ok' if not status else f'FAILED {status}':10} {seconds:6.0f} s  {name:28} {last[:110]}", flush=True)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
