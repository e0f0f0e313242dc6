"""Steps in nodes' own folders: whole runs of several ranks as several nodes, killed, robbed of nodes and copies, resumed, and compared bitwise."""

import contextlib
import io
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
from distributed import together
from rich.console import Console

from gigatrain import load, loop, run
from gigatrain.checkpoint.near import destinations, sources
from gigatrain.observe.display import Display
from gigatrain.planning.plan import plan

SETS = ("train.batch=8", "report.every=2", "validation.every=0", "checkpoint.every=6", "checkpoint.near_every=1", "export=false")


def _train(rank, recipe, folder, node, sets, start, dies):
    """One rank of a run; `dies`: after which step the process is gone, and by which rank, None: all. Returns what was said and the summary."""
    os.environ["LOCAL_WORLD_SIZE"] = str(node)
    at, who = dies or (0, None)
    advance = run.Run.advance

    def advanced(self):
        advance(self)
        for thread in threading.enumerate():
            if thread.name == "near":  # steps of milliseconds: the one before is left to end, so that none is left out
                thread.join()
        if self.step == at and who in (None, rank):
            os.kill(os.getpid(), signal.SIGKILL)

    run.Run.advance = advanced
    said = io.StringIO()
    found = plan(load.recipe(recipe, [*SETS, *sets]), load.site("laptop"), ranks=int(os.environ["WORLD_SIZE"]))
    log = Path(folder).parent / f"said-{rank}"
    with log.open("w") as stream, contextlib.redirect_stdout(said):
        summary = loop.train(found, Path(folder), start=start, display=Display(Console(file=stream, width=400)))
    return log.read_text(), summary


def train(recipe, folder, *sets, ranks=2, node=1, start="auto", dies=None):
    """What rank 0 said, and its summary; None of a run whose ranks died."""
    where = () if any("checkpoint.near=" in one for one in sets) else (f"checkpoint.near={folder.parent}/near/{{node}}",)
    together_ = lambda: together(ranks, _train, recipe, folder, node, [*where, *sets], start, dies, timeout_s=120)  # noqa: E731
    if dies:
        with pytest.raises(AssertionError, match="died|lost another rank|closed"):
            together_()
        return None
    return together_()[0]


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    return train(tiny, folder, "checkpoint.near=null")[1]["weights_sha256"]


def node(folder, number):
    return next((folder.parent / "near" / str(number)).glob("gigatrain-*"))


@pytest.mark.parametrize(
    ("ranks", "node", "copies"), [(1, 1, 1), (2, 1, 1), (4, 2, 1), (5, 2, 1), (6, 2, 2), (7, 3, 2), (8, 2, 3), (8, 8, 1)]
)
def test_copies_lie_on_other_nodes_and_both_sides_know(ranks, node, copies):
    held = {rank: destinations(rank, ranks, node, copies) for rank in range(ranks)}
    nodes = -(-ranks // node)
    for rank, kept in held.items():
        assert len({other // node for other in kept} | {rank // node}) == len(kept) + 1 == min(copies, nodes - 1) + 1
    assert {rank: sources(rank, ranks, node, copies) for rank in range(ranks)} == {
        rank: [other for other in range(ranks) if rank in held[other]] for rank in range(ranks)
    }


def test_a_killed_run_goes_on_from_its_nodes_own_folders_and_ends_bitwise_equal(tiny, undisturbed, tmp_path):
    folder = tmp_path / "run"
    train(tiny, folder, dies=(11, None))
    said, summary = train(tiny, folder, start="resume")
    assert "near folders of 2 of 2 nodes hold all 2 parts of it; the shared file system's newest is step 6" in said
    assert summary["resumes"][0] == 10
    assert summary["weights_sha256"] == undisturbed
    assert not list((tmp_path / "near").glob("*/*")), "a run that ends cleans up"


def test_a_lost_node_costs_no_step_since_its_peer_has_its_pieces(tiny, undisturbed, tmp_path):
    folder = tmp_path / "run"
    train(tiny, folder, dies=(11, 1))  # the other rank leaves by itself: its peer is gone
    shutil.rmtree(tmp_path / "near" / "1")  # a spare took its place
    said, summary = train(tiny, folder, start="resume")
    assert "near folders of 1 of 2 nodes hold all 2 parts" in said
    assert summary["resumes"] == [10]
    assert summary["weights_sha256"] == undisturbed


def test_without_its_peers_copy_a_lost_node_costs_steps_and_nothing_else(tiny, undisturbed, tmp_path):
    folder = tmp_path / "run"
    train(tiny, folder, "checkpoint.near_copies=0", dies=(11, None))
    shutil.rmtree(tmp_path / "near" / "1")
    said, summary = train(tiny, folder, "checkpoint.near_copies=0", start="resume")
    assert "resumed at step 6" in said
    assert "no step is whole in near folders; of step 10 no node has the pieces of rank 1 of 2" in said
    assert summary["resumes"] == [6]
    assert summary["weights_sha256"] == undisturbed


@pytest.mark.parametrize("name", ["weights-00001.safetensors", "manifest-00001.json", "COMMITTED-00001"])
def test_damage_is_named_and_the_other_copy_is_used(tiny, undisturbed, tmp_path, name):
    folder = tmp_path / "run"
    train(tiny, folder, dies=(11, None))
    path = next(node(folder, 1).glob(f"step-00000010-*/{name}"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    said, summary = train(tiny, folder, start="resume")
    assert f"CHECKPOINT REFUSED: rank 1: {path.parent}/" in said
    assert summary["resumes"] == [10]
    assert summary["weights_sha256"] == undisturbed


def test_damage_to_both_copies_leaves_the_step_before(tiny, undisturbed, tmp_path):
    folder = tmp_path / "run"
    train(tiny, folder, dies=(11, None))
    for number in (0, 1):
        path = next(node(folder, number).glob("step-00000010-*/optimizer-00001.safetensors"))
        path.write_bytes(path.read_bytes()[:-1])
    said, summary = train(tiny, folder, start="resume")
    assert said.count("CHECKPOINT REFUSED") == 2
    assert summary["resumes"] == [9]
    assert summary["weights_sha256"] == undisturbed
