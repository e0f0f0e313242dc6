"""The script that Slurm runs: rendered from a `Job`, to be read by a person, and safe whatever the names in it are. Free of torch.

What bash sees is quoted by shlex and never evaluated a second time; what stands in an #SBATCH line is quoted as sbatch reads it, and what it cannot hold
(a line end) is refused. The script decides nothing: `gigatrain job begin` and `gigatrain job after` do, in Python (restart.py). Slurm's own commands are
called by the script and not from Python, so that a container needs none of them.
"""

import re
import shlex
import string
from pathlib import Path

from gigatrain.errors import RunError, SiteError
from gigatrain.launching import slurm
from gigatrain.launching.job import Job

ROLL_CALL_S = 120  # what nodes get to answer; a dead one costs srun MessageTimeout (10 s)
DOCTOR_S = 300  # the doctor is done within 60 s on a healthy node
STOP_S = 20  # what torchrun gives the other ranks of a node once one has failed: they wait for it in a collective, and hear nothing
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def render(job: Job) -> str:
    """The whole script, executable as it is by `sbatch`. Raises SiteError for what no script can hold."""
    site, scheduler = job.site, job.site.scheduler
    per_node = 1 if job.launcher == "torchrun" else job.ranks_per_node
    for what, text in (
        ("the run folder", job.run),
        ("the working folder", job.workdir),
        ("the interpreter", job.python),
        ("the recipe", job.recipe),
    ):
        line(text, what)
    if site.scheduler.container != "none" and any(mark in job.run + job.workdir for mark in ",:"):
        raise SiteError(
            f"a container's mounts are lists by commas and colons, which {job.run!r} or {job.workdir!r} has; name another folder with --run"
        )
    examine = _DOCTOR if job.preflight else _ROLL_CALL
    train = _TORCHRUN if job.launcher == "torchrun" else _SRUN
    filled = _Template(_SCRIPT.replace("§examine", examine).replace("§train", train)).substitute(
        title=f"{job.name}: {_counted(job)} on {site.name}",
        folder=job.run,
        sbatch="\n".join(f"#SBATCH {option}" for option in options(job)),
        run=_run(job),
        workdir=shlex.quote(job.workdir),
        python=shlex.quote(job.python),
        nodes=job.nodes,
        ranks_per_node=job.ranks_per_node,
        exclude=shlex.quote(",".join(job.exclude)),
        guard=_GUARD if job.spares else "",
        watch="\n" + _WATCH if job.spares else "",
        excluded=shlex.quote(str(job.excluded)),
        modules=_modules(job),
        environment=_environment(job),
        container=_container(job),
        node=_array(_step(job, 1)),
        rank=_array(_step(job, per_node)),
        numa="--numa-binding=node " * (scheduler.bind == "closest"),
        stop_s=STOP_S,
        doctor_s=DOCTOR_S,
        roll_call_s=ROLL_CALL_S,
    )
    return re.sub(r"\n{3,}", "\n\n", filled)


class _Template(string.Template):
    """Of a shell script, which is full of dollars."""

    delimiter = "§"


def options(job: Job) -> list[str]:
    """What stands after #SBATCH, one option each, as sbatch reads it."""
    scheduler = job.site.scheduler
    per_node = 1 if job.launcher == "torchrun" else job.ranks_per_node
    count = job.nodes + job.spares
    log = f"{job.run}/logs/job-%A_%a.out" if job.sweep else f"{job.run}/logs/job-%j.out"
    said: list[tuple[str, object]] = [
        ("job-name", job.name),
        ("partition", scheduler.partition),
        ("account", job.account or scheduler.account),
        ("qos", scheduler.qos),
        ("constraint", scheduler.constraint),
        ("nodes", count),
        ("ntasks-per-node", per_node),
        ("time", slurm.clock(job.time_s) if job.time_s else None),
        ("cpus-per-task", _cores(job, per_node)),
        ("switches", scheduler.switches),
        ("segment", scheduler.segment),
        ("exclude", ",".join(job.exclude) or None),
        ("array", f"0-{job.sweep - 1}" if job.sweep else None),
        ("signal", f"B:USR1@{scheduler.lead_s}"),
        ("open-mode", "append"),
    ]
    found = [f"--{name}={line(str(value), f'--{name}')}" for name, value in said if value is not None]
    if job.site.device == "cuda" and scheduler.gpus != "none":
        kind = f"{scheduler.gpu_type}:" if scheduler.gpu_type else ""
        found.append(
            line(
                f"--gres=gpu:{kind}{job.ranks_per_node}" if scheduler.gpus == "gres" else f"--gpus-per-node={kind}{job.ranks_per_node}",
                "gpu_type",
            )
        )
    found += ["--exclusive"] * scheduler.exclusive
    found.append("--requeue" if scheduler.requeue and job.chain == 1 else "--no-requeue")
    found += ["--no-kill"] * (job.spares > 0)  # without one Slurm itself had better requeue a job that has lost a node
    found += [line(option, "scheduler.options") for option in scheduler.options]
    for option in scheduler.options:
        if not option.startswith("-"):
            raise SiteError(f"scheduler.options has {option!r}, which is no option of sbatch: each begins with -")
    if "\\" in job.run:
        raise RunError(
            f"the run folder {job.run!r} has a backslash, which Slurm takes out of the path of a job's output; name another with --run"
        )
    # Slurm puts the job's id in place of %j; a % of the folder's own name is doubled.
    folder = line(job.run, "the run folder").replace("%", "%%")
    found.append(log.replace(job.run, f"--output={folder}", 1))
    return [_sbatch(option) for option in found]


def line(text: str, what: str) -> str:
    """`text`, if it fits on one line of a script; SiteError if it holds a line end or another control character."""
    if any(ord(letter) < 32 or ord(letter) in (127, 0x85, 0x2028, 0x2029) for letter in text):
        raise SiteError(f"{what} is {text[:120]!r}: a line end or control character cannot be part of a job script; take it out")
    return text


def _sbatch(option: str) -> str:
    """As sbatch reads an argument: in double quotes, with a backslash before quotes and backslashes. Bash sees a comment."""
    if re.fullmatch(r"[A-Za-z0-9_@%+=:,./\[\]-]+", option):
        return option
    escaped = option.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _counted(job: Job) -> str:
    spares = f" and {job.spares} spare{'s' * (job.spares > 1)}" if job.spares else ""
    return f"{job.nodes} node{'s' * (job.nodes > 1)} of {job.ranks_per_node} rank{'s' * (job.ranks_per_node > 1)}{spares}"


def _run(job: Job) -> str:
    if job.sweep:
        return f'{shlex.quote(f"{job.run}/{job.name}-")}"$SLURM_ARRAY_TASK_ID"'
    return shlex.quote(job.run)


def _cores(job: Job, tasks: int) -> int | None:
    cores = job.site.node.cores.value
    if not job.site.scheduler.cpus_per_task:
        return None
    if cores is None:
        raise SiteError(
            f"{job.site.name}: scheduler.cpus_per_task shares out node.cores, which is unknown; give the figure, or set it to false"
        )
    return max(1, int(cores) // tasks)


def _step(job: Job, tasks: int) -> list[str]:
    """Options of an srun of `tasks` a node: what srun does not take over from sbatch (since 22.05 not --cpus-per-task), and how tasks are bound."""
    cores, bind = _cores(job, tasks), job.site.scheduler.bind
    # A step whose node died may never end for Slurm, and would hold its other nodes against the next one: so steps may overlap.
    found = ["--overlap", f"--ntasks-per-node={tasks}", "--distribution=block"]
    found += [f"--cpus-per-task={cores}"] if cores else []
    if bind == "none" or tasks == 1:  # one task that starts the others must have every core of its node
        hinted = any(option.startswith("--hint") for option in job.site.scheduler.options)
        found += [] if hinted else ["--cpu-bind=none"]  # Slurm forgets a hint where it is told how to bind
    else:  # every rank sees all GPUs and takes that of its local rank; its cores are those of a NUMA domain, in the same order
        found += ["--cpu-bind=cores"] if bind == "cores" else ["--cpu-bind=rank_ldom", "--gpu-bind=none"]
    return found


def _array(words: list[str]) -> str:
    quoted = [shlex.quote(word) for word in words]  # it leaves commas bare, and shellcheck takes those of an array for a slip
    return "(" + " ".join(f"'{word}'" if "," in word and "'" not in word else word for word in quoted) + ")"


def _modules(job: Job) -> str:
    """Modulefiles read variables that are not set; one that is missing must not go unseen."""
    names = [shlex.quote(line(name, "scheduler.modules")) for name in job.site.scheduler.modules]
    loads = [f"module load {name} || {{ printf 'gigatrain: module load %s failed\\n' {name} >&2; exit 3; }}\n" for name in names]
    return "".join(["set +u\n", *loads, "set -u\n"]) if loads else ""


def _environment(job: Job) -> str:
    found = {"PYTHONUNBUFFERED": "1"} | job.site.environment | job.environment
    lines = []
    for name, value in found.items():
        if not _NAME.fullmatch(name):
            raise SiteError(f"environment has {name!r}, which is no name of a variable")
        lines.append(f"export {name}={shlex.quote(line(value, f'environment.{name}'))}\n")
    cores = job.site.node.cores.value
    threads = max(1, int(cores) // job.ranks_per_node) if cores else 1
    lines.append(f'export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-{threads}}}"\n')
    return "".join(lines)


def _container(job: Job) -> str:
    """`inside` goes before a command that runs in the container, `contained` are the same as options of srun."""
    scheduler = job.site.scheduler
    if scheduler.container == "none":
        return "inside=() contained=()\n"
    if not scheduler.image:
        raise SiteError(f"{job.site.name}: scheduler.container is {scheduler.container!r} and scheduler.image names no image")
    image = line(scheduler.image, "scheduler.image")
    made = [line(path, "a folder of shards or paths.cache") for path in (job.site.paths.cache, job.shards) if path]
    sources = [line(path, "data.sources") for path in job.sources]
    folders = list(dict.fromkeys([str(Path(job.run).parent), str(job.excluded.parent), job.workdir, *made, *sources]))
    if any(mark in folder for folder in folders for mark in ",:"):
        raise SiteError(f"a container's mounts are lists by commas and colons, which one of {', '.join(map(repr, folders))} has")
    first = f"mkdir -p {' '.join(map(shlex.quote, made))}\n" if made else ""  # what is not there cannot be mounted
    if scheduler.container == "apptainer":
        gpu = [] if job.site.device == "cpu" else ["--rocm" if (job.site.accelerator or "").startswith("mi") else "--nv"]
        words = ["apptainer", "exec", *gpu, *(f"--bind={folder}" for folder in folders), image]
        return f"{first}# In {scheduler.container}, with the folders of the run and of the recipe.\ninside={_array(words)} contained=()\n"
    mounts = ",".join(f"{folder}:{folder}" for folder in folders)
    words = [f"--container-image={image}", f"--container-mounts={mounts}", f"--container-workdir={job.workdir}"]
    return (
        f"{first}# In a container of Pyxis, with the folders of the run and of the recipe; its entry point would print among our answers.\n"
        f"inside=() contained={_array([*words, '--no-container-entrypoint'])}\n"
    )


_SCRIPT = r"""#!/bin/bash
#
# §title
#
# Written by `gigatrain launch`. Handed in again with sbatch, it goes on where the run is.
# Follow it with `gigatrain logs RUN -f`, `gigatrain watch RUN` and `gigatrain ps`, RUN being
#   §folder
#
§sbatch

set -u

# ---- What this job is ------------------------------------------------------------------------------------------------

job="${SLURM_ARRAY_TASK_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}"
run=§run
python=§python
nodes=§nodes ranks_per_node=§ranks_per_node
exclude=§exclude   # nodes that are known to be bad
excluded=§excluded # where those that are found to be bad are written down
cd §workdir || exit 1

# ---- The environment of every rank -----------------------------------------------------------------------------------

unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT
unset SLURM_EXPORT_ENV # srun passes on what is exported here
§modules§environment§container
# How srun starts one task a node, and the tasks that are or start the ranks.
node=§node
rank=§rank

# What Python decides here on the first node.
gigatrain() {
    if [ "${#contained[@]}" -gt 0 ]; then
        srun --overlap --nodes=1 --ntasks=1 --nodelist="$SLURMD_NODENAME" "${contained[@]}" "$python" -m gigatrain "$@"
    else
        "${inside[@]}" "$python" -m gigatrain "$@"
    fi
}

# ---- Signals ---------------------------------------------------------------------------------------------------------
# Slurm sends USR1 to this script before the time limit, and USR1 or TERM before it takes the nodes away. Every rank hears
# USR1, saves and leaves: srun passes it on to its tasks. What runs does so in the background, so that it is heard at once.

told="" step=""
pass_on() { [ -z "$step" ] || kill -USR1 "$step" 2>/dev/null; }
tell() { [ -n "$told" ] || { told=$1; pass_on; }; }
trap 'tell USR1' USR1
trap 'tell TERM' TERM

# Until what runs in the background has ended; a signal interrupts `wait`.
await() {
    while wait "$1"; code=$?; kill -0 "$1" 2>/dev/null; do :; done
}
say() { echo "$(date -u +%FT%T.%3NZ) job $job: $*"; }
listed() { local IFS=,; echo "$*"; }

# A command of Slurm's, for up to $1 seconds: a controller that is busy or restarted is silent for minutes, and no reason to
# give up. What it refuses, it would refuse again.
ask() {
    local limit=$((SECONDS + $1)) pause=2 said
    shift
    while ! { said=$("$@" 2>&1 >&3); } 3>&1; do
        say "$1: $said" >&2
        case "${said,,}" in
            *"unable to contact"* | *"timed out"* | *"connection"* | *"zero bytes"* | *"communication"* | *"standby"* | *"authentication"* | *"temporarily"*) ;;
            *) return 1 ;;
        esac
        [ "$SECONDS" -lt "$limit" ] || return 1
        sleep "$pause"
        pause=$((pause < 30 ? pause * 2 : 60))
    done
}
# A question to all nodes that was cut short, by a signal or its limit, says nothing against those that did not answer.
heard() { cut=(); [ -z "$told" ] && [ "$code" -ne 124 ] || cut=(--cut-short); }
# Nodes that Slurm itself calls down, or that do not answer it.
down() { sinfo --noheader --Node --nodes="$SLURM_JOB_NODELIST" --states=down,no_respond --format=%N 2>/dev/null | sort -u; }

§guard# ---- Attempts --------------------------------------------------------------------------------------------------------

mapfile -t given < <(scontrol show hostnames "$SLURM_JOB_NODELIST") # Slurm takes away what it finds down
while true; do
    # 1. Is anything left to do, and which attempt is this?
    verdict="" attempt="" port="" here=""
    read -r verdict attempt port here < <(gigatrain job begin "$run" | tail -n 1)
    case "$verdict" in
        go) ;;
        done) exit 0 ;;
        stop) exit "$attempt" ;;
        *) say "gigatrain job begin gave no answer; its message is above"; exit 1 ;;
    esac
    export GIGATRAIN_ATTEMPT=$attempt
    mkdir -p "$run/$here"

    # 2. Who is there? One task a node; a node that is gone does not end the others' (--no-kill).
    names=$(ask 150 squeue --noheader --jobs="$job" --format=%N)
    mapfile -t held < <(scontrol show hostnames "${names:-$SLURM_JOB_NODELIST}")
    printf '%s\n' "${given[@]}" >"$run/$here/given"
    printf '%s\n' "${held[@]}" >"$run/$here/held" # a file: an argument of Linux holds 128 KiB, and Slurm takes what has a / for one
    each=(--nodes="${#held[@]}" --ntasks="${#held[@]}" --nodelist="$run/$here/held" --no-kill --kill-on-bad-exit=0 --wait=0)§watch
§examine
    # 3. Train on the chosen ones. Here a lost rank, or node, ends the step.
    [ -z "$told" ] || : >"$run/$here/chosen" # it is over before any rank has begun
    if [ -n "$chosen" ] && [ -z "$told" ]; then
        say "attempt $attempt on $(scontrol show hostlist "$run/$here/chosen")"
        first=${chosen%%,*}
        address=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
        address=${address:-$first}
        ranks=(--nodes="$nodes" --nodelist="$run/$here/chosen" --no-kill=off --kill-on-bad-exit=1 --wait=0)
        train=(train "$run/launch/recipe.json" --site "$run/launch/site.json" --run "$run" --continue)
§train
        [ -z "$told" ] || pass_on # it came just before
        await "$step"
        step=""
        say "attempt $attempt ended with code $code"
    fi

    # 4. What now? done | again, in this allocation | requeue | leave it to the next job or to a person | stop
    verdict="" code_now="" bad=""
    down >"$run/$here/down"
    read -r verdict code_now bad < <(
        gigatrain job after "$run" --code "$code" --signal "${told:-none}" \
            --held "@$run/$here/given" --chosen "@$run/$here/chosen" --excluded "$excluded" \
            --down "@$run/$here/down" "${cut[@]}" | tail -n 1
    )
    case "$verdict" in
        again) [ "$code_now" -eq 0 ] || { sleep "$code_now" & await "$!"; } ;; # what made it fail at once may pass
        requeue)
            trap '' USR1 TERM
            state=$(ask 600 squeue --noheader --jobs="$job" --format=%T)
            if [ "${state:-RUNNING}" != RUNNING ]; then # no answer: then let the next command find out
                say "it is $state: Slurm itself ends it, or queues it again"
                exit 0
            fi
            # Slurm ends this script as soon as it may; the exclusion can be changed only of a job that waits.
            ask 600 scontrol requeue "$job" || { say "it may not requeue itself; go on with: gigatrain requeue $run"; exit 1; }
            bad=$exclude${exclude:+${bad:+,}}$bad
            [ -z "$bad" ] || scontrol update "JobId=$job" "ExcNodeList=$bad"
            exit 0
            ;;
        done | leave) exit 0 ;;
        stop) exit "$code_now" ;;
        *) say "gigatrain job after gave no answer; its message is above"; exit 1 ;;
    esac
done
"""
_GUARD = r"""# ---- Who watches this script -----------------------------------------------------------------------------------------
# A job with --no-kill outlives the node that this script runs on, and would hold the others until its limit, doing nothing.
# So a task on a second node looks twice a minute whether the first is still part of the job, and requeues it if not.

guard=""
watch() {
    local refused=0 has
    while sleep 30; do
        has=$(squeue --noheader --jobs="$1" --states=RUNNING --format=%N) || continue
        [ -n "$has" ] || continue
        scontrol show hostnames "$has" | grep -qxF "$2" && continue
        scontrol requeue "$1" || [ $((refused += 1)) -lt 4 ] || scancel "$1" # one that may not requeue gives its nodes back
    done
}

"""
_WATCH = r"""    if [ "${#held[@]}" -gt 1 ] && { [ -z "$guard" ] || ! kill -0 "$guard" 2>/dev/null; }; then
        srun --overlap --nodes=1 --ntasks=1 --ntasks-per-node=1 --nodelist="${held[1]}" --no-kill --quiet \
            bash -c "$(declare -f watch); watch \"\$@\"" watch "$job" "$SLURMD_NODENAME" >/dev/null 2>&1 </dev/null &
        guard=$!
    fi"""
_ROLL_CALL = r"""    timeout §roll_call_s srun "${each[@]}" "${node[@]}" printenv SLURMD_NODENAME >"$run/$here/present" &
    await "$!"
    heard
    mapfile -t present < <(printf '%s\n' "${held[@]}" | grep -Fxf "$run/$here/present")
    chosen="" code=9
    [ "${#present[@]}" -lt "$nodes" ] || chosen=$(listed "${present[@]:0:nodes}")
    tr , '\n' <<<"$chosen" >"$run/$here/chosen"
"""
_DOCTOR = r"""    timeout §doctor_s srun "${each[@]}" "${node[@]}" "${contained[@]}" "${inside[@]}" \
        "$python" -m gigatrain doctor --site "$run/launch/site.json" --out "$run/$here/doctor" &
    await "$!"
    heard
    down >"$run/$here/down"
    blame=()
    [ "${#cut[@]}" -gt 0 ] || blame=(--excluded "$excluded" --down "@$run/$here/down")
    chosen=$(gigatrain doctor --judge "$run/$here/doctor" --nodes "$nodes" --expect "@$run/$here/held" "${blame[@]}" | tail -n 1
        exit "${PIPESTATUS[0]}")
    code=$?
    [ "$code" -eq 0 ] || chosen=""
    tr , '\n' <<<"$chosen" >"$run/$here/chosen"
"""
_TORCHRUN = r"""        srun "${ranks[@]}" "${rank[@]}" --ntasks="$nodes" "${contained[@]}" "${inside[@]}" \
            "$python" -m gigatrain.launching.agent --nnodes="$nodes" --nproc-per-node="$ranks_per_node" --max-restarts=0 §numa\
            --master-addr="$address" --master-port="$port" --shutdown-timeout=§stop_s \
            -m -- gigatrain "${train[@]}" &
        step=$!"""
_SRUN = r"""        export GIGATRAIN_LAUNCHER=srun MASTER_ADDR=$address MASTER_PORT=$port
        srun "${ranks[@]}" "${rank[@]}" --ntasks=$((nodes * ranks_per_node)) "${contained[@]}" "${inside[@]}" \
            "$python" -m gigatrain "${train[@]}" &
        step=$!
        unset GIGATRAIN_LAUNCHER MASTER_ADDR MASTER_PORT"""
