"""The doctor from end to end: this machine, a job of two tasks, a machine whose disk is full, and one that dies on the way."""

import json
import os
import subprocess
import sys
import time

import pytest

from gigatrain import cli, load
from gigatrain.errors import RunError
from gigatrain.preflight import burn, examine, findings, network
from gigatrain.preflight.verdict import Verdict

TASK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in (*TASK, "SLURM_JOB_ID", "SLURM_STEP_ID", "GIGATRAIN_ATTEMPT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURMD_NODENAME", "here")


def doctor(*arguments, **environment):
    command = [sys.executable, "-m", "gigatrain", "doctor", *map(str, arguments)]
    return subprocess.Popen(command, env=os.environ | environment, stdout=-1, stderr=-1, text=True)


def test_this_machine_is_examined_and_told_on_one_screen(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    cli.main(["doctor", "--quick", "--site", "laptop", "--run", str(tmp_path), "--free-gib", "0.01"])
    out = capsys.readouterr().out
    assert "here is healthy" in out or "here is suspect" in out
    assert "no NVIDIA GPU" in out
    assert "untested" in out
    assert len(out.splitlines()) < 50
    cli.main(["doctor", "--quick", "--site", "laptop", "--run", str(tmp_path), "--free-gib", "0.01", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["health"] in ("healthy", "suspect")
    assert found["running"] is None
    assert {"name", "state", "said", "value", "limit", "way_out"} == set(found["findings"][0])
    assert found["facts"]["digest"]


def test_a_bad_machine_leaves_with_9_and_says_why(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor", "--quick", "--site", "laptop", "--run", str(tmp_path), "--free-gib", "1e8"])
    assert ended.value.code == 9
    out = capsys.readouterr().out
    assert "here is bad" in out
    assert "--free-gib" in out
    out_folder = tmp_path / "doctor"  # in a job the file is the answer
    cli.main(["doctor", "--quick", "--site", "laptop", "--out", str(out_folder), "--free-gib", "1e8"])
    assert json.loads((out_folder / "here.json").read_text())["health"] == "bad"


def test_two_tasks_of_a_job_find_each_other_and_are_judged(tmp_path, capsys):
    out = tmp_path / "doctor"
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"}
    given = ("--quick", "--site", "laptop", "--out", out, "--free-gib", "0.01")
    tasks = [doctor(*given, **step, SLURM_PROCID=str(rank), SLURMD_NODENAME=f"n{rank}") for rank in range(2)]
    for task in tasks:
        said, failed = task.communicate(timeout=100)
        assert task.returncode == 0, said + failed
    for rank in range(2):
        found = json.loads((out / f"n{rank}.json").read_text())
        names = {one["name"]: one["state"] for one in found["findings"]}
        assert {names[name] for name in ("rendezvous", "clock", "versions equal", "visible", "links", "all-reduce")} == {"ok"}, found[
            "reasons"
        ]
        assert (found["rank"], found["ranks"], found["running"]) == (rank, 2, None)
        assert list(found["facts"]["links"]) == [f"n{1 - rank}"]
    assert sorted(path.name for path in out.iterdir()) == ["n0.json", "n1.json"]
    cli.main(["doctor", "--judge", str(out), "--nodes", "2", "--expect", "n1,n0,n2", "--excluded", str(tmp_path / "bad.jsonl")])
    printed = capsys.readouterr()
    assert printed.out == "n1,n0\n"
    assert "n2" in printed.err
    assert not (tmp_path / "bad.jsonl").exists()  # silence costs this attempt, not 14 days
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor", "--judge", str(out), "--nodes", "3", "--expect", "n0,n1,n2"])
    assert ended.value.code == 9
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "2 of 3 nodes can train and 3 are wanted" in printed.err


def test_a_doctor_that_is_killed_has_said_where_it_was(tmp_path):
    task = doctor("--site", "laptop", "--out", tmp_path / "doctor")
    path = tmp_path / "doctor/here.json"
    end = time.monotonic() + 60
    while not (path.exists() and json.loads(path.read_text())["running"] == "work"):  # three seconds of burn and more
        assert time.monotonic() < end
        time.sleep(0.02)
    task.kill()
    task.communicate()
    found = json.loads(path.read_text())
    assert found["running"] == "work"
    assert {one["name"] for one in found["findings"]} >= {"versions", "gpus", "run write"}


def test_a_job_keeps_its_local_verdict_while_the_network_hangs(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    seen = {}

    def meet(self):
        seen.update(json.loads((tmp_path / "here.json").read_text()))
        raise RuntimeError("it hangs")

    monkeypatch.setattr(network.Network, "meet", meet)
    found = examine.examine(load.site("laptop"), tmp_path, quick=True, free_gib=0.01)
    assert seen["running"] == "network"
    assert {"burn", "run write"} <= {one["name"] for one in seen["findings"]}
    assert [one.state for one in found.findings if one.name == "rendezvous"] == ["bad"]


def test_the_verdict_is_there_before_anything_of_the_machine_is_read(tmp_path, monkeypatch):
    """A hanging file system under the package or /sys must leave a verdict that says so."""
    seen = {}

    def versions(root):
        seen.update(json.loads((tmp_path / "here.json").read_text()))
        raise RuntimeError("it hangs")

    monkeypatch.setattr(examine.host, "versions", versions)
    with pytest.raises(RuntimeError, match="it hangs"):
        examine.examine(load.site("laptop"), tmp_path, quick=True)
    assert seen["running"] == "start"


def test_a_node_whose_gpu_hangs_stays_away_from_the_links():
    hung = Verdict("n0", [findings.Finding("burn", "warn", "gave no answer in 8 s")], facts={"hung": ["burn"]})
    assert not examine._fit(hung)
    assert examine._fit(Verdict("n0", [findings.Finding("burn", "warn", "slow")], facts={"hung": []}))
    assert examine._fit(Verdict("n0", facts={"hung": ["run write"]}))


def test_the_whole_and_its_last_words_end_within_a_minute():
    assert examine.LIMIT_S + 5 < 60
    on_gpus = network.Network(0, 2, "n0", {}, None, links=8)
    assert on_gpus.transfer_s * 2 < examine.NETWORK_CUDA_S < examine.LIMIT_S - 20


def test_a_full_disk_under_the_verdict_itself_is_told(tmp_path, capsys):
    full = tmp_path / "full"
    full.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "doctor", str(full)], capture_output=True, check=False).returncode:
        pytest.skip("mounting takes root")
    try:
        (full / "ballast").write_bytes(bytes(64 << 10))
        cli.main(["doctor", "--quick", "--site", "laptop", "--out", str(full), "--free-gib", "0"])
        out = capsys.readouterr().out
        assert "here is bad" in out
        assert f"verdict: it cannot be written to {full}: No space left on device" in out
        assert "run write" in out
    finally:
        subprocess.run(["umount", str(full)], check=True)


def test_who_this_task_is(monkeypatch):
    assert examine.task() == examine.Task(0, 1)
    monkeypatch.setenv("SLURM_PROCID", "0")  # a batch script
    assert examine.task() == examine.Task(0, 1)
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    assert examine.task() == examine.Task(3, 8)
    monkeypatch.setenv("SLURM_LOCALID", "1")
    with pytest.raises(RunError, match="one task a node"):
        examine.task()
    monkeypatch.setenv("RANK", "8")
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(RunError, match="makes no sense"):
        examine.task()


def test_an_unset_variable_of_the_sites_paths_is_named(monkeypatch):
    monkeypatch.delenv("NO_SUCH_RUNS", raising=False)
    site = load.site("laptop")
    site = site.model_copy(update={"paths": site.paths.model_copy(update={"runs": "$NO_SUCH_RUNS/runs"})})
    [check] = examine._storage(site, None, None)
    found = check.run()
    assert isinstance(found, findings.Finding)
    assert (found.state, found.value) == ("bad", "NO_SUCH_RUNS")


def test_what_a_sites_gpu_reaches_is_the_tables():
    assert examine.usual(load.site("dgx-h100")) == burn.Usual(794.5, 3350.0, 450.0)
    assert examine.usual(load.site("laptop")) == burn.Usual()
