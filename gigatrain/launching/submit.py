"""`gigatrain launch`: from a recipe and a site to a job in a queue, with everything that can be refused refused before anything is written. Free of torch."""

import datetime
import itertools
import json
import os
import re
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gigatrain import load
from gigatrain.config import Recipe
from gigatrain.errors import CheckpointError, PlanError, RecipeError, RunError, SiteError
from gigatrain.launching import hosts as ssh
from gigatrain.launching import job as jobs
from gigatrain.launching import kubernetes, restart, script, slurm
from gigatrain.launching.job import Job
from gigatrain.launching.size import Size, size
from gigatrain.planning.plan import Plan, plan
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

    @property
    def runs(self) -> list[Path]:
        """The run folders: one, or those of a sweep."""
        folder = Path(self.job.run)
        return [folder / f"{self.job.name}-{index}" for index in range(self.job.sweep)] if self.job.sweep else [folder]


@dataclass(frozen=True)
class Backend:
    """What a kind of scheduler needs to give: its files for a job, and how they are handed in (the ids of the jobs that it made, in order)."""

    files: Callable[[Job, Mapping[str, str]], dict[str, str]]  # the second: recipe.json and site.json
    submit: Callable[[Job], list[str]]
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
    site = resolved(load.site(request.site))
    if request.hosts and request.form:
        raise SiteError("--hosts starts the nodes through ssh, --as writes a manifest of Kubernetes; give one of them")
    hosts = ssh.read(request.hosts) if request.hosts else []
    if hosts or request.form:
        kind = "ssh" if hosts else "kubernetes"
        site = site.model_copy(update={"scheduler": site.scheduler.model_copy(update={"kind": kind})})
    backend = backend_of(site)
    changes = sweep(request.sweep)
    if request.sweep and not backend.sweeps:
        raise SiteError(
            f"{site.name} is run by {site.scheduler.kind!r}, which has no arrays of jobs; launch the runs of a sweep one by one"
        )
    if request.chain > 1 and not backend.chains:
        raise SiteError(f"{site.name} is run by {site.scheduler.kind!r}, where no job waits for another; leave out --chain")
    recipes = tuple(_cached(load.recipe(request.recipe, [*request.overrides, *change]), site) for change in changes)
    name = recipes[0].name
    nodes, gpus = _here(request, site, recipes[0], hosts) if site.scheduler.kind in ("none", "ssh") else (request.nodes, request.gpus)
    large = size(site, nodes=nodes, gpus=gpus, megawatts=request.megawatts)
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
        exclude=tuple(restart.excluded_nodes(folder.parent / f"excluded-{site.name}.jsonl")),
        preflight=request.preflight,
        chain=request.chain,
        sweep=len(changes) if request.sweep else 0,
        shards=os.path.abspath(os.path.expanduser(recipes[0].data.folder)),
        sources=_sources(recipes),
        hosts=tuple(host.name for host in hosts),
        form="trainjob" if request.form == "trainjob" else "jobset",
    )
    if site.scheduler.kind == "kubernetes":
        made = kubernetes.in_pods(made)
    files = backend.files(made, _settings(recipes[0], site))
    taken = folder.exists() and any(folder.iterdir())
    if taken and not request.resume:
        raise RunError(f"{folder} already holds something; go on with the run there with --resume, or name another folder with --run")
    if request.resume:
        _resumable(folder, made, plans)
    return Prepared(made, large, plans, recipes, changes, files, resumed=taken)


def launch(prepared: Prepared) -> Launched:
    """Freeze recipe and site in RUN/launch, hand the job in, and write down that it was. What a refusal leaves of a new run folder is removed."""
    made, folder = prepared.job, Path(prepared.job.run)
    new = not folder.exists()
    try:
        for index, run in enumerate(prepared.runs):
            launch_folder = run / "launch"
            launch_folder.mkdir(parents=True, exist_ok=True)
            (run / "logs").mkdir(exist_ok=True)
            one = made.model_copy(update={"run": str(run), "recipe": str(launch_folder / "recipe.json"), "sweep": 0})
            for name, text in _settings(prepared.recipes[index], made.site).items():
                _write(launch_folder / name, text)
            _write(launch_folder / "job.json", one.model_dump_json(by_alias=True, indent=1))
        (folder / "launch").mkdir(exist_ok=True)
        (folder / "logs").mkdir(exist_ok=True)
        if made.sweep:
            _write(folder / "launch" / "job.json", made.model_dump_json(by_alias=True, indent=1))
        for name, text in prepared.files.items():
            _write(folder / "launch" / name, text)
        numbers = BACKENDS[made.site.scheduler.kind].submit(made)
    except OSError as failure:
        raise RunError(f"{folder} cannot be written: {failure.strerror}; name another folder with --run") from None
    except RunError:
        if new:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    for index, run in enumerate(prepared.runs if numbers else ()):
        submitted(run, [f"{number}_{index}" for number in numbers] if made.sweep else numbers)
    if made.sweep:
        submitted(folder, numbers)
    return Launched(prepared, numbers)


def submitted(run: Path, numbers: Sequence[str]) -> None:
    """Write down that a run was handed in (again): what a job reads as leave to go on after a stop."""
    jobs.record(run, "submitted", job=numbers[0], chain=list(numbers[1:]) or None)


def backend_of(site: Site) -> Backend:
    """How this site is run; SiteError if it has no scheduler that we know."""
    if site.scheduler.kind not in BACKENDS:
        known = ", ".join(name for name in sorted(BACKENDS))
        raise SiteError(
            f"{site.name} has scheduler.kind {site.scheduler.kind!r}: nothing to hand a job to (known: {known}); `gigatrain train` runs on this machine"
        )
    return BACKENDS[site.scheduler.kind]


def resolved(site: Site) -> Site:
    """The site with the environment's variables put in where it names them, but for paths.local, which is a node's own."""
    paths = site.paths.model_copy(
        update={name: expanded(text, f"{site.name}: paths.{name}") for name in ("runs", "cache") if (text := getattr(site.paths, name))}
    )
    scheduler = site.scheduler
    if scheduler.image:
        scheduler = scheduler.model_copy(update={"image": expanded(scheduler.image, f"{site.name}: scheduler.image")})
    return site.model_copy(update={"paths": paths, "scheduler": scheduler})


def expanded(text: str, what: str) -> str:
    """`$NAME` and `${NAME}` by the environment, `~` by the home; SiteError for a variable that is not set."""

    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        if not os.environ.get(name):
            raise SiteError(f"{what} is {text!r}, and the environment has no {name}; export {name}=..., or name the folder with --run")
        return os.environ[name]

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


def _cached(recipe: Recipe, site: Site) -> Recipe:
    """The recipe with its shards in the site's cache, unless it says itself where they are: homes are small, and on some sites not on the nodes."""
    if site.paths.cache is None or "folder" in recipe.data.model_fields_set:
        return recipe
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"folder": f"{site.paths.cache}/data"})})


def _sources(recipes: Sequence[Recipe]) -> tuple[str, ...]:
    """Folders of the texts that the recipes read, as far as they are here: a glob or a prefix is in one."""
    found: dict[str, None] = {}
    for source in (source for recipe in recipes for source in recipe.data.sources if source.path):
        path = Path(os.path.abspath(os.path.expanduser(source.path or "")))
        while source.kind != "hub" and not path.exists():
            path = path.parent
        folder = path if path.is_dir() else path.parent
        if path.exists() and folder != Path("/"):
            found[str(folder)] = None
    return tuple(found)


def _folder(request: Request, site: Site, name: str, now: datetime.datetime) -> Path:
    if request.folder:
        return Path(os.path.abspath(os.path.expanduser(request.folder)))
    if request.resume:
        raise RunError("--resume goes on with the run of a folder; name it with --run")
    return Path(os.path.abspath(site.paths.runs)) / f"{name}-{now:%Y%m%d-%H%M%S}"


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


def _resumable(folder: Path, made: Job, plans: Sequence[Plan]) -> None:
    """Whether the run there can go on: it is launched or trained, it is this plan's, and no job of it is in the queue."""
    if made.sweep:
        raise RunError("--resume goes on with one run; name one of the sweep's folders with --run, without --sweep")
    record = folder / "run.json"
    if not record.is_file() and not (folder / "launch" / "job.json").is_file():
        raise CheckpointError(f"{folder} holds no run, so there is nothing to resume; leave out --resume")
    if record.is_file() and (said := json.loads(record.read_text(encoding="utf-8")).get("identity")) != plans[0].identity:
        raise CheckpointError(
            f"{folder} was started under another plan ({str(said)[:12]}, this is {plans[0].identity[:12]}); "
            "resume with the recipe, the --set and the number of ranks that it began with, or name another folder with --run"
        )
    last = next((event for event in reversed(jobs.history(folder)) if event["event"] == "submitted"), None)
    if last and made.site.scheduler.kind in ("none", "ssh") and (pid := ssh.alive(folder)):
        raise RunError(f"the job of this run, process {pid}, is alive; wait for it, or end it with: gigatrain cancel {folder}")
    if last and made.site.scheduler.kind == "slurm" and shutil.which("squeue"):
        alive = [
            one
            for one in slurm.queued(str(last["job"]), *last.get("chain", []))
            if one.state in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING")
        ]
        if alive:
            raise RunError(f"job {alive[0].id} of this run is {alive[0].state}; wait for it, or end it with: gigatrain cancel {folder}")


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
        numbers.append(slurm.submit(path, *after, account=made.account or made.site.scheduler.account))
    return numbers


def _no_files(made: Job, _: Mapping[str, str]) -> dict[str, str]:
    return {}


BACKENDS: dict[str, Backend] = {
    "slurm": Backend(_slurm_files, _slurm_submit, sweeps=True, chains=True),
    "kubernetes": Backend(kubernetes.files, kubernetes.submit),
    "ssh": Backend(_no_files, ssh.submit),
    "none": Backend(_no_files, ssh.submit),
}
