"""A budget is compared with what a site's figures say a run draws: refused beyond it, and said where it cannot be compared."""

import json

import pytest

from gigatrain import load
from gigatrain.cli import main
from gigatrain.config import Power as Wanted
from gigatrain.errors import PlanError
from gigatrain.launching import submit
from gigatrain.launching.size import by_budget
from gigatrain.planning.budget import Draw, draw
from gigatrain.planning.plan import Plan, plan
from gigatrain.site import Figure, Node, Power, Site


def said(value):
    return Figure(value=value, basis="declared", source="a test")


SITE = Site(name="made", summary="", device="cuda", nodes=said(100), node=Node(accelerators=said(8)), power=Power(facility_watts=said(1e6)))


def test_a_run_within_its_budget_says_so_and_one_beyond_is_refused_with_what_fits():
    found = draw(Wanted(megawatts=0.05), SITE, 40)
    assert (found.expected_watts, found.budget_watts) == (50_000.0, 50_000.0)
    assert found.text() == "50.0 kW expected at the facility, of 50.0 kW allowed (power.megawatts of the recipe)"
    said = "6 nodes of made draw 60.0 kW at the facility, 10.0 kW each, and power.megawatts of the recipe allows 55.0 kW: 5 nodes fit; --nodes 5"
    with pytest.raises(PlanError, match=said):
        draw(Wanted(megawatts=0.055), SITE, 48)
    with pytest.raises(PlanError, match="a node of made draws 10.0 kW at the facility, and .* not even one node fits; or raise it"):
        draw(Wanted(megawatts=0.009), SITE, 1)


def test_the_sites_own_limit_holds_too_and_the_lower_of_both_is_named():
    site = SITE.model_copy(update={"power": Power(facility_watts=said(1e6), cap_watts=said(30_000.0))})
    for power in (Wanted(), Wanted(megawatts=0.05)):
        with pytest.raises(PlanError, match=r"power.cap_watts of made allows 30.0 kW: 3 nodes fit"):
            draw(power, site, 32)
    with pytest.raises(PlanError, match=r"power.megawatts of the recipe allows 20.0 kW"):
        draw(Wanted(megawatts=0.02), site, 32)


def test_what_cannot_be_compared_is_said_and_without_a_budget_nothing_is():
    blind = SITE.model_copy(update={"power": Power()})
    found = draw(Wanted(megawatts=0.05), blind, 32)
    assert found.text().startswith("50.0 kW of power.megawatts of the recipe cannot be checked: power.facility_watts, power.it_watts and")
    assert draw(Wanted(), blind, 32) == Draw()
    assert draw(Wanted(), SITE, 32).text() == "40.0 kW expected at the facility"
    alone = SITE.model_copy(update={"node": Node()})
    assert "how many ranks a node has is unknown" in draw(Wanted(megawatts=0.05), alone, 32).text()


def test_a_plan_holds_what_it_expects_and_a_resume_may_change_it():
    site = load.site("laptop")
    one, other = (plan(load.recipe("quickstart", [f"power.megawatts={megawatts}"]), site) for megawatts in (0.01, 0.02))
    assert "10.0 kW of power.megawatts of the recipe cannot be checked" in one.draw.text()
    assert (one.identity == other.identity, one.sha256 == other.sha256) == (True, False)
    assert load.read_json(Plan, one.text(), "x", PlanError) == one


def test_a_budget_sizes_a_job_that_nobody_sizes_by_what_it_feeds_and_the_batch_divides_by():
    recipe = load.recipe("quickstart", ["power.megawatts=0.075", "train.batch=64"])
    assert by_budget(SITE, recipe) == 4  # seven nodes are fed, 56 ranks do not share 64 samples
    assert by_budget(SITE, load.recipe("quickstart", ["power.megawatts=0.075", "train.batch=56"])) == 7
    assert by_budget(SITE, load.recipe("quickstart", ["power.megawatts=9", "train.batch=6400"])) == 100, "no more than there are"
    assert by_budget(SITE, load.recipe("quickstart", ["power.megawatts=0.075", "train.batch=64", "mesh.tensor=8"])) == 4
    assert by_budget(SITE, load.recipe("quickstart", ["power.megawatts=0.075", "train.batch=64", "train.nproc=8"])) is None
    assert by_budget(SITE, load.recipe("quickstart", ["train.batch=64"])) is None
    assert by_budget(SITE.model_copy(update={"power": Power()}), recipe) is None


def test_commands_size_and_refuse_by_a_recipes_budget(tmp_path, capsys, monkeypatch):
    budget = ["--site", "jupiter", "--set", "power.megawatts=0.01", "--set", "train.batch=16"]
    main(["plan", "quickstart", *budget])
    printed = capsys.readouterr().out
    assert "size     2 nodes x 4 ranks" in printed
    assert "power    5,908 W expected at the facility, of 10.0 kW allowed (power.megawatts of the recipe)" in printed
    main(["plan", "quickstart", *budget, "--json"])
    assert json.loads(capsys.readouterr().out)["draw"]["budget_watts"] == 10_000.0
    with pytest.raises(SystemExit, match="4"):
        main(["plan", "quickstart", *budget, "--nodes", "4"])
    assert "4 nodes of jupiter draw 11.8 kW at the facility, 2,954 W each" in capsys.readouterr().err
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    monkeypatch.setenv("PROJECT", str(tmp_path))
    request = submit.Request(
        "quickstart", "jupiter", ("power.megawatts=0.01", "train.batch=16"), account="a", time_s=3600, folder=str(tmp_path / "run")
    )
    prepared = submit.prepare(request)
    assert prepared.job.nodes == 2
    assert any("5,908 W expected at the facility, of 10.0 kW" in line for line in submit.summary(prepared))


@pytest.mark.parametrize("command", [["train"], ["plan"], ["launch", "--site", "slurm-cpu", "--nodes", "1", "--dry-run"]])
def test_a_schedule_that_cannot_be_read_is_refused_before_anything_else(command, tmp_path, capsys, monkeypatch):
    (tmp_path / "prices.csv").write_text("time,price\n")
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    name, *rest = command
    run = [] if name == "plan" else ["--run", str(tmp_path / "run")]
    with pytest.raises(SystemExit, match="10"):
        main([name, "quickstart", *rest, *run, "--set", f"power.schedule={tmp_path / 'prices.csv'}"])
    assert "prices.csv, line 1: 'price' is no column of a schedule" in capsys.readouterr().err
