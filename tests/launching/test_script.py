"""The script of a job: readable, checked by shellcheck, and harmless whatever the names in it are, as real bash sees it."""

import shutil
import subprocess
from pathlib import Path

import pytest

from gigatrain import load
from gigatrain.errors import RunError, SiteError
from gigatrain.launching import script
from gigatrain.launching.job import Job
from gigatrain.site import Site

# Names that a folder, a value or an option may have and that must stay what they are.
HOSTILE = [
    "; $(touch PWNED)",
    "`touch PWNED`",
    "a'b",
    'a"b$(touch PWNED)"',
    "'; touch PWNED; '",
    "comma,colon:and=more",
    "-leading --dash",
    "space  and\\backslash",
    "*?[a-z]{1,2}~",
    "é→😀",
    "#hash %j %%",
    "$HOME ${HOME} !! &&|| > PWNED",
]


def site(**scheduler):
    more = {name: scheduler.pop(name) for name in ("device", "node", "environment", "paths") if name in scheduler}
    return Site.model_validate({"name": "here", "summary": "", "device": "cpu", "scheduler": {"kind": "slurm"} | scheduler} | more)


def job(where=None, **more):
    paths = {"run": "/runs/a", "recipe": "/runs/a/launch/recipe.json", "workdir": "/work", "python": "/usr/bin/python3"}
    return Job.model_validate(paths | {"name": "tiny", "site": where or site(), "nodes": 2, "ranks_per_node": 4} | more)


def shellcheck(text, *more):
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed; CI installs it")
    ended = subprocess.run(["shellcheck", "--shell=bash", *more, "-"], input=text, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout


def options(made):
    return [line.removeprefix("#SBATCH ") for line in script.render(made).splitlines() if line.startswith("#SBATCH")]


FULL = site(
    device="cuda",
    partition="a,b",
    account="eu-42",
    qos="normal",
    constraint="gpu&nvme",
    gpu_type="h100",
    cpus_per_task=True,
    bind="closest",
    switches=1,
    segment=2,
    options=("--hint=nomultithread", "--mail-user=me@here.eu"),
    modules=("CUDA/12", "NCCL"),
    container="apptainer",
    image="/images/torch 2.sif",
    node={"cores": {"value": 64, "basis": "declared", "source": "test"}},
    environment={"NCCL_IB_HCA": "mlx5_0,mlx5_1", "NCCL_DEBUG": "WARN"},
)


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
@pytest.mark.parametrize("preflight", [True, False])
def test_every_form_passes_shellcheck(launcher, preflight):
    for where in (site(), FULL, site(container="pyxis", image="nvcr.io#nvidia/pytorch:25.09-py3"), site(bind="cores")):
        for more in ({}, {"sweep": 3}, {"spares": 2, "exclude": ("n7", "n9"), "time_s": 93784, "account": "mine"}):
            shellcheck(script.render(job(where, launcher=launcher, preflight=preflight, **more)))


@pytest.mark.parametrize("name", sorted(name for name, path in load.sites().items() if load.site(path).scheduler.kind == "slurm"))
def test_every_shipped_site_has_a_script_that_passes_shellcheck(name, monkeypatch):
    where = load.site(name)
    shellcheck(script.render(job(where, ranks_per_node=where.ranks_per_node or 4)))


def test_what_is_asked_of_slurm():
    found = options(job(FULL, spares=1, exclude=("n7",), time_s=93784, launcher="srun"))
    assert set(found) >= {
        "--nodes=3",
        "--ntasks-per-node=4",
        "--cpus-per-task=16",
        "--partition=a,b",
        "--account=eu-42",
        "--qos=normal",
        '"--constraint=gpu&nvme"',
        "--gres=gpu:h100:4",
        "--exclusive",
        "--switches=1",
        "--segment=2",
        "--exclude=n7",
        "--time=26:03:04",
        "--signal=B:USR1@300",
        "--requeue",
        "--no-kill",  # there is a spare
        "--open-mode=append",
        "--hint=nomultithread",
        "--output=/runs/a/logs/job-%j.out",
    }
    assert not any("export" in option for option in found)  # --export=ALL,K=V takes a comma in a value for the next variable
    assert "--gpus-per-node=4" in options(job(site(device="cuda", gpus="gpus-per-node")))
    assert not any("gpu" in option for option in options(job(site(device="cuda", gpus="none"))))
    assert not any("segment" in option for option in options(job()))
    assert "--no-kill" not in options(job())
    assert "--no-requeue" in options(job(chain=3))
    assert "--no-requeue" in options(job(site(requeue=False)))
    assert "--array=0-2" in options(job(sweep=3))
    assert "--account=mine" in options(job(FULL, account="mine"))


def test_binding_and_containers():
    text = script.render(job(FULL))
    assert "--numa-binding=node" in text  # torchrun binds each rank to its GPU's NUMA node
    assert "inside=(apptainer exec --nv --bind=/runs --bind=/work '/images/torch 2.sif')" in text
    text = script.render(job(FULL, launcher="srun"))
    assert "--cpu-bind=rank_ldom --gpu-bind=none" in text  # every rank sees all GPUs and takes that of its local rank
    text = script.render(job(site(container="pyxis", image="torch")))
    mounts = "'--container-mounts=/runs:/runs,/work:/work' --container-workdir=/work --no-container-entrypoint"
    assert f"contained=(--container-image=torch {mounts})" in text
    where = site(container="pyxis", image="torch", paths={"runs": "/runs", "cache": "/cache"})
    text = script.render(job(where, shards="/cache/data", sources=("/corpus",)))
    assert "--container-mounts=/runs:/runs,/work:/work,/cache:/cache,/cache/data:/cache/data,/corpus:/corpus" in text
    assert "mkdir -p /cache /cache/data\n" in text  # what is not there cannot be mounted
    assert "--cpu-bind=none" in script.render(job())
    assert "--cpu-bind" not in script.render(job(site(options=("--hint=nomultithread",))))  # Slurm would forget the hint


def test_a_module_may_read_what_is_not_set_and_must_be_there(tmp_path):
    head = script.render(job(site(modules=("CUDA/12",)), workdir="/tmp")).partition("# ---- Signals")[0] + '\necho "on $-"\n'
    for body, code in (('[ -z "$NOWHERE_SET" ]', 0), ("false", 3)):
        text = f'module() {{ {body}; }}\nSLURM_JOB_ID=7 SLURM_EXPORT_ENV=NONE\n{head}[ -z "${{SLURM_EXPORT_ENV+x}}" ]'
        ended = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=False, env={"PATH": "/usr/bin:/bin"})
        assert ended.returncode == code, ended.stderr
        assert ("CUDA/12" in ended.stderr) == bool(code)
        assert code or "u" in ended.stdout  # unset names are mistakes again


def asked(body, command, tmp_path):
    """`command` in the script's own functions, with a `squeue` of our own and sleeps that only say how long."""
    text = script.render(job(workdir="/tmp"))
    functions = text[text.index("say() {") : text.index("# ---- Attempts")]
    (tmp_path / "squeue").write_text(f"#!/bin/bash\n{body}\n")
    (tmp_path / "squeue").chmod(0o755)
    text = f"set -u\njob=7 told='' step=''\n{functions}\nsleep() {{ SECONDS=$((SECONDS + $1)); echo slept >&2; }}\n{command}"
    return subprocess.run(
        ["bash", "-c", text], cwd=tmp_path, capture_output=True, text=True, check=False, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}
    )


def test_a_controller_that_does_not_answer_is_asked_again_and_a_refusal_is_not(tmp_path):
    away = "echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2; exit 1"
    back = asked(f"echo x >>tries; [ $(wc -l <tries) -lt 4 ] && {{ {away}; }}; echo RUNNING", "ask 600 squeue -j 7", tmp_path)
    assert (back.returncode, back.stdout, back.stderr.count("slept")) == (0, "RUNNING\n", 3)
    gone = asked(away, "ask 600 squeue -j 7", tmp_path)
    assert (gone.returncode, gone.stdout) == (1, "")
    assert 10 < gone.stderr.count("slept") < 30
    refused = asked("echo 'Invalid job id specified' >&2; exit 1", "ask 600 squeue -j 7", tmp_path)
    assert (refused.returncode, refused.stderr.count("slept")) == (1, 0)


def test_a_node_that_guards_a_job_which_may_not_requeue_gives_it_back(tmp_path):
    """Else the allocation would be held until its limit by a loop that is refused twice a minute."""
    text = script.render(job(spares=1))
    guard = text[text.index("watch() {") : text.index("# ---- Attempts")]
    scontrol = 'if [ "$1" = show ]; then echo n2; else echo requeue >>said; false; fi'
    for name, body in (("squeue", "echo n2"), ("scontrol", scontrol), ("scancel", "echo cancel >>said; kill $PPID")):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    text = f"set -u\n{guard}\nsleep() {{ :; }}\nwatch 7 n1"
    subprocess.run(
        ["bash", "-c", text], cwd=tmp_path, capture_output=True, check=False, timeout=60, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}
    )
    assert (tmp_path / "said").read_text().split() == ["requeue"] * 4 + ["cancel"]


@pytest.mark.parametrize(("told", "code", "counts"), [("", 0, True), ("", 124, False), ("TERM", 143, False)])
def test_silence_counts_only_where_all_had_the_time_to_answer(told, code, counts, tmp_path):
    ended = asked("", f'told={told} code={code}; heard; echo "${{cut[@]}}"', tmp_path)
    assert ended.stdout.strip() == ("" if counts else "--cut-short"), ended.stderr


def test_lists_of_nodes_are_files():
    """36,000 names are more than Linux takes as one argument."""
    for preflight in (True, False):
        text = script.render(job(preflight=preflight))
        assert '--nodelist="$run/$here/held"' in text
        assert '--nodelist="$run/$here/chosen"' in text
        assert '--held "@$run/$here/given" --chosen "@$run/$here/chosen"' in text
    assert '--expect "@$run/$here/held"' in script.render(job())


@pytest.mark.parametrize(
    "made",
    [
        lambda: job(run="/runs/a\nb"),
        lambda: job(run="/runs/a\\b"),
        lambda: job(workdir="/work\r"),
        lambda: job(site(partition="debug\n#SBATCH --uid=0")),
        lambda: job(account="a\x85b"),
        lambda: job(site(options=("--comment=a\nb",))),
        lambda: job(site(options=("rm",))),
        lambda: job(site(modules=("a\nb",))),
        lambda: job(site(environment={"A": "a\nb"})),
        lambda: job(site(environment={"A B": "c"})),
        lambda: job(site(container="pyxis", image="x"), run="/runs/a,/etc:/etc"),
        lambda: job(site(container="apptainer")),
        lambda: job(site(cpus_per_task=True)),
    ],
)
def test_what_no_script_can_hold_is_refused(made):
    with pytest.raises((SiteError, RunError)):
        script.render(made())


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_what_they_are_to_real_bash(name, tmp_path):
    """The head of the script, up to the first command that does something, with every value printed."""
    where = site(environment={"NAMED": name}, modules=(name,), container="apptainer", image=name)
    inside = name.translate(str.maketrans("", "", ",:\\"))  # mounts are lists, and Slurm's output has no backslash: refused
    workdir = tmp_path / "work" / inside
    workdir.mkdir(parents=True)
    made = job(where, run=f"/runs/{inside}", workdir=str(workdir), python=f"/py {name}", exclude=(name,), preflight=False)
    head = script.render(made).partition("# ---- Signals")[0]
    shown = 'printf "%s\\0" "$run" "$python" "$exclude" "$excluded" "$NAMED" "${inside[@]: -1}" "${loaded[@]}" "$PWD"'
    text = 'loaded=(); module() { loaded+=("$2"); }\nSLURM_JOB_ID=7\n' + head + "\n" + shown
    ended = subprocess.run(["bash", "-c", text], cwd=tmp_path, capture_output=True, check=False, env={"PATH": "/usr/bin:/bin"})
    assert ended.returncode == 0, ended.stderr
    said = ended.stdout.decode().split("\0")[:-1]
    assert said == [f"/runs/{inside}", f"/py {name}", name, "/runs/excluded-here.jsonl", name, name, name, str(workdir)]
    assert [path for path in tmp_path.rglob("*") if path not in (workdir, workdir.parent)] == []
    assert not Path("/tmp/PWNED").exists()
    shellcheck(script.render(made), "--exclude=SC2016")  # which warns that the $(...) in a name will not be run
