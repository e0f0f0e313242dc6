"""What `gigatrain launch` refuses before anything is written, what it freezes, and sizes, sweeps and paths."""

import datetime
import json
from pathlib import Path

import pytest

from gigatrain import load
from gigatrain.errors import CheckpointError, PlanError, RecipeError, RunError, SiteError
from gigatrain.launching import job as jobs
from gigatrain.launching import submit
from gigatrain.launching.submit import Request

NOW = datetime.datetime(2026, 11, 26, 12, 0, 0)


@pytest.fixture
def site(tmp_path):
    def written(**scheduler):
        lines = "\n".join(f"{name} = {submit._toml(value)}" for name, value in ({"kind": "slurm"} | scheduler).items())
        path = tmp_path / "here.toml"
        path.write_text(
            f'name = "here"\nsummary = "a test"\ndevice = "cpu"\n[node]\nranks = 2\n[paths]\nruns = "$TEST_SCRATCH/runs"\n[scheduler]\n{lines}\n'
        )
        return str(path)

    return written


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    monkeypatch.setenv("TEST_SCRATCH", str(tmp_path))


def prepared(tiny, where, **more):
    return submit.prepare(Request(**{"recipe": str(tiny), "site": where, "nodes": 2} | more), today=NOW)


def test_a_request_becomes_a_job_and_nothing_is_written(tiny, site, tmp_path):
    made = prepared(tiny, site(), spares=1, time_s=3600)
    assert made.job.run == str(tmp_path / "runs" / "tiny-20261126-120000")
    assert (made.job.nodes, made.job.spares, made.job.ranks_per_node, made.job.ranks) == (2, 1, 2, 4)
    assert made.plans[0].ranks == 4
    assert made.job.workdir == str(Path.cwd())
    assert list(made.files) == ["job.sh"]
    assert not (tmp_path / "runs").exists()
    one = prepared(tiny, site(), nodes=None, gpus=1)  # less than a node
    assert (one.job.nodes, one.job.ranks_per_node) == (1, 1)


def test_what_a_job_reads_is_the_recipe_and_the_site_as_they_were(tiny, site, tmp_path, monkeypatch):
    monkeypatch.setitem(
        submit.BACKENDS, "slurm", submit.Backend(submit.BACKENDS["slurm"].files, lambda made: ["41"], sweeps=True, chains=True)
    )
    made = submit.prepare(Request(str(tiny), site(), ("optim.lr=1e-4",), nodes=2), today=NOW)
    assert submit.launch(made).jobs == ["41"]
    run = Path(made.job.run)
    assert load.recipe(run / "launch" / "recipe.json").optim.lr == 1e-4
    assert load.site(run / "launch" / "site.json").paths.runs == str(tmp_path / "runs")
    assert jobs.load(run) == made.job
    assert [(event["event"], event["job"]) for event in jobs.history(run)] == [("submitted", "41")]
    assert (run / "launch" / "job.sh").stat().st_mode & 0o100
    with pytest.raises(RunError, match="already holds something"):
        submit.prepare(Request(str(tiny), site(), nodes=2, folder=str(run)))
    monkeypatch.setenv("PATH", "/nowhere")  # no Slurm here to ask whether job 41 still runs
    assert prepared(tiny, site(), folder=str(run), resume=True).resumed
    (run / "run.json").write_text(json.dumps({"identity": "another"}))
    with pytest.raises(CheckpointError, match="another plan"):
        prepared(tiny, site(), folder=str(run), resume=True)


def test_a_scheduler_that_refuses_leaves_nothing(tiny, site, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(RunError, match="sbatch is not found"):
        submit.launch(prepared(tiny, site()))
    assert not list((tmp_path / "runs").iterdir())


@pytest.mark.parametrize(
    ("scheduler", "more", "error", "said"),
    [
        ({"kind": "unknown"}, {}, SiteError, "scheduler.kind 'unknown'"),
        ({"kind": "none"}, {}, SiteError, "1 machine.s. are named here"),
        ({}, {"nodes": None}, SiteError, "how large"),
        (
            {"max_time_s": {"value": 3600, "basis": "declared", "source": "x"}},
            {"time_s": 7200},
            SiteError,
            "02:00:00 is longer than here allows, 01:00:00",
        ),
        ({"lead_s": 600}, {"time_s": 600}, PlanError, "scheduler.lead_s is 600 s"),
        ({"image": "$TEST_NOT_SET/x", "container": "apptainer"}, {}, SiteError, "the environment has no TEST_NOT_SET"),
        ({"segment": 2}, {"spares": 1}, SiteError, r"segments of 2 .*--spares 2"),
        ({}, {"resume": True}, RunError, "name it with --run"),
        ({}, {"resume": True, "folder": "/nowhere"}, CheckpointError, "nothing to resume"),
        ({}, {"nodes": 3}, PlanError, "does not divide"),
        ({}, {"sweep": ("optim.lr",)}, RecipeError, "key=v1,v2,v3"),
        ({}, {"sweep": ("optim.lr=1e-3,1e-3",)}, RecipeError, "twice"),
        ({}, {"sweep": ("optim.l=1,2",)}, RecipeError, "did you mean"),
        ({}, {"overrides": ("train.stesp=4",)}, RecipeError, "did you mean"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(tiny, site, tmp_path, scheduler, more, error, said):
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(error, match=said):
        prepared(tiny, site(**scheduler), **more)
    assert {path.name for path in tmp_path.iterdir()} - before <= {"here.toml"}


def test_a_variable_that_is_not_set_is_named(tiny, site, monkeypatch):
    monkeypatch.delenv("TEST_SCRATCH")
    with pytest.raises(SiteError, match="here: paths.runs is '\\$TEST_SCRATCH/runs', and the environment has no TEST_SCRATCH"):
        prepared(tiny, site())


def test_the_longest_that_the_site_gives_is_the_default(tiny, site):
    where = site(max_time_s={"value": 86400, "basis": "declared", "source": "x"})
    assert prepared(tiny, where).job.time_s == 86400
    assert prepared(tiny, where, time_s=7200).job.time_s == 7200


def test_sweeps():
    assert submit.sweep([]) == ((),)
    assert submit.sweep(["a=1,2", "b=x,y"]) == (("a=1", "b=x"), ("a=1", "b=y"), ("a=2", "b=x"), ("a=2", "b=y"))
    assert submit.sweep(["mesh={shard = 2},{replicate = 2}"]) == (('mesh={"shard" = 2}',), ('mesh={"replicate" = 2}',))
    assert submit.sweep(["optim.betas=[0.9, 0.95],[0.9, 0.98]"]) == (("optim.betas=[0.9, 0.95]",), ("optim.betas=[0.9, 0.98]",))


def test_a_sweep_has_a_folder_and_a_plan_a_run(tiny, site, tmp_path):
    made = prepared(tiny, site(), sweep=("optim.lr=1e-3,2e-3",), folder=str(tmp_path / "sweep"))
    assert [str(run) for run in made.runs] == [str(tmp_path / "sweep" / f"tiny-{index}") for index in (0, 1)]
    assert [one.optim.lr for one in made.recipes] == [1e-3, 2e-3]
    assert made.job.sweep == 2


def test_shards_are_in_the_sites_cache_unless_the_recipe_says_where(tiny, site, tmp_path):
    where = Path(site())
    where.write_text(where.read_text().replace("[paths]", '[paths]\ncache = "$TEST_SCRATCH/cache"'))
    assert prepared("quickstart", str(where)).recipes[0].data.folder == str(tmp_path / "cache" / "data")
    assert prepared(tiny, str(where)).recipes[0].data.folder == load.recipe(tiny).data.folder
