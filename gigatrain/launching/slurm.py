"""Slurm's commands, as functions: argument lists in, typed values out, and Slurm's own words when it refuses. Free of torch.

Nothing here goes through a shell. What a user's environment says of a job that they are in (SLURM_*) is not passed on to a new one.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gigatrain.errors import RunError

WAITS = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT")
RUNS = ("RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING", "STAGE_OUT")
ALIVE = WAITS + RUNS  # states of a job that may still write into its run folder
LIMIT_S = 60.0  # of one command: a controller that does not answer within its own MessageTimeout (10 s) and some retries will not
_WAYS_OUT = (  # what Slurm says -> what to do about it
    (r"invalid partition", "scheduler.partition of the site names none of this cluster's partitions; `sinfo` lists them"),
    (r"invalid account", "name an account that you may use with --account; `sacctmgr show associations user=$USER` lists them"),
    (r"invalid qos", "scheduler.qos of the site is not one that this account has; `sacctmgr show qos` lists them"),
    (r"invalid feature", "scheduler.constraint of the site names no feature of these nodes; `sinfo -o '%N %f'` lists them"),
    (
        r"invalid generic resource|invalid gres",
        "these nodes declare other GPUs; `sinfo -o '%N %G'` lists them: scheduler.gpus and scheduler.gpu_type",
    ),
    (
        r"invalid node name",
        "an excluded node is not of this cluster: take its line out of excluded-SITE.jsonl beside the run folders",
    ),
    (
        r"reqnodenotavail|requested nodes are not available|requested node configuration is not available",
        "nodes are down, reserved or excluded (excluded-SITE.jsonl beside the run folders); `sinfo -R` says which and why",
    ),
    (r"time limit", "ask for less with --time; `sinfo -o '%P %l'` lists the limits"),
    (r"more processors|node count|node configuration", "fewer nodes with --nodes; `sinfo` shows what the partition has"),
    (
        r"unable to contact|connection refused|communication connection",
        "the controller does not answer; `scontrol ping` says whether it is up",
    ),
    (
        r"configuration source|fetch_config",
        "this machine is of no Slurm cluster: launch on a login node, or look at the script here with --dry-run",
    ),
    (r"access/permission denied|permission denied", "this is another user's job, or the site does not allow it"),
    (r"invalid job id", "Slurm has forgotten that job or never had it; `gigatrain ps` shows what is known of the run"),
)


class NoAnswer(RunError):
    """Slurm did not say whether it did what it was asked: it may have."""


@dataclass(frozen=True)
class Queued:
    """One line of squeue: a job (or a task of an array) that waits, runs or has just ended. `nodes` is how many it has or wants."""

    id: str
    name: str
    state: str  # PENDING, RUNNING, COMPLETING, ...
    user: str
    partition: str
    nodes: int
    node_list: str
    elapsed_s: int | None
    limit_s: int | None
    start: str  # when it began, or is expected to: Slurm's own text
    reason: str  # why it waits


@dataclass(frozen=True)
class Accounted:
    """One line of sacct: a job that may have ended long ago."""

    id: str
    name: str
    state: str
    exit_code: int
    elapsed_s: int | None
    node_list: str
    restarts: int


def run(*command: str, limit_s: float = LIMIT_S, environment: Mapping[str, str] | None = None) -> str:
    """Standard output of one command.

    Raises RunError with what the command said and the way out: not installed, refused, or no answer within `limit_s`.
    """
    if shutil.which(command[0]) is None:
        raise RunError(
            f"{command[0]} is not found: this is no machine of a Slurm cluster, or `module load slurm` comes first; --dry-run needs no Slurm"
        )
    try:
        ended = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=limit_s,
            check=False,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        raise NoAnswer(
            f"{command[0]} did not answer within {limit_s:.0f} s; `scontrol ping` says whether Slurm's controller is up"
        ) from None
    if ended.returncode == 0:
        return ended.stdout
    said = " ".join(line.strip() for line in (ended.stderr or ended.stdout).splitlines() if line.strip())[:600]
    way = way_out(said)
    kind = NoAnswer if re.search(r"timed out", said, re.IGNORECASE) else RunError  # "Socket timed out on send/recv operation": it was sent
    raise kind(f"{command[0]} refused (exit code {ended.returncode}): {said or 'without a word'}{way}")


def way_out(said: str) -> str:
    """What to do about what Slurm says, as `; ...`; empty where we know nothing better."""
    return next((f"; {hint}" for pattern, hint in _WAYS_OUT if re.search(pattern, said, re.IGNORECASE)), "")


def submit(script: Path, *options: str, account: str | None = None) -> str:
    """Hand in a script; returns the job's id. `options` go before it: `--dependency=afterany:41`; `account` is the one that it names, if any."""
    said = run("sbatch", "--parsable", *options, "--", str(script), environment=outside(os.environ, account))
    return said.strip().split(";")[0]  # JOB;CLUSTER where there are several


def tested(script: Path, *options: str) -> str:
    """Whether Slurm would take the script, and when it would run; submits nothing. Raises RunError where it would not."""
    return run("sbatch", "--test-only", *options, "--", str(script), environment=outside(os.environ))


def outside(environment: Mapping[str, str], account: str | None = None) -> dict[str, str]:
    """The environment without what Slurm says of a job that this process is in; else a job within a job would inherit its shape.

    Nor with SBATCH_*: each overrides a line of the script, which says what is wanted. SBATCH_ACCOUNT stays where the script names no account, and
    SBATCH_RESERVATION, of which no script of ours says anything.
    """
    dropped = ("SLURM_", "SLURMD_", "PMI", "SRUN_", "SBATCH_")
    kept = (
        "SLURM_CONF",
        "SLURM_CLUSTERS",
        "SLURM_TIME_FORMAT",
        "SBATCH_CLUSTERS",
        "SBATCH_RESERVATION",
        *(() if account else ("SBATCH_ACCOUNT",)),
    )
    return {name: value for name, value in environment.items() if not name.startswith(dropped) or name in kept}


_QUEUED = "\x1f".join(("%i", "%T", "%u", "%P", "%D", "%M", "%l", "%S", "%N", "%j", "%r"))  # a separator that no name has


def queued(*ids: str, user: str | None = None) -> list[Queued]:
    """What squeue knows of these jobs, or of a user's; an id that it has forgotten is left out. A task of an array is `ARRAY_TASK`."""
    asked = [f"--jobs={','.join(ids)}"] if ids else [f"--user={user}"] if user else ["--me"]
    try:
        said = run("squeue", "--noheader", "--array", "--states=all", f"--format={_QUEUED}", *asked)
    except RunError as failure:
        if ids and "invalid job id" in str(failure).lower():
            return [one for each in ids for one in queued(each)] if len(ids) > 1 else []
        raise
    found = []
    for line in said.splitlines():
        part = line.split("\x1f")
        if len(part) == 11:
            identity, state, owner, partition, nodes, elapsed, limit, start, node_list, name, reason = part
            found.append(
                Queued(identity, name, state, owner, partition, int(nodes), node_list, seconds(elapsed), seconds(limit), start, reason)
            )
    return found


def accounted(*ids: str) -> list[Accounted]:
    """What sacct remembers of these jobs; RunError where a cluster keeps no accounts."""
    said = run(
        "sacct",
        "--noheader",
        "--parsable2",
        "--allocations",
        "--duplicates",
        "--format=JobID,State,ExitCode,ElapsedRaw,NodeList,JobName",
        f"--jobs={','.join(ids)}",
    )
    rows = [line.split("|", 5) for line in said.splitlines() if line.count("|") >= 5]
    lives: dict[str, int] = {}
    for row in rows:
        lives[row[0]] = lives.get(row[0], 0) + 1
    newest = {row[0]: row for row in rows}  # each life of a requeued job has a line, the newest last
    return [
        Accounted(
            identity,
            name,
            state.split()[0],
            int(code.split(":")[0]),
            int(elapsed) if elapsed.isdecimal() else None,
            nodes,
            lives[identity] - 1,
        )
        for identity, state, code, elapsed, nodes, name in newest.values()
    ]


def shown(job: str) -> dict[str, str]:
    """`scontrol show job`: everything that the controller knows, by its own names."""
    said = run("scontrol", "--oneliner", "show", "job", job)
    return dict(part.split("=", 1) for part in said.split() if "=" in part)


def cancel(job: str, *, signal: str | None = None, batch: bool = False) -> None:
    """End a job; with `signal` only send it that one, with `batch` to its script alone, which passes it on."""
    run("scancel", *([f"--signal={signal}"] if signal else []), *(["--batch"] if batch else []), job)


def requeue(job: str) -> None:
    """Back into the queue: what runs is ended first."""
    run("scontrol", "requeue", job)


def hostnames(nodes: str) -> list[str]:
    """`n[1-3]` to n1, n2, n3."""
    return run("scontrol", "show", "hostnames", nodes).split() if nodes else []


def seconds(text: str) -> int | None:
    """Slurm's `2-03:04:05`, `03:04:05` or `04:05`; None for UNLIMITED, INVALID and the like."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text.strip())
    if not found:
        return None
    days, hours, minutes, rest = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


def clock(duration_s: int) -> str:
    """Seconds as Slurm writes a limit: `26:03:04`. It counts whole minutes, and rounds up."""
    return f"{duration_s // 3600:02}:{duration_s // 60 % 60:02}:{duration_s % 60:02}"


def rank_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What torch wants to know of a rank, from what Slurm says of a task: for `--launcher srun`, where srun starts the ranks itself.

    Only a step of ours asks for it (GIGATRAIN_LAUNCHER=srun): a user's own srun of one process in an allocation of many is no rank. MASTER_ADDR and
    MASTER_PORT come from the script, which knows who is first.
    """
    try:
        ranks, nodes = int(environment["SLURM_STEP_NUM_TASKS"]), int(environment["SLURM_STEP_NUM_NODES"])
        rank, local = int(environment["SLURM_PROCID"]), int(environment["SLURM_LOCALID"])
    except (KeyError, ValueError) as failure:
        raise RunError(
            f"GIGATRAIN_LAUNCHER is srun, but this is no task of srun ({failure}); unset it, or start with `gigatrain launch`"
        ) from None
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing or ranks % nodes:
        raise RunError(
            f"{ranks} tasks on {nodes} nodes, and no {' and no '.join(missing) or 'equal share'}; `gigatrain launch` sets all of it"
        )
    return {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(local), "LOCAL_WORLD_SIZE": str(ranks // nodes)}
