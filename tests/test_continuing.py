"""Runs that go on otherwise than they began: another schedule or length from a checkpoint on, or a new run from another's weights and optimizer."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from distributed import together
from safetensors.torch import load_file
from test_loop import planned, tensors, trained

from gigatrain import engines, export, load, restore, run
from gigatrain.architectures import Architecture
from gigatrain.config import Schedule
from gigatrain.data import tokenizer
from gigatrain.data.corpus import Corpus
from gigatrain.data.loader import Batches
from gigatrain.errors import CheckpointError, PlanError, RecipeError, RunError
from gigatrain.optim.schedule import rate
from gigatrain.parallel.mesh import Mesh
from gigatrain.planning.plan import plan

QUIET = ("export=false", "validation.every=0")
ON = ("schedule.from_step=12", "schedule.warmup=3", "schedule.start=0.1", "train.steps=18")


@pytest.fixture(scope="module")
def begun(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "begun"
    trained(tiny, folder, *QUIET, "checkpoint.keep=9")
    return folder


def test_a_schedule_that_goes_on_from_a_step_begins_no_run(tiny, tmp_path):
    with pytest.raises(
        RunError, match=r"from_step 2 is where another schedule goes on .* begins at step 0; leave schedule.from_step out, or resume"
    ):
        trained(tiny, tmp_path / "run", *QUIET, "schedule.from_step=2")
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_finished_run_warms_up_again_and_goes_on(tiny, begun, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(begun, folder)
    with pytest.raises(CheckpointError, match="add --other-numbers"):
        trained(tiny, folder, *QUIET, *ON, start="resume")
    with pytest.raises(RunError, match=r"newest checkpoint is of step 12, and train.steps is 9"):
        trained(tiny, folder, *QUIET, "train.steps=9", start="other-numbers")
    with pytest.raises(RunError, match=r"from_step 14 lies ahead of the newest checkpoint, step 12"):
        trained(tiny, folder, *QUIET, *ON, "schedule.from_step=14", start="other-numbers")
    assert trained(tiny, folder, *QUIET, *ON, start="other-numbers")["steps"] == 18
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rates = {row["step"]: row["lr"] for row in rows if "lr" in row}
    made = planned(tiny, *QUIET, *ON)
    assert rates[18] == pytest.approx(made.optim.lr * rate(made.schedule, 17, 18))
    assert rates[14] == pytest.approx(made.optim.lr * (0.1 + 0.9 * 2 / 3))  # the second step of the new warm-up


def test_a_new_run_begins_with_weights_and_optimizer_and_reads_on(tiny, begun, tmp_path):
    """At a constant rate a run that is cut in two by `optim.from` is the run that was not."""
    constant = (*QUIET, "schedule.kind=constant", "schedule.warmup=0", "numerics.sigma=0", "checkpoint.keep=9")
    whole, second = tmp_path / "whole", tmp_path / "second"
    trained(tiny, whole, *constant)
    trained(tiny, second, *constant, f"optim.from={whole}/checkpoints/step-00000006", "train.steps=6")
    one, other = tensors(whole)[1], tensors(second)[1]
    for group in ("weights", "optimizer"):
        for name, tensor in one[group].items():
            if name not in ("steps", "bad"):
                assert torch.equal(tensor, other[group][name]), name
    trained(tiny, tmp_path / "third", *constant, f"optim.from={whole}", "train.steps=1", "train.seed=9")  # the newest, and data begin anew
    with pytest.raises(CheckpointError, match="holds no checkpoint of step 7; there are 0, 3, 6, 9, 12"):
        trained(tiny, tmp_path / "fourth", *constant, f"optim.from={whole}/checkpoints/step-00000007")
    with pytest.raises(RunError, match="is not a run folder"):
        trained(tiny, tmp_path / "fifth", *constant, f"optim.from={tmp_path}")
    with pytest.raises(CheckpointError, match="optimizer has other tensors|momentum"):
        trained(tiny, tmp_path / "sixth", *constant, f"optim.from={whole}", "optim.name=muon")


def begun_with(rank, recipe, overrides, ranks):
    made = plan(load.recipe(recipe, overrides), load.site("laptop"), ranks)
    mesh = Mesh(made.mesh, rank)
    engine = engines.make(made, mesh, torch.device("cpu"), fresh=False)
    record = run.identity(Path(made.optim.source or ""))
    corpus = Corpus.open(Path(made.data.folder).expanduser() / record["corpus"])
    batches = Batches(corpus, sequence=made.sequence, packing="stream", batch=made.batch, seed=made.seed, prefetch=0)
    said = restore.begin_from(made, engine, batches, mesh)
    state = engine.state()
    return said, {name: (piece.place, piece.tensor.clone()) for name, piece in state["optimizer"].items() if piece.writes}, batches.passed


@pytest.mark.parametrize("how", [("engine.name=native",), pytest.param(("engine.name=deepspeed", "engine.zero=2"), marks=pytest.mark.long)])
def test_another_mesh_begins_with_it_too(tiny, begun, how):
    saved = tensors(begun)[1]["optimizer"]
    found: dict = {}
    for said, pieces, passed in together(2, begun_with, tiny, (*QUIET, f"optim.from={begun}", *how), 2):
        assert said[1] == "data go on behind the 48 samples that it read"
        assert passed == [(0, 48)]
        for name, (place, piece) in pieces.items():
            place.of(found.setdefault(name, torch.zeros(place.shape, dtype=piece.dtype))).copy_(piece)
    assert all(torch.equal(found[name], saved[name]) for name in saved if name not in ("bad", "steps"))


def test_schedules_that_continue():
    again = Schedule(kind="cosine", from_step=100, warmup=10, start=0.1, floor=0.1)
    assert rate(again, 100, 200) == pytest.approx(0.19)
    assert [rate(again, step, 200) for step in (109, 110)] == [1.0, 1.0]
    assert rate(again, 199, 200) == pytest.approx(0.1)
    decay = Schedule(kind="wsd", from_step=50, decay=1.0, floor=0.0)
    assert [rate(decay, step, 54) for step in range(50, 54)] == pytest.approx([0.75, 0.5, 0.25, 0.0])
    restarts = Schedule(kind="cosine", cycles=4, floor=0.0)
    assert [rate(restarts, step, 101) for step in (0, 25, 50, 75)] == pytest.approx([1.0] * 4)
    assert rate(restarts, 100, 101) == 0.0
    assert rate(restarts, 12, 101) > 0.5 > rate(restarts, 13, 101)
    endless = Schedule(kind="infinite", warmup=10, cooldown=0.2, level=0.5, decay=0.1, floor=0.0)
    rates = [rate(endless, step, 1000) for step in range(1000)]
    assert (rates[9], rates[300], rates[899], rates[999]) == pytest.approx((1.0, 0.5, 0.5, 0.0))
    assert all(a >= b for a, b in pairwise(rates[10:]))


@pytest.mark.parametrize(
    "schedule", ["start=0.5", 'kind="wsd",cycles=2', 'kind="infinite",cooldown=0.9,decay=0.2', "cycles=0", "start=1.5,warmup=1"]
)
def test_schedules_that_contradict_themselves_are_refused(tiny, schedule):
    with pytest.raises(RecipeError):
        load.recipe(tiny, (f"schedule={{{schedule}}}",))


@pytest.fixture(scope="module")
def weights(tiny, tmp_path_factory):
    """An export whose config.json says 32 positions."""
    folder = tmp_path_factory.mktemp("runs") / "exported"
    trained(tiny, folder, "train.steps=1", "export=true", "validation.every=0")
    return folder / "export"


YARN = 'model.rope={kind="yarn",theta=10000.0,factor=4.0,original_positions=32}'


def recipe_from(tiny, weights, tmp_path):
    text = tiny.read_text()
    path = tmp_path / "from.toml"
    path.write_text(text[: text.index("[model.architecture]")] + f'[model]\nfrom = "{weights}"\n' + text[text.index("[tokenizer.train]") :])
    return path


def test_positions_beyond_the_weights_are_refused_unless_scaled(tiny, weights, tmp_path):
    recipe = recipe_from(tiny, weights, tmp_path)
    planned(recipe)
    with pytest.raises(
        PlanError, match=r"samples of 64 tokens have positions beyond 32, the weights' own length .*factor = 2, original_positions = 32"
    ):
        planned(recipe, "train.sequence=64")
    made = planned(recipe, "train.sequence=128", YARN)
    assert made.decoder.rope.kind == "yarn"
    assert made.positions == 128
    with pytest.raises(PlanError, match=r"positions beyond 128, what model.rope scales them to; raise its factor to 8"):
        planned(recipe, "train.sequence=256", YARN)
    with pytest.raises(PlanError, match=r"positions beyond 64.*raise its factor to 4"):
        planned(recipe, "train.sequence=128", 'model.rope={kind="linear",factor=2.0}')
    planned(recipe, "train.sequence=128", "model.rope={theta=500000.0}")  # taken at its word
    planned(recipe, "train.sequence=128", "model.fresh=true")
    with pytest.raises(PlanError, match="factor 2 x original_positions 16"):
        planned(tiny, "train.sequence=64", 'model.rope={kind="yarn",factor=2.0,original_positions=16}')
    with pytest.raises(RecipeError, match="model.rope: .*short_factor has 1 numbers"):
        planned(recipe, 'model.rope={kind="longrope",factor=2.0,original_positions=32,short_factor=[1.0],long_factor=[1.0]}')


@pytest.mark.parametrize(
    "rope",
    [
        'kind="yarn",factor=4.0,original_positions=32',
        'kind="linear",factor=4.0',
        'kind="llama3",factor=8.0,original_positions=32,low_freq_factor=1.0,high_freq_factor=4.0',
        'kind="longrope",factor=4.0,original_positions=32,short_factor=[1.0,1.0,1.0,1.0],long_factor=[1.0,2.0,3.0,4.0]',
    ],
)
def test_a_stretched_model_trains_and_its_export_says_so(tiny, weights, tmp_path, rope):
    """Long samples after short ones, and transformers computes what we do."""
    import transformers

    recipe = recipe_from(tiny, weights, tmp_path)
    recipe.write_text(recipe.read_text().replace("steps = 12\n", ""))
    folder = tmp_path / "run"
    phases = "train.phases=[{steps=1},{steps=1,sequence=128,batch=2}]"
    trained(recipe, folder, f"model.rope={{theta=10000.0,{rope}}}", phases, "export=true", "validation.every=0")
    config = json.loads((folder / "export" / "config.json").read_text())
    assert config["max_position_embeddings"] == 128
    assert config["rope_parameters"]["rope_type"] == rope.split('"')[1]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "export", attn_implementation="eager")
    made = run.stored_plan(folder)
    from gigatrain.models.decoder import Decoder
    from gigatrain.models.hf import load_weights

    assert isinstance(made.architecture, Architecture)
    ours = Decoder(made.architecture)
    load_weights(ours, folder / "export")
    tokens = torch.randint(0, 320, (1, 128), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(model(tokens).logits, ours.eval().logits(tokens), atol=2e-5)


def test_a_run_gives_new_tokens_rows_and_refuses_weights_of_another_rope(tiny, begun, tmp_path):
    export.export(begun, tmp_path / "weights")
    text = tiny.read_text()
    own = tmp_path / "own.toml"
    own.write_text(text.replace("[tokenizer.train]\nvocab = 320", f'[tokenizer]\nfrom = "{tmp_path / "weights"}"'))
    start = (*QUIET, f"model.from={tmp_path / 'weights'}", "train.steps=2", "schedule.warmup=0")
    more = trained(own, tmp_path / "more", *start, "model.architecture.vocab=323")
    same = trained(own, tmp_path / "same", *start)
    assert more["steps"] == same["steps"] == 2
    first = [next(json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines() if "loss" in line)
             for name in ("more", "same")]  # fmt: skip
    assert first[0] == pytest.approx(first[1], abs=0.02)  # three average tokens take little from the known
    trained(own, tmp_path / "adapted", *start, "model.architecture.vocab=323", "adapter.rank=2", "adapter.train_embeddings=true")
    export.export(tmp_path / "adapted", tmp_path / "merged")
    rows = load_file(tmp_path / "merged" / "model.safetensors")["model.embed_tokens.weight"]
    assert rows.shape[0] == 323
    assert rows[-3:].std(0).max() < rows[:-3].std(0).max() / 4  # they began alike
    with pytest.raises(CheckpointError, match=r"rope.theta: 10000.0 in its config.json, 777.0 in the recipe"):
        trained(own, tmp_path / "wrong", *start, "model.architecture.rope.theta=777.0")
    assert not list((tmp_path / "wrong").glob("checkpoints/*"))
    with pytest.raises(CheckpointError, match=r"--set model.architecture.vocab=320"):
        trained(own, tmp_path / "fewer", *start, "model.architecture.vocab=319", "tokenizer.from=" + str(short(tmp_path)))


def short(folder):
    """The tokenizer with fewer ids than rows."""
    made = tokenizer.train(["some words of text " * 20], 280, folder / "short")
    return made.folder
