"""Fleets made up of verdicts: who is slow, who is silent, who trains, and who is put on the list."""

import json
import random
from typing import Any

import pytest

from gigatrain.errors import RunError
from gigatrain.preflight import judge
from gigatrain.preflight.findings import HUNG, RAISED, Finding
from gigatrain.preflight.verdict import Verdict, read


def write(folder, node, rank=0, burn=700.0, state: Any = "ok", running=None, digest="aa", ranks=1, device="cuda", **more):
    findings = [Finding("burn", state, "said", burn), *more.get("findings", [])]
    facts = {"hardware": "H100", "digest": digest, "device": device}
    made = Verdict(node, findings, running, rank=rank, ranks=ranks, facts=facts, versions={"torch": more.get("torch", "2.13")})
    return made.write(folder)


def judged(folder, nodes, **given):
    return judge.judge(folder, nodes, **given)


@pytest.mark.parametrize("sigma", [0.002, 0.01, 0.02, 0.05])
def test_equal_nodes_are_hardly_ever_called_slow(sigma):
    draw = random.Random(6)
    fleets, nodes = 40, 1000
    alarms = sum(len(judge.slow({str(node): draw.gauss(700, 700 * sigma) for node in range(nodes)})) for _ in range(fleets))
    assert alarms / (fleets * nodes) < 1e-3


@pytest.mark.parametrize(("nodes", "most"), [(3, 50), (16, 2), (1000, 2)])  # the scatter of three is hardly known
def test_a_node_that_is_15_percent_slower_is_found(nodes, most):
    draw = random.Random(6)
    missed = 0
    for _ in range(200):
        figures = {str(node): draw.gauss(700, 7) for node in range(nodes)}
        figures["0"] *= 0.85
        found = judge.slow(figures)
        missed += "0" not in found
        assert not set(found) - {"0"}
    assert missed <= most  # of 200


def test_few_nodes_that_are_about_equal_are_never_slow():
    draw = random.Random(6)
    for _ in range(500):
        for count in (1, 2, 3, 4):
            assert not judge.slow({str(node): 700 * draw.uniform(0.95, 1.05) for node in range(count)})
    assert not judge.slow({"a": 700, "b": 100})  # of two nobody knows
    assert not judge.slow({"a": 0.0, "b": 0.0, "c": 0.0})
    assert list(judge.slow({"a": 5, "b": 5, "c": 9}, "lower")) == ["c"]


def test_healthy_nodes_train_in_the_order_asked_for(tmp_path):
    for rank, node in enumerate(("n3", "n1", "n2", "n0")):
        write(tmp_path, node, rank)
    assert judged(tmp_path, 3).chosen == ["n3", "n1", "n2"]
    assert judged(tmp_path, 2, expect=["n0", "n1", "n2", "n3"]).chosen == ["n0", "n1"]
    found = judged(tmp_path, 2, expect=["n0", "n1", "n2"])
    assert found.notes == ["not asked for, and left out: n3"]
    with pytest.raises(RunError, match="is not a folder of verdicts"):
        judged(tmp_path / "none", 1)


def test_bad_and_silent_nodes_are_left_out_and_listed(tmp_path):
    folder, excluded = tmp_path / "doctor", tmp_path / "runs/excluded-here.jsonl"
    folder.mkdir()
    for rank in range(5):
        write(folder, f"n{rank}", rank, state="bad" if rank == 1 else "ok", running="network" if rank == 2 else None)
    (folder / "n3.json").write_text('{"node": "n3", "findings"')
    found = judged(folder, 2, expect=[f"n{rank}" for rank in range(6)], excluded=excluded, run="/runs/x")
    assert found.chosen == ["n0", "n4"]
    assert found.short is None
    lines = [json.loads(line) for line in excluded.read_text().splitlines()]
    # Only what lasts is listed; the silent ones are left out of this attempt.
    assert [(line["node"], line["run"], line["reason"]) for line in lines] == [("n1", "/runs/x", "burn: said")]
    reasons = " ".join(reason for row in found.rows for reason in row.reasons)
    assert "it stopped in network" in reasons
    assert "cannot be read: JSONDecodeError" in reasons
    assert "it said nothing" in reasons
    again = judged(folder, 3, expect=[f"n{rank}" for rank in range(6)], excluded=excluded)
    assert again.short is not None
    assert again.short.startswith("2 of 6 nodes can train and 3 are wanted; 4 are bad")
    assert len(excluded.read_text().splitlines()) == 2


def test_silence_puts_a_node_on_the_list_only_where_the_scheduler_calls_it_down_too(tmp_path):
    folder, excluded = tmp_path / "doctor", tmp_path / "excluded.jsonl"
    folder.mkdir()
    for rank in range(4):
        write(folder, f"n{rank}", rank, state="bad" if rank == 1 else "ok")
    found = judged(folder, 3, expect=[f"n{rank}" for rank in range(6)], excluded=excluded, down=["n5", "n9"])
    assert found.chosen == ["n0", "n2", "n3"]
    assert [json.loads(line)["node"] for line in excluded.read_text().splitlines()] == ["n1", "n5"]


def test_tasks_without_a_verdict_are_missed_even_where_nobody_named_them(tmp_path):
    folder, excluded = tmp_path / "doctor", tmp_path / "excluded.jsonl"
    folder.mkdir()
    for rank in (0, 1, 3):
        write(folder, f"n{rank}", rank, ranks=4, findings=[Finding("rendezvous", "ok", "3 of 4 nodes met")])
    found = judged(folder, 3, excluded=excluded)
    assert found.chosen == ["n0", "n1", "n3"]
    assert [(row.node, row.health, row.excluded) for row in found.rows[3:]] == [("rank 2", "bad", False)]
    assert not excluded.exists()


def test_suspects_train_only_where_nothing_else_is_left(tmp_path):
    for rank in range(6):
        write(tmp_path, f"n{rank}", rank, burn=560.0 if rank == 0 else 700.0)
    found = judged(tmp_path, 5)
    assert found.chosen == [f"n{rank}" for rank in range(1, 6)]
    assert found.rows[0].reasons == ["slow burn: burn is 80% of the median of 6 nodes (560, median 700)"]
    every = judged(tmp_path, 6)
    assert every.chosen == [f"n{rank}" for rank in range(6)]
    assert every.notes == ["no healthy node was left: n0 trains though suspect"]


def test_a_node_whose_product_differs_from_all_others_is_bad(tmp_path):
    for rank in range(4):
        write(tmp_path, f"n{rank}", rank, digest="bb" if rank == 2 else "aa")
    found = judged(tmp_path, 3)
    assert found.chosen == ["n0", "n1", "n3"]
    assert "agree on aa" in found.rows[2].reasons[0]
    write(tmp_path, "n2", 2, digest="bb", torch="2.14")  # another build may round otherwise
    assert judged(tmp_path, 4).chosen == ["n0", "n1", "n2", "n3"]


@pytest.mark.parametrize("fault", ["run write", "pcie"])  # one that passes, and one that lasts
def test_a_fault_that_most_share_excludes_nobody(tmp_path, fault):
    folder, excluded = tmp_path / "doctor", tmp_path / "excluded.jsonl"
    folder.mkdir()
    shared = [Finding(fault, "bad", "said by most")]
    for rank in range(4):
        write(folder, f"n{rank}", rank, findings=shared if rank < 3 else [], state="bad" if rank == 0 else "ok")
    found = judged(folder, 2, excluded=excluded)
    assert found.chosen == ["n3"]
    assert "no node's own fault" in found.notes[0]
    [line] = excluded.read_text().splitlines()  # only what is n0's own
    assert json.loads(line)["reason"] == "burn: said"


def test_where_the_meetings_host_is_silent_the_others_are_not_blamed(tmp_path):
    lost = [Finding("rendezvous", "bad", "rank 0's store was not reached")]
    for rank in (1, 2):
        write(tmp_path, f"n{rank}", rank, ranks=3, findings=lost)
    found = judged(tmp_path, 2, expect=["n0", "n1", "n2"])
    assert found.chosen == ["n1", "n2"]
    assert found.rows[0].health == "bad"
    assert "the network between the nodes was not tested" in found.notes[0]
    write(tmp_path, "n0", 0, ranks=3, findings=[Finding("rendezvous", "ok", "2 of 3 nodes met")])
    assert judged(tmp_path, 1, expect=["n0", "n1", "n2"]).chosen == ["n0"]


def test_what_no_node_could_test_is_said_once(tmp_path):
    for rank in range(3):
        found = [Finding("ecc", "untested", "no GPU"), Finding("pcie", "untested" if rank else "ok", "no GPU")]
        write(tmp_path, f"n{rank}", rank, findings=found)
    assert judged(tmp_path, 3).notes == ["not tested on any node: ecc"]


@pytest.mark.parametrize(
    ("fault", "listed"),
    [
        (Finding("ecc", "bad", "2 uncorrected errors"), True),
        (Finding("scratch write", "bad", "no space left (ENOSPC)"), True),
        (Finding("run write", "bad", "no space left (ENOSPC)"), False),
        (Finding("rendezvous", "bad", "this node came too late"), False),
        (Finding("clock", "bad", "6 s behind"), False),
        (Finding("burn", "bad", "gave no answer in 23 s", way_out=HUNG), False),
        (Finding("ecc", "bad", "OSError: of no use", way_out=RAISED), False),
    ],
    ids=lambda value: value.name if isinstance(value, Finding) else "",
)
def test_only_what_lasts_puts_a_node_on_the_list(tmp_path, fault, listed):
    folder, excluded = tmp_path / "doctor", tmp_path / "excluded.jsonl"
    folder.mkdir()
    for rank in range(3):
        write(folder, f"n{rank}", rank, findings=[] if rank else [fault])
    found = judged(folder, 2, excluded=excluded)
    assert found.chosen == ["n1", "n2"]
    assert (found.rows[0].excluded, excluded.exists()) == (listed, listed)


def test_a_warning_that_most_share_puts_none_behind(tmp_path):
    limits = Finding("limits", "warn", "open files: 1024")
    for rank in range(6):
        write(tmp_path, f"n{rank}", rank, burn=560.0 if rank == 0 else 700.0, findings=[limits])
    found = judged(tmp_path, 5)
    assert found.chosen == [f"n{rank}" for rank in range(1, 6)]  # the slow one is still left out
    assert found.notes == ["warnings of more than half of the nodes, which put none behind another: limits"]


def test_work_that_only_this_node_did_not_do_makes_it_suspect(tmp_path):
    for rank in range(4):
        write(tmp_path, f"n{rank}", rank, findings=[Finding("kernel", "ok" if rank else "untested", "said")])
    found = judged(tmp_path, 3)
    assert found.chosen == ["n1", "n2", "n3"]
    assert found.rows[0].reasons == ["work: kernel: tested on other nodes, not on this one"]


def test_a_slow_all_reduce_is_a_note_and_no_nodes_fault(tmp_path):
    for rank in range(4):
        write(tmp_path, f"n{rank}", rank, findings=[Finding("all-reduce", "ok", "90.00 GB/s over 4 nodes", 90.0, 400.0)])
    found = judged(tmp_path, 4)
    assert found.chosen == ["n0", "n1", "n2", "n3"]
    assert found.notes == ["all-reduce: 90.00 GB/s over 4 nodes; the slowest node and the longest way set it"]


def test_pairs_that_are_farther_apart_are_not_slow(tmp_path):
    for rank in range(8):
        write(tmp_path, f"n{rank}", rank, findings=[Finding("latency", "ok", "said", 36.0 if rank == 0 else 20.0 + rank / 10)])
    assert {row.health for row in judged(tmp_path, 8).rows} == {"healthy"}


def test_a_verdict_comes_back_as_it_was_written(tmp_path):
    made = Verdict(
        "n0", [Finding("a", "warn", "said", 1.5, "x", "do")], "network", rank=2, ranks=4, facts={"digest": "aa"}, versions={"torch": "2"}
    )
    path = made.write(tmp_path)
    assert read(path) == made
    assert json.loads(path.read_text())["health"] == "suspect"
    assert [file.name for file in tmp_path.iterdir()] == ["n0.json"]
