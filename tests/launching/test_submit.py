"""What `gigatrain launch` refuses before anything is written, what it freezes, and sizes, sweeps and paths."""

import datetime
import json
import shlex
from pathlib import Path

import pytest

from gigatrain import cli, load
from gigatrain.errors import CheckpointError, PlanError, RecipeError, RunError, SiteError
from gigatrain.launching import job as jobs
from gigatrain.launching import restart, submit
from gigatrain.launching.submit import Request
from gigatrain.planning.plan import plan

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


def test_a_job_that_is_sized_by_megawatts_keeps_to_them(tiny, tmp_path):
    where = tmp_path / "here.toml"
    said = '{ value = 500, basis = "declared", source = "a test" }'
    where.write_text(
        f'name = "here"\nsummary = "a test"\ndevice = "cpu"\n[node]\nranks = 2\n[paths]\nruns = "$TEST_SCRATCH/runs"\n[scheduler]\nkind = "slurm"\n'
        f"[power]\nnode_watts = {said}\npue = {said.replace('500', '1.1')}\n"
    )

    def made(*overrides, **more):
        return prepared(tiny, str(where), nodes=None, overrides=overrides, **more)

    sized = made(megawatts=0.0011)
    assert (sized.job.nodes, sized.recipes[0].power.megawatts, sized.plans[0].power.megawatts) == (2, 0.0011, 0.0011)
    lines = submit.summary(sized)
    assert "  power    1,100 W expected at the facility, of 1,100 W allowed (power.megawatts of the recipe)" in lines
    assert "  power    --megawatts 0.0011 is also power.megawatts of the run, which keeps to it" in lines
    own = made("power.megawatts=0.0011", megawatts=0.0012)
    assert own.recipes[0].power.megawatts == 0.0011
    assert not own.notes
    assert made("power.megawatts=9", megawatts=0.0012).recipes[0].power.megawatts == 0.0012
    with pytest.raises(PlanError, match=r"power\.measure is false: leave that out, or give --nodes"):
        made("power.measure=false", megawatts=0.0012)


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


def test_a_run_goes_on_at_another_site_and_with_other_numbers_only_where_told(tiny, site, tmp_path, monkeypatch):
    """Begun on this machine, alone, on a CPU; launched on a cluster of GPUs, on many ranks: what differs is how it is computed."""
    monkeypatch.setenv("PATH", "/nowhere")
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    before = plan(load.recipe(tiny, ("train.batch=64",)), load.site("laptop"))
    (run / "plan.json").write_text(before.text())
    (run / "run.json").write_text(json.dumps({"identity": before.identity}))
    cluster = Path(site())
    cluster.write_text(cluster.read_text().replace('device = "cpu"', 'device = "cuda"'))

    def launched(*overrides, **more):
        return submit.prepare(
            Request(str(tiny), str(cluster), ("train.batch=64", *overrides), folder=str(run), resume=True, nodes=2, **more), today=NOW
        )

    now = launched().plans[0]
    assert (now.device, now.meaning == before.meaning, now.identity == before.identity) == ("cuda", True, False)
    with pytest.raises(CheckpointError, match=r"optim.moments: fp32 -> bf16\n.*add --other-numbers"):
        launched("optim.moments=bf16")
    assert launched("optim.moments=bf16", other_numbers=True).resumed
    with pytest.raises(CheckpointError, match=r"another plan; 1 value.*\n *optim.lr: 0.003 -> 0.0001"):
        launched("optim.lr=1e-4", other_numbers=True)


def test_a_summary_says_what_is_billed(tiny, site, monkeypatch):
    def billed(**more):
        return [line for line in submit.summary(prepared(tiny, site(), **more)) if line.startswith("  account")]

    monkeypatch.delenv("SBATCH_ACCOUNT", raising=False)
    assert "none is named" in billed()[0]
    assert billed(account="mine") == []
    monkeypatch.setenv("SBATCH_ACCOUNT", "ours")
    assert billed() == ["  account  ours, of SBATCH_ACCOUNT"]


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


def test_a_container_sees_all_that_the_recipe_reads(tiny, site, tmp_path):
    names = ("weights", "words", "templates", "held", "plans")
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / "templates" / "mine.jinja").write_text("{{ messages }}")
    (tmp_path / "plans" / "prices.csv").write_text("time,megawatts\n")
    (tmp_path / "held" / "some.txt").write_text("text")
    recipe = load.recipe(
        tiny,
        [
            f"model.from={tmp_path}/weights", f"tokenizer={{from=\"{tmp_path}/words\",template=\"{tmp_path}/templates/mine.jinja\"}}",
            f'validation.sets=[{{name="held",kind="text",path="{tmp_path}/held/*.txt"}}]', f"power.schedule={tmp_path}/plans/prices.csv",
        ],
    )  # fmt: skip
    seen = submit._sources([recipe, load.recipe(tiny, ['tokenizer={from="maker/model-7b",template="chatml"}'])])
    assert set(seen) == {str(tmp_path / name) for name in names} | {str(Path(source.path or "")) for source in recipe.data.sources}


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Commands of Slurm as scripts of the test's own, each of which writes down what it was asked."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def written(**scripts):
        for name, text in scripts.items():
            (folder / name).write_text(
                f'#!/bin/bash\necho "{name} $*" >>{folder}/asked\nasked=$(grep -c "^{name} " {folder}/asked)\n{text}\n'
            )
            (folder / name).chmod(0o755)
        return lambda: (folder / "asked").read_text().splitlines()

    return written


REFUSES_THE_SECOND = 'if [ "$asked" = 2 ]; then echo "sbatch: error: QOSMaxSubmitJobPerUserLimit" >&2; exit 1; fi; echo 4$asked'


def test_half_a_chain_is_taken_back_and_what_was_made_is_written_down(tiny, site, tmp_path, commands):
    asked = commands(sbatch=REFUSES_THE_SECOND, scancel="")
    run = tmp_path / "runs" / "chain"
    with pytest.raises(RunError, match=r"job 2 of 3: sbatch refused .*QOSMax.*; 41 before it was cancelled"):
        submit.launch(prepared(tiny, site(), chain=3, folder=str(run)))
    assert asked()[-1] == "scancel 41"
    assert [(event["event"], event.get("job")) for event in jobs.history(run)] == [("submitted", "41"), ("cancelled", None)]


def test_a_job_that_cannot_be_taken_back_is_named_and_kept(tiny, site, tmp_path, commands):
    commands(
        sbatch=REFUSES_THE_SECOND,
        scancel="exit 1",
        squeue="printf '41\\037SUSPENDED\\037u\\037p\\0372\\0371:00\\0371:00\\037N/A\\037n1\\037x\\037None\\n'",
    )
    run = tmp_path / "runs" / "chain"
    with pytest.raises(RunError, match=r"41 could not be cancelled and will run: gigatrain cancel"):
        submit.launch(prepared(tiny, site(), chain=2, folder=str(run)))
    assert [(event["event"], event.get("job")) for event in jobs.history(run)] == [("submitted", "41")]
    with pytest.raises(RunError, match="job 41 of this run is SUSPENDED"):  # which holds its nodes, and comes back
        prepared(tiny, site(), resume=True, folder=str(run))


@pytest.mark.parametrize(
    "sbatch", ["sleep 20", 'echo "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation" >&2; exit 1']
)
def test_an_answer_that_never_came_may_have_been_yes(tiny, site, tmp_path, commands, monkeypatch, sbatch):
    commands(sbatch=sbatch.replace("sleep", "exec sleep"))
    monkeypatch.setattr(submit.slurm.run, "__kwdefaults__", {"limit_s": 0.5, "environment": None})
    run = tmp_path / "runs" / "slow"
    with pytest.raises(RunError, match="It may have taken the job all the same"):
        submit.launch(prepared(tiny, site(), folder=str(run)))
    assert [event["event"] for event in jobs.history(run)] == ["unanswered"]
    assert (run / "launch" / "job.sh").is_file()


@pytest.mark.parametrize("text", ["{", "[]", "{}", '"x"'])
def test_a_record_that_is_not_one_is_a_users_error(tiny, site, tmp_path, text):
    run = tmp_path / "runs" / "bad"
    run.mkdir(parents=True)
    (run / "run.json").write_text(text)
    with pytest.raises(CheckpointError, match="run.json is not what a run writes"):
        prepared(tiny, site(), resume=True, folder=str(run))


def test_a_folder_that_is_named_needs_no_variable_and_an_account_stands_for_slurms(tiny, site, tmp_path, monkeypatch):
    monkeypatch.delenv("SBATCH_ACCOUNT", raising=False)
    where = Path(site())
    where.write_text(where.read_text().replace("$TEST_SCRATCH/runs", "/scratch/$SBATCH_ACCOUNT/runs"))
    run = str(tmp_path / "mine")
    assert prepared(tiny, str(where), folder=run).job.run == run
    assert prepared(tiny, str(where), account="p1").job.run == "/scratch/p1/runs/tiny-20261126-120000"
    with pytest.raises(SiteError, match="export SBATCH_ACCOUNT=..., give --account, or name the folder with --run"):
        prepared(tiny, str(where))
    where.write_text(where.read_text().replace("[paths]", '[paths]\ncache = "$TEST_NONE/cache"'))
    with pytest.raises(SiteError, match=r"paths.cache .*export TEST_NONE=..., or set it in a site file of your own"):
        prepared(tiny, str(where), folder=run)


def test_a_dry_run_shows_what_a_job_would_be(tiny, site, tmp_path, capsys):
    """Its size and what is left out to people, the script or the commands of the hosts to programs."""
    where = Path(site(options=["--hint=nomultithread"]))
    where.write_text(where.read_text().replace("[node]", 'nodes = { value = 3, basis = "assumed", source = "x" }\n[node]'))
    restart.exclude(tmp_path / "excluded-here.jsonl", "bad1", "test", tmp_path)
    arguments = ["launch", str(tiny), "--site", str(where), "--run", str(tmp_path / "mine"), "--dry-run"]
    cli.main([*arguments, "--nodes", "2", "--spares", "1"])
    said = capsys.readouterr()
    assert said.out.startswith("#!/bin/bash")
    assert "tiny on here, 2 x 2 ranks and 1 spare" in said.err
    assert f"excludes 1 node ({tmp_path}/excluded-here.jsonl)" in said.err
    assert "here has 3 nodes, and 3 are asked for: they can never be had" in said.err
    (tmp_path / "hosts").write_text("n1\nn2\n")
    cli.main([*arguments, "--hosts", str(tmp_path / "hosts"), "--gpus", "4"])
    said = capsys.readouterr()
    lines = [line for line in said.out.splitlines() if not line.startswith("#")]
    assert [shlex.split(line)[:2] for line in lines] == [["ssh", "-T"]] * 4  # the doctor and the ranks, on each
    assert "--hint" not in said.out  # sbatch's, which ssh would take for its own
    assert "tiny on here, 2 x 2 ranks" in said.err
    cli.main(["launch", "quickstart", "--site", "laptop", "--dry-run"])
    assert "gigatrain.launching.agent" in capsys.readouterr().out


def test_data_built_ahead_is_what_a_job_reads(tiny, site, tmp_path, capsys):
    """`data build --site` and `launch --site` look in the same place, and launch says so where nothing is there yet."""
    recipe = tmp_path / "mine.toml"
    kept = [line for line in tiny.read_text().splitlines() if not line.startswith("folder")]
    recipe.write_text("\n".join(kept))
    where = Path(site())
    where.write_text(where.read_text().replace("[paths]", '[paths]\ncache = "$TEST_SCRATCH/cache"'))
    arguments = ["launch", str(recipe), "--site", str(where), "--nodes", "2", "--dry-run"]
    cli.main(arguments)
    assert f"data     no corpus in {tmp_path}/cache/data/" in capsys.readouterr().err
    cli.main(["data", "build", str(recipe), "--site", str(where), "--json"])
    cli.main(arguments)
    assert "no corpus" not in capsys.readouterr().err


def test_a_save_that_surely_takes_longer_than_a_job_has_is_said(tiny, site):
    where = Path(site(lead_s=61))
    text = where.read_text()
    for speed, said in (("0.000001", True), ("1", False)):
        where.write_text(text + f'[storage]\nwrite_gbyte_s = {{ value = {speed}, basis = "assumed", source = "x" }}\n')
        assert any("a job has 1 s for it" in line for line in submit.summary(prepared(tiny, str(where)))) == said
    where.write_text(text)
    assert not any("storage.write_gbyte_s" in line for line in submit.summary(prepared(tiny, str(where))))


def test_an_excluded_node_that_the_cluster_does_not_have_is_told_from_the_list(tiny, site, commands):
    commands(sbatch='echo "sbatch: error: Batch job submission failed: Invalid node name specified" >&2; exit 1')
    with pytest.raises(
        RunError, match="Invalid node name specified; an excluded node is not of this cluster: take its line out of excluded-SITE.jsonl"
    ):
        submit.launch(prepared(tiny, site()))
