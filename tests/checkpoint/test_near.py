"""Steps in nodes' own folders: whole runs of several ranks as several nodes, killed, robbed of nodes and copies, resumed, and compared bitwise."""

import contextlib
import io
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from distributed import together
from rich.console import Console

from gigatrain import load, loop, run
from gigatrain.checkpoint import near, write_tensors
from gigatrain.checkpoint.folder import Folder
from gigatrain.checkpoint.travel import destinations, sources
from gigatrain.errors import CheckpointError
from gigatrain.observe.display import Display
from gigatrain.observe.reader import Reader
from gigatrain.planning.plan import plan

SETS = ("train.batch=8", "report.every=2", "validation.every=0", "checkpoint.every=6", "checkpoint.near_every=1", "export=false")


MOMENTS = {"near": near, "Near": near.Near, "Folder": Folder}


def _train(rank, recipe, folder, node, sets, start, dies, loses=None):
    """One rank of a run; `dies`: after which step the process is gone, and by which rank, None: all; `loses`: after which step the near folders are gone.
    Returns what was said and the summary."""
    os.environ["LOCAL_WORLD_SIZE"] = str(node)
    at, who, moment = (*dies, None)[:3] if dies else (0, None, None)
    advance = run.Run.advance

    def advanced(self):
        advance(self)
        for thread in threading.enumerate():
            if thread.name == "near":  # steps of milliseconds: the one before is left to end, so that none is left out
                thread.join()
        if self.step == loses:
            shutil.rmtree(Path(folder).parent / "near" / str(rank))
        if self.step == at and who in (None, rank):
            os.kill(os.getpid(), signal.SIGKILL)

    run.Run.advance = advanced
    if moment is not None and who in (None, rank):
        owner, name, calls = moment
        function = getattr(MOMENTS[owner], name)
        count = itertools.count(1)

        def counted(*args, **more):
            if next(count) == calls:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **more)

        setattr(MOMENTS[owner], name, counted)
    said = io.StringIO()
    found = plan(load.recipe(recipe, [*SETS, *sets]), load.site("laptop"), ranks=int(os.environ["WORLD_SIZE"]))
    log = Path(folder).parent / f"said-{rank}"
    with log.open("w") as stream, contextlib.redirect_stdout(said):
        summary = loop.train(found, Path(folder), start=start, display=Display(Console(file=stream, width=400)))
    return log.read_text(), summary


def train(recipe, folder, *sets, ranks=2, node=1, start="auto", loses=None):
    """What rank 0 said, and its summary."""
    where = () if any("checkpoint.near=" in one for one in sets) else (f"checkpoint.near={folder.parent}/near/{{node}}",)
    return together(ranks, _train, recipe, folder, node, [*where, *sets], start, None, loses, timeout_s=120)[0]


def killed(recipe, folder, *sets, ranks=2, node=1, at=11, who=None, start="auto"):
    """A run whose ranks, or one of them, are gone after a step."""
    where = f"checkpoint.near={folder.parent}/near/{{node}}"
    with pytest.raises(AssertionError, match="died|lost another rank"):
        together(ranks, _train, recipe, folder, node, [where, *sets], start, (at, who), timeout_s=120)


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
    killed(tiny, folder)
    said, summary = train(tiny, folder, start="resume")
    assert "near folders of 2 of 2 nodes hold all 2 parts of it; the shared file system's newest is step 6" in said
    assert summary["resumes"][0] == 10
    assert summary["weights_sha256"] == undisturbed
    assert not list((tmp_path / "near").glob("*/*")), "a run that ends cleans up"
    assert train(tiny, folder, start="resume")[1] == summary
    assert not list((tmp_path / "near").glob("*/*")), "and who finds it finished"
    assert not list(Path(tempfile.gettempdir()).glob(f"gigatrain-energy-{run.identity(folder)['id']}-*"))


def test_a_lost_node_costs_no_step_since_its_peer_has_its_pieces(tiny, undisturbed, tmp_path):
    folder = tmp_path / "run"
    killed(tiny, folder, who=1)  # the other rank leaves by itself: its peer is gone
    shutil.rmtree(tmp_path / "near" / "1")  # a spare took its place
    said, summary = train(tiny, folder, start="resume")
    assert "near folders of 1 of 2 nodes hold all 2 parts" in said
    assert summary["resumes"] == [10]
    assert summary["weights_sha256"] == undisturbed


def test_without_its_peers_copy_a_lost_node_costs_steps_and_nothing_else(tiny, undisturbed, tmp_path):
    folder = tmp_path / "run"
    killed(tiny, folder, "checkpoint.near_copies=0")
    shutil.rmtree(tmp_path / "near" / "1")
    said, summary = train(tiny, folder, "checkpoint.near_copies=0", start="resume")
    assert "resumed at step 6" in said
    assert "no step is whole in near folders; of step 10 no node has the pieces of rank 1 of 2" in said
    assert summary["resumes"] == [6]
    assert summary["weights_sha256"] == undisturbed


@pytest.mark.parametrize("name", ["weights-00001.safetensors"])  # of the others the parts' own tests, below
def test_damage_is_named_and_the_other_copy_is_used(tiny, undisturbed, tmp_path, name):
    folder = tmp_path / "run"
    killed(tiny, folder)
    path = next(node(folder, 1).glob(f"step-00000010-*/{name}"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    said, summary = train(tiny, folder, start="resume")
    assert f"CHECKPOINT REFUSED: rank 1: {path.parent}/" in said
    assert summary["resumes"] == [10]
    assert summary["weights_sha256"] == undisturbed


@pytest.mark.long
def test_damage_to_both_copies_leaves_the_step_before(tiny, undisturbed, tmp_path):
    folder = tmp_path / "run"
    killed(tiny, folder)
    for number in (0, 1):
        path = next(node(folder, number).glob("step-00000010-*/optimizer-00001.safetensors"))
        path.write_bytes(path.read_bytes()[:-1])
    said, summary = train(tiny, folder, start="resume")
    assert said.count("CHECKPOINT REFUSED") == 2
    assert summary["resumes"] == [9]
    assert summary["weights_sha256"] == undisturbed


@pytest.mark.long
def test_another_mesh_takes_a_near_step_up_and_a_spare_gets_what_it_lacks(tiny, tmp_path):
    """Four ranks on two nodes; one node is lost, and two ranks on two nodes go on, of which one has nothing."""
    folder = tmp_path / "run"
    killed(tiny, folder, ranks=4, node=2)
    os.rename(tmp_path / "near" / "1", tmp_path / "near" / "gone")
    said, summary = train(tiny, folder, start="resume")
    assert "near folders of 1 of 2 nodes hold all 4 parts" in said
    assert summary["resumes"] == [10]
    other = tmp_path / "other" / "run"  # the same, but that step 10 lies on the shared file system
    other.parent.mkdir()
    far = ("checkpoint.near=null", "checkpoint.every=10", "checkpoint.background=false")
    killed(tiny, other, *far, ranks=4, node=2)
    its = train(tiny, other, *far, start="resume")[1]
    assert its["resumes"] == [10]
    assert summary["weights_sha256"] == its["weights_sha256"]


@pytest.mark.long
def test_random_kills_and_lost_nodes_end_bitwise_equal(tiny, undisturbed, tmp_path):
    """SIGKILL of one rank or both, after a step, as a near save writes, travels, commits or is loaded; sometimes the node's folder goes with it.
    GIGATRAIN_KILLS=100 for the long form."""
    folder, kills, draw = tmp_path / "run", int(os.environ.get("GIGATRAIN_KILLS", "6")), random.Random(20261126)
    moments = [
        ("Near", "_write"),
        ("Near", "_receive"),
        ("Folder", "commit_text"),
        ("near", "keep_file"),
        ("Near", "bring"),
        ("Near", "begin"),
    ]
    done = lost = 0
    for _ in range(3 * kills):
        if done == kills:
            break
        started = any((folder / "checkpoints").glob("step-*/COMMITTED"))
        who, name = draw.choice([None, 0, 1]), draw.choice([*moments, None])
        calls = 1 if name in moments[-2:] else draw.randint(1, 6)
        dies = (draw.randint(1, 11), who) if name is None else (0, who, (*name, calls))
        where = f"checkpoint.near={tmp_path}/near/{{node}}"
        try:
            together(2, _train, tiny, folder, 1, [where], "continue", dies, timeout_s=120)
        except AssertionError as failure:
            assert "died" in str(failure) or "lost another rank" in str(failure) or "exchange" in str(failure), failure  # noqa: PT017 - which rank is heard first is open
            done += 1
        else:
            shutil.rmtree(folder)  # it ended before the kill: once more
        if started and draw.random() < 0.4:
            shutil.rmtree(tmp_path / "near" / draw.choice("01"), ignore_errors=True)
            lost += 1
    print(f"{done} kills, {lost} lost nodes")
    assert done == kills
    _, summary = train(tiny, folder, start="continue")
    assert summary["weights_sha256"] == undisturbed


@pytest.mark.long
def test_a_node_that_was_away_brings_back_no_step_that_the_run_has_done_again(tiny, undisturbed, tmp_path):
    folder = tmp_path / "run"
    killed(tiny, folder)
    for number in ("0", "1"):
        os.rename(tmp_path / "near" / number, tmp_path / f"away-{number}")
    killed(tiny, folder, "checkpoint.near_every=100", start="resume", at=8)  # from the shared file system's, and no near step of its own
    shutil.rmtree(tmp_path / "near")
    (tmp_path / "near").mkdir()
    for number in ("0", "1"):
        os.rename(tmp_path / f"away-{number}", tmp_path / "near" / number)
    said, summary = train(tiny, folder, start="resume")
    assert "resumed at step 6" in said
    assert summary["resumes"] == [6]
    assert summary["weights_sha256"] == undisturbed


def test_a_near_folder_that_is_too_small_is_said_and_training_goes_on(tiny, undisturbed, tmp_path):
    """A tmpfs of 300 kB where a near save takes about that of each node."""
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "none", mount], capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a tmpfs")
    try:
        said, summary = train(tiny, tmp_path / "run", f"checkpoint.near={mount}/{{node}}")
    finally:
        subprocess.run(["umount", mount], check=True)
    assert said.count("NEAR TIER OFF") == 1
    assert "is too small: a near save takes about" in said
    assert summary["weights_sha256"] == undisturbed


@pytest.mark.long
def test_a_near_folder_that_somebody_removes_is_said_and_training_goes_on(tiny, undisturbed, tmp_path):
    said, summary = train(tiny, tmp_path / "run", loses=5)
    assert said.count("NEAR TIER OFF") == 1
    assert "No such file or directory" in said
    assert summary["weights_sha256"] == undisturbed


@pytest.mark.parametrize("plant", ["link", "wide", "stranger", "file"])
def test_a_folder_that_is_not_ours_is_refused_by_name(tmp_path, plant):
    where = tmp_path / "near"
    where.mkdir()
    folder = Folder(str(where), run="r1", node=0, plan_sha256="p", run_folder=tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    if plant == "link":
        folder.path.symlink_to(elsewhere)
    elif plant == "file":
        folder.path.write_text("")
    else:
        folder.path.mkdir(mode=0o700)
        folder.path.chmod(0o777) if plant == "wide" else os.chown(folder.path, 12345, -1)
    said = {"link": "is a symbolic link", "wide": "is open to others", "stranger": "belongs to user 12345", "file": "is no folder"}[plant]
    with pytest.raises(CheckpointError, match=f"{folder.path} {said}"):
        folder.take()
    assert not list(elsewhere.iterdir())
    _, refused = folder.found()
    assert len(refused) == 1


def test_a_root_that_others_can_write_is_refused_unless_it_is_sticky(tmp_path):
    where = tmp_path / "near"
    where.mkdir()
    where.chmod(0o777)
    with pytest.raises(CheckpointError, match="can be written by others"):
        Folder(str(where), run="r1", node=0, plan_sha256="p", run_folder=tmp_path).take()
    where.chmod(0o1777)
    Folder(str(where), run="r1", node=0, plan_sha256="p", run_folder=tmp_path).take()


def part(where, tmp_path):
    folder = Folder(str(where), run="r1", node=0, plan_sha256="p", run_folder=tmp_path)
    folder.take()
    step = folder.step(4, "0123456789ab")
    step.mkdir(mode=0o700)
    record = write_tensors(step / "weights-00000.safetensors", {"w": torch.arange(4.0)}, {})
    box = {"file": "weights-00000.safetensors", "start": [0], "size": [4]}
    manifest = {"format": 1, "run": "r1", "plan_sha256": "p", "step": 4, "attempt": "0123456789ab", "rank": 0, "ranks": 1}
    manifest |= {
        "files": {"weights-00000.safetensors": record},
        "tensors": {"weights": {"w": {"dtype": "F32", "shape": [4], "pieces": [box]}}},
    }
    folder.commit(step, manifest)
    return folder, step, manifest


ACCEPTS: dict[str, int | None] = {"0123456789ab": None}


@pytest.mark.parametrize("name", ["weights-00000.safetensors", "manifest-00000.json", "COMMITTED-00000"])
@pytest.mark.parametrize("plant", ["link", "pipe", "folder"])
def test_nothing_but_files_of_ours_is_opened(tmp_path, name, plant):
    folder, step, _ = part(tmp_path / "near", tmp_path)
    assert folder.part(step, 0, accepts=ACCEPTS)
    (step / name).rename(tmp_path / name)
    if plant == "link":
        (step / name).symlink_to(tmp_path / name)
    else:
        os.mkfifo(step / name) if plant == "pipe" else (step / name).mkdir()
    with pytest.raises(CheckpointError, match=name):
        folder.part(step, 0, accepts=ACCEPTS)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("run", "r2"),
        ("plan_sha256", "q"),
        ("step", 5),
        ("attempt", "ba9876543210"),
        ("rank", 1),
        ("ranks", 0),
        ("format", 2),
        ("files", {"../x": {}}),
    ],
)
def test_a_part_of_another_run_step_or_attempt_is_refused(tmp_path, key, value):
    folder, step, manifest = part(tmp_path / "near", tmp_path)
    folder.commit_text(step, 0, json.dumps(manifest | {key: value}))
    with pytest.raises(CheckpointError, match="manifest-00000.json"):
        folder.part(step, 0, accepts=ACCEPTS)


NESTED = "[" * 100_000  # deeper than Python follows, which is no ValueError


def test_what_is_nested_too_deep_is_refused_and_leaves_nobody_waiting(tmp_path):
    """Rank 0 alone reads what says which attempts count: what it cannot read must be its word, and not its end."""
    folder, step, _ = part(tmp_path / "near", tmp_path)
    folder.commit_text(step, 0, NESTED)
    with pytest.raises(CheckpointError, match="manifest-00000.json is not a manifest"):
        folder.part(step, 0, accepts=ACCEPTS)
    for content in (NESTED, "{", '{"attempt": "x", "from": null}'):
        (tmp_path / "near.json").write_text(content)
        with pytest.raises(CheckpointError, match="near.json is not what an attempt writes"):
            near.Near._accepts(SimpleNamespace(run_folder=tmp_path))  # type: ignore[arg-type]


def test_every_single_bit_of_a_part_counts(tmp_path):
    folder, step, _ = part(tmp_path / "near", tmp_path)
    draw = random.Random(9)
    for path in sorted(step.iterdir()):
        whole = path.read_bytes()
        for bit in draw.sample(range(8 * len(whole)), 40):
            data = bytearray(whole)
            data[bit // 8] ^= 1 << bit % 8
            path.write_bytes(data)
            with pytest.raises(CheckpointError):
                folder.part(step, 0, accepts=ACCEPTS)
        path.write_bytes(whole)
    assert folder.part(step, 0, accepts=ACCEPTS)


def test_only_stale_folders_of_ours_are_removed(tmp_path):
    where = tmp_path / "near"
    dead, young, held, foreign, stranger = (Folder(str(where), run=run, node=0, plan_sha256="p", run_folder=tmp_path) for run in "abcde")
    for one in (dead, young, held, stranger):
        one.take()
    for one in (dead, young, stranger):
        one.release(remove=False)
    foreign.path.mkdir(mode=0o700)  # without our mark
    os.chown(stranger.path, 12345, -1)
    for one in (dead, held, foreign, stranger):
        for path in (*one.path.iterdir(), one.path):
            os.utime(path, (1e9, 1e9))
    ours = Folder(str(where), run="f", node=0, plan_sha256="p", run_folder=tmp_path)
    assert ours.take() == [str(dead.path)]
    assert {path.name for path in where.iterdir()} == {one.path.name for one in (young, held, foreign, stranger, ours)}
    with pytest.raises(CheckpointError, match="is in use by another process"):
        Folder(str(where), run="c", node=0, plan_sha256="p", run_folder=tmp_path).take(patience_s=0.2)


def test_automatic_intervals_are_measured_told_and_change_no_weight(tiny, undisturbed, tmp_path):
    said, summary = train(tiny, tmp_path / "run", "checkpoint.every=auto", "checkpoint.near_every=auto")
    kept = summary["saving"]
    assert "saves    every " in said
    assert kept["words"] in said
    assert kept["near"]["saves"] >= 1
    assert kept["chosen"]["far_cost_s"] > 0
    assert kept["every"] == kept["chosen"]["far"] > 12  # a failure in years: once an hour, by the bound
    assert "Llama 3" in kept["words"]
    assert summary["weights_sha256"] == undisturbed
    seen = Reader(tmp_path / "run").seen()
    assert seen["saving"]["every"] == kept["every"]
