"""Runs of several phases: planned phase by phase, the order of data a function of the position, and resumed inside any of them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from distributed import together
from test_loop import planned, same_state, trained

from gigatrain import engines, load, run
from gigatrain.data.corpus import Corpus
from gigatrain.data.course import Course, Phase
from gigatrain.data.loader import Batches
from gigatrain.errors import CheckpointError, DataError, PlanError, RecipeError
from gigatrain.parallel.mesh import Mesh, alone
from gigatrain.planning.plan import plan

PHASES = "train.phases=[{steps=5},{steps=4,sequence=64,batch=2},{steps=3,sequence=128,batch=4,microbatch=2}]"
QUIET = ("export=false", "validation.every=0")


@pytest.fixture(scope="module")
def phased(tiny, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("phased") / "phased.toml"
    path.write_text(tiny.read_text().replace("steps = 12\n", ""))
    return path


@pytest.fixture(scope="module")
def whole(phased, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    trained(phased, folder, PHASES, *QUIET, "checkpoint.keep=9")
    return folder


@pytest.fixture(scope="module")
def read(whole, phased) -> Corpus:
    cache = Path(planned(phased, PHASES).data.folder).expanduser()
    return Corpus.open(cache / run.identity(whole)["corpus"])


def back(whole: Path, folder: Path, step: int) -> Path:
    """A whole run as it was at an earlier checkpoint."""
    shutil.copytree(whole, folder)
    (folder / "summary.json").unlink()
    for path in (folder / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    return folder


def test_a_plan_is_of_the_longest_samples_and_adds_up_the_rest(phased):
    made = planned(phased, PHASES)
    assert (made.steps, made.tokens) == (12, 5 * 4 * 32 + 4 * 2 * 64 + 3 * 4 * 128)
    assert (made.sequence, made.batch, made.microbatch, made.accumulation) == (128, 4, 2, 2)
    assert [(one.begin, one.steps, one.sequence, one.batch, one.microbatch) for one in made.phases] == [
        (0, 5, 32, 4, 4), (5, 4, 64, 2, 2), (9, 3, 128, 4, 2),
    ]  # fmt: skip
    assert made.memory.total == max(one.memory_bytes for one in made.phases)
    tokens = planned(phased, "train.phases=[{tokens=1000},{tokens=1000,sequence=64,batch=8}]")
    assert [one.steps for one in tokens.phases] == [8, 2]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("train.phases=[{steps=2,weights=[0.5,0.5]}]",), r"phases.0.weights has 2 numbers, and data.sources 1"),
        (
            ("train.phases=[{steps=2},{steps=2,sequence=66}]", "mesh.context=4"),
            r"phases.1: mesh.context 4 cuts a sample into 8 equal pieces",
        ),
        (("train.phases=[{steps=2},{steps=2,batch=3}]", "mesh.shard=2"), r"phases.1: train.batch 3 does not divide by the 2 ranks"),
        (("train.phases=[{steps=2},{steps=2,microbatch=8}]",), r"phases.1: microbatch 8 is above batch 4"),
        (("train.phases=[{steps=2}]", "schedule.from_step=2"), r"from_step 2 is where the schedule begins, and the run ends at step 2"),
    ],
)
def test_what_cannot_be_is_refused_by_the_phase(phased, overrides, said):
    with pytest.raises(PlanError, match=said):
        planned(phased, *overrides)


def test_memory_is_that_of_the_largest_phase(phased):
    site = load.site("laptop").model_copy(update={"memory_bytes": 1 << 28})
    recipe = load.recipe(phased, ("train.phases=[{steps=2},{steps=2,sequence=65536},{steps=2}]",))
    with pytest.raises(PlanError, match=r"phases.1: the run needs .* which has 0.25 GiB"):
        plan(recipe, site)


def test_contradictions_are_refused_in_the_recipe(phased, tiny):
    for overrides in (("train.phases=[{steps=2}]", "train.steps=4"), ("train.phases=[{}]",), ("train.phases=[{steps=1,weights=[0.0]}]",)):
        with pytest.raises(RecipeError):
            load.recipe(phased, overrides)


@pytest.mark.parametrize("step", [3, 6, 9])
def test_a_resume_inside_any_phase_is_the_run_that_was_not_disturbed(phased, whole, step, tmp_path):
    folder = back(whole, tmp_path / "run", step)
    trained(phased, folder, PHASES, *QUIET, "checkpoint.keep=9", start="resume")
    same_state(folder, whole)


def test_phases_ahead_may_change_and_those_behind_may_not(phased, whole, tmp_path):
    folder = back(whole, tmp_path / "run", 6)
    ahead = "train.phases=[{steps=5},{steps=2,sequence=64,batch=2},{steps=2,sequence=32,batch=8}]"
    with pytest.raises(CheckpointError, match=r"phases.1.steps: 4 -> 2(.|\n)*--other-numbers"):
        trained(phased, folder, ahead, *QUIET, start="resume")
    with pytest.raises(DataError, match="lies behind other phases"):
        trained(phased, folder, ahead.replace("steps=5", "steps=4"), *QUIET, start="other-numbers")
    with pytest.raises(CheckpointError, match="started under another plan"):  # the first phase is what the run is
        trained(phased, folder, ahead.replace("{steps=5}", "{steps=5,batch=8}"), *QUIET, start="other-numbers")
    assert trained(phased, folder, ahead, *QUIET, start="other-numbers")["steps"] == 9
    legs = run.identity(folder)["legs"]
    assert [leg["step"] for leg in legs] == [0, 6]
    assert "phases.1.steps: 4 -> 2" in legs[1]["changed"]


def test_a_run_without_phases_may_get_some(tiny, phased, tmp_path):
    folder = tmp_path / "run"
    trained(tiny, folder, *QUIET, "train.steps=4")
    summary = trained(phased, folder, "train.phases=[{steps=6},{steps=2,sequence=64}]", *QUIET, start="other-numbers")
    assert summary["steps"] == 8


def described(corpus, phases, seed=0, passed=(), steps=12, **options):
    batches = Batches(corpus, sequence=0, packing="stream", batch=0, seed=seed, phases=phases, prefetch=0, **options)
    batches.passed = list(passed)
    return batches, [batches.describe(next(batches).positions) for _ in range(steps)]


def test_alike_samples_never_come_twice_in_an_epoch(read):
    """Also where sequences differ in between and samples are passed over."""
    phases = [Phase(40, 64, 8, None, (1.0,)), Phase(5, 32, 4, None, (1.0,)), Phase(40, 64, 4, None, (1.0,)), Phase(9, 64, 8, None, (1.0,))]
    _, found = described(read, phases, steps=94, passed=[(3, 17), (2 << 40, (2 << 40) + 9)])
    long = [one.split("sample ")[1].split(":")[0] for step, rows in enumerate(found) for one in rows if not 40 <= step < 45]
    assert len(long) == 40 * 8 + 40 * 4 + 9 * 8 == len(set(long))


def test_the_order_is_a_function_of_seed_and_position(read):
    phases = [Phase(5, 32, 4, 2, (1.0,)), Phase(4, 64, 2, None, (1.0,)), Phase(3, 128, 4, 1, (1.0,))]
    batches, found = described(read, phases, steps=20)
    for step in (0, 4, 5, 8, 9, 11, 19):
        again, _ = described(read, phases, steps=0)
        again.position = again.begins(step)
        assert again.describe(next(again).positions) == found[step]
    batches.back(13)  # over two boundaries
    assert [batches.describe(next(batches).positions) for _ in range(13)] == found[7:]
    ranks = [Batches(read, sequence=0, packing="stream", batch=0, seed=0, phases=phases, rank=r, ranks=2, prefetch=2) for r in range(2)]
    one, _ = described(read, phases, steps=0)
    for _ in range(14):
        whole, *parts = next(one), *(next(rank) for rank in ranks)
        rows = torch.cat([part.tokens for batch in parts for part in batch.microbatches])
        assert torch.equal(rows, torch.cat([part.tokens for part in whole.microbatches]))
        assert whole.targets == sum(part.targets for part in parts)
    for rank in ranks:
        rank.close()


def test_sources_come_in_a_phase_s_own_shares(tiny, read, tmp_path):
    course = Course(read, [Phase(10, 32, 8, None, (1.0,))], "stream", 0)
    sources = json.dumps([{"kind": "text", "path": str(part), "pattern": "*.py"} for part in halves(tiny, tmp_path)]).replace(":", "=")
    sources = sources.replace('"kind"', "kind").replace('"path"', "path").replace('"pattern"', "pattern")
    recipe = tmp_path / "two.toml"
    text = tiny.read_text().replace("steps = 12\n", "")
    recipe.write_text("\n".join(f"sources = {sources}" if line.startswith("sources") else line for line in text.splitlines()))
    folder = tmp_path / "run"
    phases = "train.phases=[{steps=8,weights=[3,1]},{steps=8,weights=[0,1]},{steps=8,weights=[1,1]}]"
    trained(recipe, folder, phases, *QUIET)
    both = Corpus.open(Path(planned(recipe, phases).data.folder).expanduser() / run.identity(folder)["corpus"])
    _, found = described(both, [Phase(16, 32, 4, None, weights) for weights in ((3.0, 1.0), (0.0, 1.0), (1.0, 1.0))], steps=48)
    first = both.sources[0]
    shares = [sum(f"source {first}," in one for rows in found[at : at + 16] for one in rows) for at in (0, 16, 32)]
    assert shares == [48, 0, 32]
    assert len({one.split(": ", 1)[1] for rows in found for one in rows}) == 48 * 4
    assert course.epochs(0) == 0.0


def halves(tiny, folder):
    files = sorted(Path(load.recipe(tiny).data.sources[0].path or "").iterdir())
    for number in range(2):
        (folder / f"half{number}").mkdir()
        for path in files[number::2]:
            shutil.copyfile(path, folder / f"half{number}" / path.name)
    return [folder / "half0", folder / "half1"]


def stepped(rank, recipe, overrides, ranks, folder):
    made = plan(load.recipe(recipe, overrides), load.site("laptop"), ranks)
    mesh = Mesh(made.mesh, rank) if ranks > 1 else alone()
    engine = engines.make(made, mesh, torch.device("cpu"), fresh=True)
    reader, readers = mesh.data
    phases = [Phase(one.steps, one.sequence, one.batch, one.microbatch, one.weights) for one in made.stretches]
    batches = Batches(
        Corpus.open(Path(folder)), sequence=0, packing="stream", batch=0, seed=0, phases=phases, rank=reader, ranks=readers, prefetch=0
    )
    numbers = []
    for _ in range(made.steps):
        batch = next(batches)
        engine.forward_backward(batch)
        update = engine.step(1.0)
        numbers.append((update.nats.item() / update.targets.item(), update.grad_norm.item()))
    return numbers


@pytest.mark.parametrize(
    "overrides",
    [
        ("engine.name=native", "train.recompute=full"),
        ("engine.name=native", "mesh.context=2"),
        pytest.param(("engine.name=deepspeed", "engine.zero=3"), marks=pytest.mark.long),
        pytest.param(("engine.name=deepspeed", "engine.zero=2"), marks=pytest.mark.long),
        ("mesh.pipeline=2", "train.microbatch=1"),
    ],
)
def test_engines_cope_with_other_lengths_from_one_step_to_the_next(phased, read, overrides):
    phases = PHASES.replace("steps=5", "steps=2").replace("steps=4,", "steps=2,").replace("steps=3,", "steps=2,")
    shared = (phases, "model.architecture.tied=false")
    alone_ = stepped(0, phased, shared, 1, read.folder)
    for numbers in together(2, stepped, phased, (*shared, *overrides), 2, str(read.folder)):
        assert numbers == [pytest.approx(one, rel=2e-5) for one in alone_]


@pytest.mark.long
def test_compiled_layers_cope_too(phased, read):
    phases = "train.phases=[{steps=1},{steps=1,sequence=64,batch=2},{steps=1}]"
    compiled = stepped(0, phased, (phases, "train.compile=true", "kernels=reference"), 1, read.folder)
    assert compiled == [pytest.approx(one, rel=2e-5) for one in stepped(0, phased, (phases, "kernels=reference"), 1, read.folder)]


def test_a_run_says_its_phases(phased, capsys):
    from gigatrain.cli import main

    main(["plan", str(phased), "--site", "laptop", "--set", PHASES])
    said = capsys.readouterr().out
    assert "phase 1  steps 5 to 8: 2 samples x 64 tokens; 512 tokens, about 0.00 GiB" in said
