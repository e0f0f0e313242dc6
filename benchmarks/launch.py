"""From `gigatrain launch` to the first step, on a real Slurm of this machine: where the seconds go, and which are ours.

    python benchmarks/launch.py [--nodes 2] [--rounds 3] [--launcher torchrun]

Ours is all but the import of torch by the ranks, the run's own start (processes that meet, data, checkpoint of step 0) and Slurm's scheduling: planning,
rendering, sbatch, and what the job's script does before its ranks start. Needs slurm-wlm and munge, as `make slurm` does; Slurm's own time is this cluster's.
"""

import argparse
import datetime
import itertools
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "launching")]

import cluster as loopback  # noqa: E402

from gigatrain.launching import job as jobs  # noqa: E402

SITE = """
name = "loopback"
summary = "A real Slurm on this machine."
device = "cpu"
[node]
ranks = 1
[scheduler]
kind = "slurm"
gpus = "none"
lead_s = 30
[paths]
runs = "runs"
"""
PARTS = (
    ("gigatrain launch: Python starts and imports", "imports"),
    ("gigatrain launch: plan, render, freeze, sbatch", "ours"),
    ("Slurm: from sbatch to the script's first answer", "slurm"),
    ("script: roll call or doctor, choice of nodes, srun", "ours"),
    ("ranks: srun, Python, torch, until the run begins", "imports"),
    ("ranks: data, checkpoint of step 0", "run"),
    ("ranks: the first step and its report", "run"),
)


def once(cluster: loopback.Cluster, folder: Path, recipe: Path, nodes: int, launcher: str, doctor: bool) -> list[float]:
    """Seconds of each part of one launch."""
    run, environment = folder / f"run-{time.monotonic_ns()}", cluster.env() | {"PYTHONPATH": str(ROOT)}
    light = [sys.executable, "-c", "import gigatrain.cli, gigatrain.launching.submit"]
    began = time.monotonic()
    subprocess.run(light, env=environment, cwd=folder, check=True)
    imports_s = time.monotonic() - began
    command = [
        sys.executable,
        "-m",
        "gigatrain",
        "launch",
        str(recipe),
        "--site",
        "site.toml",
        "--nodes",
        str(nodes),
        "--launcher",
        launcher,
        "--json",
    ]
    command += [
        "--run",
        str(run),
        *([] if doctor else ["--no-preflight"]),
        "--set",
        "report.every=1",
        "--set",
        "train.steps=4",
        "--set",
        "export=false",
    ]
    began_at = time.time()
    job = json.loads(subprocess.run(command, env=environment, cwd=folder, check=True, capture_output=True).stdout)["jobs"][0]
    submitted_at = time.time()
    assert cluster.ended(job, 300) == "COMPLETED", (run / "logs" / f"job-{job}.out").read_text()
    started_at = next(_seconds(event["time"]) for event in jobs.history(run) if event["event"] == "started")
    out = (run / "logs" / f"job-{job}.out").read_text()
    ranks_at = next(_seconds(line.split()[0]) for line in out.splitlines() if f"job {job}: attempt" in line)
    marks: dict[str, float] = {}
    for line in (run / "logs" / "progress.jsonl").read_text().splitlines():
        event = json.loads(line)
        marks.setdefault(event["event"], event["time_s"])
    at = [began_at, began_at + imports_s, submitted_at, started_at, ranks_at, marks["start"], marks["steps"], marks["report"]]
    return [after - before for before, after in itertools.pairwise(at)]


def _seconds(text: str) -> float:
    return datetime.datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--nodes", type=int, default=2)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--launcher", choices=("torchrun", "srun"), default="torchrun")
    options.add_argument("--doctor", action="store_true", help="with the preflight, which works the hardware for seconds on purpose")
    asked = options.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder, loopback.running(Path(folder) / "slurm") as cluster:
        where = Path(folder)
        (where / "site.toml").write_text(SITE)
        from tinyrecipe import TINY

        library, corpus = Path(sysconfig.get_paths()["stdlib"]), where / "corpus"
        corpus.mkdir()
        for path in sorted(path for path in library.glob("*.py") if 1_000 < path.stat().st_size < 8_000)[:40]:
            (corpus / path.name).write_bytes(path.read_bytes())
        (where / "tiny.toml").write_text(TINY.format(corpus=corpus, cache=where / "cache"))
        rounds = [once(cluster, where, where / "tiny.toml", asked.nodes, asked.launcher, asked.doctor) for _ in range(asked.rounds + 1)][1:]
    print(
        f"{asked.nodes} nodes of 1 rank, {asked.launcher}, {'doctor' if asked.doctor else 'no preflight'}; median of {asked.rounds} after one warm-up, s"
    )
    for index, (what, whose) in enumerate(PARTS):
        times = [times[index] for times in rounds]
        print(f"  {what:52} {whose:8} {statistics.median(times):7.2f}   {min(times):.2f} .. {max(times):.2f}")
    ours = [sum(times[index] for index, (_, whose) in enumerate(PARTS) if whose == "ours") for times in rounds]
    print(f"  {'ours, on top of imports':52} {'':8} {statistics.median(ours):7.2f}   {min(ours):.2f} .. {max(ours):.2f}")
    print(f"  {'from the command to the first step':52} {'':8} {statistics.median(map(sum, rounds)):7.2f}")


if __name__ == "__main__":
    main()
