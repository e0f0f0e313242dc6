"""`gigatrain launch`: from a recipe and a site to a job in a queue, with everything that can be refused refused before anything is written. Free of torch."""

import datetime
import itertools
import json
import math
import os
import re
import shlex
import shutil
import socket
import sys
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gigatrain import floors, load
from gigatrain.architectures import Architecture
from gigatrain.config import Recipe
from gigatrain.errors import CheckpointError, PlanError, RecipeError, RunError, SiteError
from gigatrain.launching import hosts as ssh
from gigatrain.launching import job as jobs
from gigatrain.launching import kubernetes, restart, script, slurm
from gigatrain.launching.job import Job
from gigatrain.launching.size import Size, kept, shown, size, size_of, spared
from gigatrain.planning import cost, legs
from gigatrain.planning.plan import Plan, plan
from gigatrain.recovery import meeting
from gigatrain.site import Site


@dataclass(frozen=True)
class Request:
    """What a user asks `gigatrain launch` for."""

    recipe: str
    site: str
    overrides: tuple[str, ...] = ()
    nodes: int | None = None
    gpus: int | None = None
    megawatts: float | None = None
    spares: int = 0
    time_s: int | None = None
    account: str | None = None
    launcher: jobs.Launcher = "torchrun"
    preflight: bool = True
    folder: str | None = None
    resume: bool = False
    other_numbers: bool = False  # with resume: precision and forms of states may differ (planning/legs.py)
    sweep: tuple[str, ...] = ()  # KEY=V1,V2,... each
    chain: int = 1
    hosts: str | None = None  # a file: the hosts that ssh starts the nodes on
    form: str | None = None  # "jobset" or "trainjob": as a manifest of Kubernetes, whatever the site's scheduler is


@dataclass(frozen=True)
class Prepared:
    """A request that nothing speaks against: what would be written and submitted."""

    job: Job
    size: Size
    plans: tuple[Plan, ...]  # one, or one a run of the sweep
    recipes: tuple[Recipe, ...]
    changes: tuple[tuple[str, ...], ...]  # of each run of the sweep: its own overrides
    files: dict[str, str]  # of RUN/launch: the scheduler's own
    resumed: bool = False
    notes: tuple[str, ...] = ()  # on power and on where it comes from, for a reader

    @property
    def runs(self) -> list[Path]:
        """The run folders: one, or those of a sweep."""
        return runs_of(self.job)


@dataclass(frozen=True)
class Backend:
    """What a kind of scheduler needs to give: its files for a job, and how they are handed in (the ids of the jobs that it made, in order)."""

    files: Callable[[Job, Mapping[str, str]], dict[str, str]]  # the second: recipe.json and site.json
    submit: Callable[[Job], list[str]]
    preview: Callable[[Job], str] | None = None  # where there are no files: the commands that would be run
    sweeps: bool = False  # whether it has arrays
    chains: bool = False  # whether a job can wait for another


@dataclass
class Launched:
    """What came of it."""

    prepared: Prepared
    jobs: list[str] = field(default_factory=list)


def prepare(request: Request, *, measure: Callable[[Any], Any] | None = None, today: datetime.datetime | None = None) -> Prepared:
    """Everything that can be found out before a job is submitted; writes nothing.

    Raises RecipeError, SiteError, PlanError, RunError (a folder that is taken, a job that still runs), CheckpointError (another plan than the run's).
    """
    site = resolved(load.site(request.site), runs=request.folder is None and not request.resume, account=request.account)
    if request.hosts and request.form:
        raise SiteError("--hosts starts the nodes through ssh, --as writes a manifest of Kubernetes; give one of them")
    hosts = ssh.read(request.hosts) if request.hosts else []
    if hosts or request.form:
        kind = "ssh" if hosts else "kubernetes"
        # Options are those of the site's own scheduler: sbatch's mean nothing to ssh, or something else.
        options = site.scheduler.options if site.scheduler.kind == kind else ()
        site = site.model_copy(update={"scheduler": site.scheduler.model_copy(update={"kind": kind, "options": options})})
    backend = backend_of(site)
    changes = sweep(request.sweep)
    if request.sweep and not backend.sweeps:
        raise SiteError(
            f"{site.name} is run by {site.scheduler.kind!r}, which has no arrays of jobs; launch the runs of a sweep one by one"
        )
    if request.chain > 1 and not backend.chains:
        raise SiteError(f"{site.name} is run by {site.scheduler.kind!r}, where no job waits for another; leave out --chain")
    recipes = tuple(cached(load.recipe(request.recipe, [*request.overrides, *change]), site) for change in changes)
    name = recipes[0].name
    nodes, gpus = _here(request, site, recipes[0], hosts) if site.scheduler.kind in ("none", "ssh") else (request.nodes, request.gpus)
    large = size_of(site, recipes[0], nodes, gpus, request.megawatts) or size(site)  # which says how to ask
    large = spared(large, site, request.spares)
    sized, recipes = recipes, tuple(kept(recipe, request.megawatts) for recipe in recipes)
    notes = tuple(
        f"--megawatts {one.power.megawatts:g} is also power.megawatts of the run, which keeps to it"
        for one, before in zip(recipes, sized, strict=True)
        if one is not before
    )
    if large.nodes is None or large.ranks_per_node is None:
        raise SiteError(
            f"{site.name} does not say how many GPUs a node has (node.accelerators or node.ranks); give --nodes as well as --gpus"
        )
    segment, asked = site.scheduler.segment, large.nodes + request.spares
    if site.scheduler.kind == "slurm" and segment and asked % segment:
        raise SiteError(
            f"{site.name} hands out nodes in segments of {segment} (scheduler.segment), which does not divide {large.nodes} nodes and "
            f"{request.spares} spares; ask for {-asked % segment} more spare(s) with --spares {request.spares + -asked % segment}"
        )
    plans = tuple(plan(recipe, site, large.ranks, measure=measure) for recipe in recipes)
    folder = _folder(request, site, name, today or datetime.datetime.now())
    time_s = _time(request, site)
    made = Job(
        name=name,
        run=str(folder),
        recipe=str(folder / "launch" / "recipe.json"),
        workdir=str(Path.cwd()),
        python=_python(site),
        site=site,
        nodes=large.nodes,
        spares=request.spares,
        ranks_per_node=large.ranks_per_node,
        launcher=request.launcher,
        time_s=time_s,
        account=request.account,
        preflight=request.preflight,
        chain=request.chain,
        sweep=len(changes) if request.sweep else 0,
        shards=os.path.abspath(os.path.expanduser(recipes[0].data.folder)),
        sources=_sources(recipes),
        hosts=tuple(host.name for host in hosts),
        form="trainjob" if request.form == "trainjob" else "jobset",
    )
    before = jobs.load(folder) if request.resume and (folder / "launch" / "job.json").is_file() else None
    if before is not None and before.excluded_in and Path(before.excluded_in).is_dir():  # a folder that was moved has left its sweep
        made = made.model_copy(update={"excluded_in": before.excluded_in})
    made = made.model_copy(update={"exclude": tuple(restart.excluded_nodes(made.excluded))})
    if site.scheduler.kind == "kubernetes":
        made = kubernetes.in_pods(made)
    files = backend.files(made, _settings(recipes[0], site))
    taken = folder.exists() and any(folder.iterdir())
    if taken and not request.resume:
        raise RunError(f"{folder} already holds something; go on with the run there with --resume, or name another folder with --run")
    if request.resume:
        notes += _resumable(folder, made, before, plans, other_numbers=request.other_numbers)
    return Prepared(made, large, plans, recipes, changes, files, resumed=taken, notes=tuple(dict.fromkeys(notes)))


def launch(prepared: Prepared) -> Launched:
    """Freeze recipe and site in RUN/launch, hand the job in, and write down that it was. What a refusal leaves of a new run folder is removed."""
    made, folder = prepared.job, Path(prepared.job.run)
    new = not folder.exists()
    if prepared.resumed and (before := _in_cluster(folder)) is not None and before.site.name == made.site.name:
        kubernetes.delete(before, wait=True)  # it has ended, and the cluster would take the same manifest for nothing new
    try:
        for index, run in enumerate(prepared.runs):
            launch_folder = run / "launch"
            floors.private(run)
            launch_folder.mkdir(exist_ok=True)
            (run / "logs").mkdir(exist_ok=True)
            one = made.model_copy(update={"run": str(run), "recipe": str(launch_folder / "recipe.json"), "sweep": 0})
            if made.sweep:
                one = one.model_copy(update={"excluded_in": str(folder.parent)})
            for name, text in _settings(prepared.recipes[index], made.site).items():
                _write(launch_folder / name, text)
            _write(launch_folder / "job.json", one.model_dump_json(by_alias=True, indent=1))
            if made.site.scheduler.kind == "slurm":  # elsewhere ranks may be another user's, who cannot read it
                meeting.make_token(run)
        (folder / "launch").mkdir(exist_ok=True)
        (folder / "logs").mkdir(exist_ok=True)
        if made.sweep:
            _write(folder / "launch" / "job.json", made.model_dump_json(by_alias=True, indent=1))
        for name, text in prepared.files.items():
            _write(folder / "launch" / name, text)
        return Launched(prepared, hand_in(made))
    except OSError as failure:
        raise RunError(f"{folder} cannot be written: {failure.strerror}; name another folder with --run") from None
    except RunError as failure:
        if new and not isinstance(failure, Undone | slurm.NoAnswer):  # else a job may be there, and write into it
            shutil.rmtree(folder, ignore_errors=True)
        raise


class Undone(RunError):
    """A chain that was refused half-way: `numbers` are the jobs that were made, `left` those of them that could not be taken back."""

    def __init__(self, message: str, numbers: Sequence[str], left: Sequence[str]) -> None:
        super().__init__(message)
        self.numbers, self.left = list(numbers), list(left)


def hand_in(made: Job) -> list[str]:
    """Submit a job whose files are written, and write down that it was (again): what a job reads as leave to go on after a stop.

    Raises RunError where it was refused, Undone for half a chain and NoAnswer where nobody knows; of those two the history tells.
    """
    folder = Path(made.run)
    runs = [folder, *runs_of(made)] if made.sweep else [folder]
    try:
        numbers = BACKENDS[made.site.scheduler.kind].submit(made)
    except Undone as failure:
        _submitted(made, failure.left or failure.numbers)
        for run in runs if not failure.left else ():
            jobs.record(run, "cancelled")  # what began meanwhile sees it, and ends
        raise
    except slurm.NoAnswer as failure:
        for run in runs:
            jobs.record(run, "unanswered", why=str(failure))
        raise slurm.NoAnswer(
            f"{failure}. It may have taken the job all the same: `squeue --me --name {made.name}` shows it; "
            f"before you launch again, end it with scancel. {folder} is kept"
        ) from None
    if numbers:
        _submitted(made, numbers)
    return numbers


def complete(made: Job) -> None:
    """Write what the scheduler is handed, where a run has none of its own: of a sweep's run only the sweep's has been written."""
    launch_folder = Path(made.run) / "launch"
    try:
        settings = {name: (launch_folder / name).read_text(encoding="utf-8") for name in ("recipe.json", "site.json")}
        fresh = made.model_copy(update={"exclude": tuple(restart.excluded_nodes(made.excluded))})
        for name, text in backend_of(made.site).files(fresh, settings).items():
            if not (launch_folder / name).is_file():
                _write(launch_folder / name, text)
    except OSError as failure:
        raise RunError(
            f"{failure.filename} is needed to start the job again: {failure.strerror}; `gigatrain launch --resume` writes it"
        ) from None


def _submitted(made: Job, numbers: Sequence[str]) -> None:
    for index, run in enumerate(runs_of(made)):
        each = [f"{number}_{index}" for number in numbers] if made.sweep else numbers
        jobs.record(run, "submitted", job=each[0], chain=list(each[1:]) or None)
    if made.sweep:
        jobs.record(Path(made.run), "submitted", job=numbers[0], chain=list(numbers[1:]) or None)


def runs_of(made: Job) -> list[Path]:
    """The run folders of a job: one, or those of a sweep."""
    folder = Path(made.run)
    return [folder / f"{made.name}-{index}" for index in range(made.sweep)] if made.sweep else [folder]


def backend_of(site: Site) -> Backend:
    """How this site is run; SiteError if it has no scheduler that we know."""
    if site.scheduler.kind not in BACKENDS:
        known = ", ".join(name for name in sorted(BACKENDS))
        raise SiteError(
            f"{site.name} has scheduler.kind {site.scheduler.kind!r}: nothing to hand a job to (known: {known}); `gigatrain train` runs on this machine"
        )
    return BACKENDS[site.scheduler.kind]


def resolved(site: Site, *, runs: bool = True, account: str | None = None) -> Site:
    """The site with the environment's variables put in where it names them, but for paths.local, which is a node's own.

    `account`, where one is given, stands for $SBATCH_ACCOUNT, as it does for Slurm. Without `runs` paths.runs is left as it is: a run folder was named.
    """
    own = "set it in a site file of your own (`gigatrain sites NAME` shows this one's path)"
    paths = {"cache": own, **({"runs": "name the folder with --run"} if runs else {})}
    given = {
        name: expanded(text, f"{site.name}: paths.{name}", way, account)
        for name, way in paths.items()
        if (text := getattr(site.paths, name))
    }
    scheduler = site.scheduler
    if scheduler.image:
        scheduler = scheduler.model_copy(update={"image": expanded(scheduler.image, f"{site.name}: scheduler.image", own, account)})
    return site.model_copy(update={"paths": site.paths.model_copy(update=given), "scheduler": scheduler})


def expanded(text: str, what: str, way: str, account: str | None = None) -> str:
    """`$NAME` and `${NAME}` by the environment, `~` by the home; SiteError for a variable that is not set, `way` being the other way out."""
    known = {**os.environ, **({"SBATCH_ACCOUNT": account} if account else {})}

    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        if not known.get(name):
            billed = ", give --account" * (name == "SBATCH_ACCOUNT")
            raise SiteError(f"{what} is {text!r}, and the environment has no {name}; export {name}=...{billed}, or {way}")
        return known[name]

    return os.path.expanduser(re.sub(r"\$(?:(\w+)|\{(\w+)\})", value, text))


def sweep(texts: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    """`optim.lr=1e-3,2e-3` (one or several) to the overrides of each run: every combination, the last key running fastest; one empty one without a sweep."""
    keys: list[list[str]] = []
    for text in texts:
        key, equals, raw = text.partition("=")
        if not equals or not key.strip() or not raw.strip():
            raise RecipeError(f"--sweep {text!r} is not of the form key=v1,v2,v3, for instance --sweep optim.lr=1e-3,2e-3")
        try:
            values = [_toml(value) for value in tomllib.loads(f"v = [{raw}]")["v"]]  # values that hold commas themselves
        except tomllib.TOMLDecodeError:
            values = [part.strip() for part in raw.split(",")]
        if len(set(values)) < len(values):
            raise RecipeError(f"--sweep {text!r} names a value twice, which would be two equal runs")
        keys.append([f"{key.strip()}={value}" for value in values])
    found = tuple(itertools.product(*keys))
    if len(found) > 1000:
        raise RecipeError(
            f"--sweep makes {len(found):,} runs, and one array holds 1,000 (Slurm's MaxArraySize is often 1,001); take fewer values"
        )
    return found


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(name)} = {_toml(inner)}" for name, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value) if not isinstance(value, float) else repr(value)


def cached(recipe: Recipe, site: Site) -> Recipe:
    """The recipe with its shards in the site's cache, unless it says itself where they are: homes are small, and on some sites not on the nodes."""
    if site.paths.cache is None or "folder" in recipe.data.model_fields_set:
        return recipe
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"folder": f"{site.paths.cache}/data"})})


def _sources(recipes: Sequence[Recipe]) -> tuple[str, ...]:
    """Folders of all that the recipes read, as far as it is here: a container sees no other. A glob or a prefix is in one; a hub's name is none."""
    found: dict[str, None] = {}
    for recipe in recipes:
        sources = (*recipe.data.sources, *recipe.validation.sets)
        texts = [source.path for source in sources if source.path and source.kind != "hub"]
        perhaps = [source.path for source in sources if source.kind == "hub"]
        perhaps += [recipe.model.source, recipe.tokenizer.source, recipe.tokenizer.template, recipe.optim.source, recipe.objective.teacher]
        perhaps += [recipe.adapter.source if recipe.adapter else None, recipe.power.schedule]
        for name in texts + [name for name in perhaps if name and Path(os.path.expanduser(name)).exists()]:
            path = Path(os.path.abspath(os.path.expanduser(name)))
            while not path.exists():
                path = path.parent
            folder = path if path.is_dir() else path.parent
            if folder != Path("/"):
                found[str(folder)] = None
    return tuple(found)


def _folder(request: Request, site: Site, name: str, now: datetime.datetime) -> Path:
    if request.folder:
        return Path(os.path.abspath(os.path.expanduser(request.folder)))
    if request.resume:
        raise RunError("--resume goes on with the run of a folder; name it with --run")
    return jobs.new_folder(Path(os.path.abspath(site.paths.runs)), name, now)


def _time(request: Request, site: Site) -> int | None:
    """The job's time limit: as asked, else the longest that the site gives, else Slurm's own default."""
    longest, lead = site.scheduler.max_time_s.value, site.scheduler.lead_s
    if request.time_s and longest and request.time_s > longest:
        raise SiteError(
            f"--time {slurm.clock(request.time_s)} is longer than {site.name} allows, {slurm.clock(int(longest))}; "
            "the run goes on in the next job by itself, so ask for less"
        )
    time_s = request.time_s or (int(longest) if longest else None)
    if time_s and time_s <= lead:
        raise PlanError(
            f"a job of {slurm.clock(time_s)} would be told to save at its start: scheduler.lead_s is {lead} s; ask for more with --time"
        )
    return time_s


def _python(site: Site) -> str:
    if site.scheduler.container != "none":
        return "python3"  # the image's own
    if not sys.executable or not os.access(sys.executable, os.X_OK):
        raise RunError(
            f"this Python, {sys.executable!r}, cannot be started again by its path; run gigatrain from the environment that the nodes see"
        )
    return os.path.abspath(sys.executable)


def _resumable(folder: Path, made: Job, before: Job | None, plans: Sequence[Plan], *, other_numbers: bool) -> tuple[str, ...]:
    """Whether the run there can go on: it is launched or trained, it is this plan's, and no job of it is in the queue. What there is to say of that."""
    if made.sweep:
        raise RunError("--resume goes on with one run; name one of the sweep's folders with --run, without --sweep")
    record = folder / "run.json"
    if not record.is_file() and not (folder / "launch" / "job.json").is_file():
        raise CheckpointError(f"{folder} holds no run, so there is nothing to resume; leave out --resume")
    if record.is_file() and (said := _identity(record)) != plans[0].identity:
        try:
            under = legs.stored(folder, {"identity": said, **json.loads(record.read_text(encoding="utf-8"))})
        except RunError as failure:
            raise CheckpointError(
                f"{folder} was started under another plan ({said[:12]}, this is {plans[0].identity[:12]}), and which one is unknown: {failure}; "
                "name another folder with --run"
            ) from None
        legs.agree(folder, under, plans[0], other_numbers=other_numbers)
    if before is not None and before.site.name != made.site.name:
        return _left(folder, before, made)
    last = next((event for event in reversed(jobs.history(folder)) if event["event"] == "submitted"), None)
    if last and made.site.scheduler.kind in ("none", "ssh") and (pid := ssh.alive(folder)):
        raise RunError(f"the job of this run, process {pid}, is alive; wait for it, or end it with: gigatrain cancel {folder}")
    if (there := _in_cluster(folder)) is not None and (whole := kubernetes.found(there)) is not None:
        state, why = kubernetes.state(whole)
        if state in ("running", "queued"):
            raise RunError(
                f"{kubernetes.name(there)} of this run is {state}{f' ({why})' * bool(why)}; wait for it, or end it with: gigatrain cancel {folder}"
            )
    if last and made.site.scheduler.kind == "slurm" and shutil.which("squeue"):
        alive = [one for one in slurm.queued(str(last["job"]), *last.get("chain", [])) if one.state in slurm.ALIVE]
        if alive:
            raise RunError(f"job {alive[0].id} of this run is {alive[0].state}; wait for it, or end it with: gigatrain cancel {folder}")
    return ()


def _left(folder: Path, before: Job, made: Job) -> tuple[str, ...]:
    """Of a run that comes from another site, whose scheduler is not asked: a number of its jobs may be anybody's here. A job that is alive is refused where
    this machine can see it."""
    found = ssh.process_of(folder)
    if found is not None and found["host"] == socket.gethostname() and (pid := ssh.alive(folder)):
        raise RunError(
            f"the job of this run on {before.site.name}, process {pid}, is alive; wait for it, or end it with: gigatrain cancel {folder}"
        )
    moved = f"the run comes from {before.site.name}, goes on on {made.site.name} and is a new leg there"
    last = next(
        (event for event in reversed(jobs.history(folder)) if event["event"] in ("submitted", "judged", "cancelled", "ended")), None
    )
    if last is not None and last["event"] == "submitted":
        moved += f"; job {last.get('job')} there has not said that it ended, and {made.site.name} cannot ask: see that it has"
    return (moved,)


def _in_cluster(folder: Path) -> Job | None:
    """The job that the run had on Kubernetes, where a cluster can be asked for it."""
    if not (folder / "launch" / "job.json").is_file() or (made := jobs.load(folder)).site.scheduler.kind != "kubernetes":
        return None
    return None if kubernetes.unreachable() else made


def _identity(record: Path) -> str:
    """Of the plan that a run began with, from its run.json."""
    try:
        said = json.loads(record.read_text(encoding="utf-8"))
        return str(said["identity"])
    except OSError as failure:
        raise CheckpointError(f"{record} cannot be read: {failure.strerror}") from None
    except (ValueError, TypeError, KeyError, RecursionError) as failure:
        raise CheckpointError(
            f"{record} is not what a run writes ({type(failure).__name__}: {failure}), so whose run this is is unknown; "
            "mend it from a copy, or begin in another folder with --run"
        ) from None


def _write(path: Path, text: str) -> None:
    path.write_text(text if text.endswith("\n") else text + "\n", encoding="utf-8")
    if path.suffix == ".sh":
        path.chmod(0o755)


def _settings(recipe: Recipe, site: Site) -> dict[str, str]:
    """Recipe and site as they are: what a rank reads."""
    return {
        "recipe.json": json.dumps(recipe.model_dump(mode="json", by_alias=True), indent=1) + "\n",
        "site.json": json.dumps(site.model_dump(mode="json", by_alias=True), indent=1) + "\n",
    }


def _here(request: Request, site: Site, recipe: Recipe, hosts: Sequence[ssh.Host]) -> tuple[int | None, int | None]:
    """Nodes and ranks where nobody hands nodes out: this machine or the hosts of the file, each with as many ranks as are asked for."""
    nodes = len(hosts) or 1
    if request.nodes not in (None, nodes) or request.megawatts is not None or request.spares:
        raise SiteError(
            f"{nodes} machine(s) are named here, so --nodes, --megawatts and --spares have no meaning; --hosts FILE names others"
        )
    slots = hosts[0].slots if hosts else None
    gpus = request.gpus or (slots * nodes if slots else None) or recipe.train.nproc
    return nodes, gpus or (None if site.ranks_per_node else nodes)


def _slurm_files(made: Job, _: Mapping[str, str]) -> dict[str, str]:
    return {"job.sh": script.render(made)}


def _slurm_submit(made: Job) -> list[str]:
    path, numbers = Path(made.run) / "launch" / "job.sh", []
    for _ in range(made.chain):
        after = [f"--dependency=afterany:{numbers[-1]}"] if numbers else []
        try:
            numbers.append(slurm.submit(path, *after, account=made.account or made.site.scheduler.account))
        except RunError as failure:
            if not numbers:
                raise
            raise _taken_back(made, numbers, failure) from None
    return numbers


def _taken_back(made: Job, numbers: Sequence[str], failure: RunError) -> Undone:
    """The first links of a chain, out of the queue again: half of one is not what was asked for."""
    left = []
    for number in reversed(numbers):  # from the end, so that none begins
        try:
            slurm.cancel(number)
        except RunError:
            left.insert(0, number)
    back = [number for number in numbers if number not in left]
    said = f"job {len(numbers) + 1} of {made.chain}: {failure}"
    said += f"; {', '.join(back)} before it {'was' if len(back) == 1 else 'were'} cancelled" if back else ""
    said += f"; {', '.join(left)} could not be cancelled and will run: gigatrain cancel {made.run}" if left else ""
    return Undone(f"{said}. {made.run} is kept, with what was submitted in launch/history.jsonl", numbers, left)


def summary(prepared: Prepared) -> list[str]:
    """What a reader should know before it waits in a queue, one line each: how large, for how long, what is assumed, what is left out."""
    made, large = prepared.job, prepared.size
    spares = f" and {made.spares} spare" if made.spares else ""
    limit = f", {slurm.clock(made.time_s)} each" if made.time_s else ""
    draws = f", {shown(large.watts)} at the facility" if large.watts is not None else ""
    lines = [f"{made.name} on {made.site.name}, {made.nodes} x {made.ranks_per_node} ranks{spares}{limit}{draws}"]
    lines += [f"  assumes  {text}" for text in large.assumes]
    if made.site.scheduler.kind == "slurm" and not (made.account or made.site.scheduler.account):
        lines.append(
            f"  account  {billed}, of SBATCH_ACCOUNT"
            if (billed := os.environ.get("SBATCH_ACCOUNT"))
            else "  account  none is named: Slurm bills your default one, and refuses where it knows none; --account A names it"
        )
    lines += [
        f"  power    {text}" for text in dict.fromkeys(one.draw.text() for one in prepared.plans if one.draw.budget_watts is not None)
    ]
    lines += [f"  {'moves' if text.startswith('the run comes') else 'power':8} {text}" for text in prepared.notes]
    if made.exclude:
        lines.append(f"  excludes {len(made.exclude)} node{'s' * (len(made.exclude) > 1)} ({made.excluded})")
        has = made.site.nodes.value
        if has is not None and has - len(made.exclude) < made.nodes + made.spares:
            lines.append(
                f"  warning  {made.site.name} has {has:,.0f} nodes, and {made.nodes + made.spares:,} are asked for: they can never be had "
                "without those; take out the lines of the nodes that are mended"
            )
    lines += [f"  warning  {text}" for text in dict.fromkeys(filter(None, (_late(one, made.site) for one in prepared.plans)))]
    for run, change in zip(prepared.runs, prepared.changes, strict=True):
        lines.append(f"  run      {run}  {'  '.join(change)}".rstrip())
    return lines


def _late(one: Plan, site: Site) -> str | None:
    """Whether a save surely takes longer than a job has for it; None where that is not known, which is nearly everywhere.

    Of a checkpoint's bytes only the least are counted, master weights and moments, and of what Slurm gives before the limit the 60 s that it may be late
    are taken off.
    """
    speed, scheduler = site.storage.write_gbyte_s.value, site.scheduler
    if not speed or not isinstance(one.architecture, Architecture) or scheduler.kind not in ("slurm", "kubernetes"):
        return None
    size = cost.optimizer_bytes(one.architecture, one.compute, one.optim) + (4 * one.parameters if one.compute == "fp32" else 0)
    needs, has = size / (speed * 1e9), scheduler.lead_s - 60
    if needs <= has:
        return None
    return (
        f"a checkpoint of at least {size / 1e9:,.0f} GB takes {needs:,.0f} s at {speed:g} GB/s (storage.write_gbyte_s), and a job has {max(0, has)} s "
        f"for it before it is ended (scheduler.lead_s {scheduler.lead_s} less 60); raise lead_s to {math.ceil(needs) + 60}"
    )


def preview(prepared: Prepared) -> str:
    """What would be handed in: the scheduler's files, or the commands that start every node."""
    show = backend_of(prepared.job.site).preview
    return show(prepared.job) if show else "".join(prepared.files.values())


def _ssh_preview(made: Job) -> str:
    steps = [*(ssh.doctors(made, "000") if made.preflight and made.hosts else []), *ssh.commands(made, "000", 29500)]
    return "# The first attempt; each attempt gets a free port in place of 29500.\n" + "".join(f"{shlex.join(step)}\n" for step in steps)


def _no_files(made: Job, _: Mapping[str, str]) -> dict[str, str]:
    return {}


BACKENDS: dict[str, Backend] = {
    "slurm": Backend(_slurm_files, _slurm_submit, sweeps=True, chains=True),
    "kubernetes": Backend(kubernetes.files, kubernetes.submit),
    "ssh": Backend(_no_files, ssh.submit, _ssh_preview),
    "none": Backend(_no_files, ssh.submit, _ssh_preview),
}
