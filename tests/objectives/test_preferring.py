"""Runs on real chat pairs: accuracy rises, on any mesh and engine the same, killed and resumed bitwise, and with a reference that is kept and checked."""

import io
import json
import os
import shutil
import signal
import weakref

import numpy as np
import pairsrecipe
import pytest
import torch
from distributed import together
from rich.console import Console

from gigatrain import engines, load, loop, objectives, run
from gigatrain.data import build
from gigatrain.data.loader import Batches, Validation
from gigatrain.data.pairs import Pairs
from gigatrain.engines.native import Native
from gigatrain.errors import DataError, PlanError, RunError
from gigatrain.objectives import figures, reference
from gigatrain.observe.display import Display
from gigatrain.parallel.mesh import Mesh
from gigatrain.planning.fusions import Fusion
from gigatrain.planning.plan import plan

KINDS = ("dpo", "ipo", "orpo", "simpo", "kto")


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    """The recipe of each kind; what reads the same pairs shares a corpus."""
    folder = tmp_path_factory.mktemp("pairs")
    return {kind: pairsrecipe.write(folder, kind, cache=folder / "cache") for kind in KINDS}


def planned(recipe, *overrides, ranks=None):
    return plan(load.recipe(recipe, ("export=false", *overrides)), load.site("laptop"), ranks)


def trained(recipe, folder, *overrides, start: run.Start = "auto"):
    summary = loop.train(planned(recipe, *overrides), folder, start=start, display=Display(Console(file=io.StringIO())))
    assert summary is not None, "no signal ended it"
    return summary


def sources(batches):
    """The pairs of every source of a run that reads nothing else."""
    found = [one for one in batches.samples if isinstance(one, Pairs)]
    assert len(found) == len(batches.samples) > 0
    return found


def rows(folder):
    untold = {"tokens_per_s", "step_s", "joules_per_token", "tokens_per_s_mw", "watts_change_10s"}
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return [{key: one for key, one in line.items() if key not in untold and not key.endswith("_watts")} for line in lines]


@pytest.fixture(scope="module")
def undisturbed(recipes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dpo") / "run"
    return folder, trained(recipes["dpo"], folder)


def test_the_preferred_answers_win(undisturbed):
    """From chance to nearly always, also for pairs that were held out; and the report has every figure."""
    found = rows(undisturbed[0])
    windows, held = ([row for row in found if ("loss" in row) == told] for told in (True, False))
    assert windows[0]["accuracy"] < 0.75
    assert windows[-1]["accuracy"] >= 0.85
    assert windows[-1]["margin"] == pytest.approx(windows[-1]["reward_chosen"] - windows[-1]["reward_rejected"])
    assert windows[-1]["margin"] > 0.1 > windows[0]["margin"]
    assert held[-1]["val_accuracy"] >= 0.85
    assert held[-1]["val_loss"] < 0.65 < held[0]["val_loss"] + 0.1
    assert held[-1]["val_targets"] < windows[-1]["tokens"]  # pairs, and not tokens


def test_a_validation_that_looks_ahead_has_all_targets(recipes, tmp_path):
    """A run reads what it validates on twice where KTO asks for it."""
    trained(recipes["kto"], tmp_path / "run", "train.steps=2")
    held = next(row for row in rows(tmp_path / "run") if "val_loss" in row)
    made = planned(recipes["kto"])
    whole = Validation(build.build(made.data, made.tokenizer), sequence=160, packing="document", microbatch=4, form="single")
    assert held["val_targets"] == sum(int(objectives.targets(made.objective, part)) for part in whole) > 0
    assert 0 < held["val_loss"] < 1


# ---- One step on any mesh ----


def stepped(rank, recipe, ranks, overrides, steps=3):
    """`(losses, figures, norms, sums of the weights)` of some steps from the start, and what is said of held-out pairs."""
    made = planned(recipe, *overrides, ranks=ranks)
    mesh = Mesh(made.mesh, rank)
    engine = engines.make(made, mesh, torch.device("cpu"), fresh=True)
    corpus = build.build(made.data, made.tokenizer)
    reader, readers = mesh.data
    batches = Batches(
        corpus, sequence=made.sequence, packing=made.data.packing, batch=made.batch, microbatch=made.microbatch, seed=made.seed, rank=reader,
        ranks=readers, prefetch=0, form=objectives.form(made.objective),
    )  # fmt: skip
    for pairs in sources(batches):
        drawn = torch.Generator().manual_seed(5)
        pairs.reference = (
            (-20 - 5 * torch.rand(len(pairs.entries), 2, generator=drawn)).numpy() if reference.asked(made.objective) else None
        )
    found = []
    for _ in range(steps):
        batch = next(batches)
        engine.forward_backward(batch)
        update = engine.step(1.0)
        assert update.beside is not None
        said = figures.said(made.objective, update.beside.tolist(), float(update.targets))
        found.append({"loss": float(update.nats / update.targets), "norm": float(update.grad_norm), **said})
    held = engine.evaluate(batches.at(0).microbatches).tolist()
    said = figures.said(made.objective, held[2:], held[1])
    found.append({"loss": held[0] / held[1], **said})
    weights = {name: piece.tensor.double().square().sum() for name, piece in engine.state()["weights"].items() if piece.writes}
    return found, float(sum(weights.values()))


def same(one, other):
    for mine, theirs in zip(one, other, strict=True):
        assert mine.keys() == theirs.keys()
        for name, number in mine.items():
            assert number == pytest.approx(theirs[name], rel=2e-5, abs=2e-5), name


@pytest.mark.parametrize("kind", ["dpo", "kto", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("ipo", "orpo", "simpo"))])
def test_microbatches_and_recomputation_do_not_matter(recipes, kind):
    whole, weights = stepped(0, recipes[kind], 1, ())
    for overrides in (("train.microbatch=3",), ("train.microbatch=1", "train.recompute=full")):
        found, sums = stepped(0, recipes[kind], 1, overrides)
        same(found, whole)
        assert sums == pytest.approx(weights, rel=1e-6)


MESHES = {
    "fsdp": ("mesh.shard=2", "train.microbatch=2"),
    "copies": ("mesh.replicate=2", "mesh.shard=1"),
    "tensor": ("mesh.tensor=2", "mesh.shard=1"),
    "zero2": ("engine.name=deepspeed", "engine.zero=2", "train.microbatch=2"),
    "zero3": ("engine.name=deepspeed", "engine.zero=3"),
}


ORDINARY = [("fsdp", "kto"), ("zero2", "dpo"), ("tensor", "orpo")]
LONG = [("fsdp", "dpo"), ("zero2", "kto"), ("copies", "simpo"), ("zero3", "kto"), ("tensor", "kto")]


@pytest.mark.parametrize(("name", "kind"), [*ORDINARY, *(pytest.param(*one, marks=pytest.mark.long) for one in LONG)])
def test_two_processes_are_one(recipes, name, kind):
    whole, weights = stepped(0, recipes[kind], 1, ())
    both = together(2, stepped, recipes[kind], 2, MESHES[name])
    assert both[0][0] == both[1][0]
    same(both[0][0], whole)
    total = both[0][1] if name in ("copies", "tensor") and both[1][1] == 0 else both[0][1] + both[1][1]
    assert total == pytest.approx(weights, rel=1e-6)


def evaluated(rank, recipe, ranks, overrides):
    """What held-out answers give, how many microbatches they are, and the most of them that were there at one moment."""
    made = planned(recipe, *overrides, ranks=ranks)
    mesh = Mesh(made.mesh, rank)
    engine = engines.make(made, mesh, torch.device("cpu"), fresh=True)
    corpus = build.build(made.data, made.tokenizer)
    reader, readers = mesh.data
    held = Validation(
        corpus, sequence=made.sequence, packing="document", microbatch=1, rank=reader, ranks=readers, form=objectives.form(made.objective)
    )
    for pairs in held.samples:
        assert isinstance(pairs, Pairs)
        pairs.reference = -20 - np.arange(2.0 * len(pairs.entries), dtype=np.float32).reshape(-1, 2) % 7
    there, most = weakref.WeakSet(), 0

    class Counted:
        def __iter__(self):
            nonlocal most
            for part in held:
                there.add(part.tokens)
                most = max(most, len(there))
                yield part

    return engine.evaluate(Counted()).tolist(), engine.evaluate(list(held)).tolist(), len(held), most


@pytest.mark.parametrize("name", ["alone", "zero2"])
def test_a_validation_that_looks_ahead_is_not_kept_on_the_device(recipes, name):
    """KTO reads it twice, one microbatch at a time, to the numbers of one that is there whole."""
    ranks = 1 if name == "alone" else 2
    found = together(ranks, evaluated, recipes["kto"], ranks, MESHES.get(name, ()))
    for streamed, whole, count, most in found:
        assert streamed == whole
        assert streamed[1] > 0
        assert count > 4
        assert most <= 2


def test_packed_rows_are_the_pairs_themselves(recipes):
    """More pairs a row: fewer rows, and what each pair says is what it says alone."""
    made = planned(recipes["dpo"], "data.packing=packed")
    corpus = build.build(made.data, made.tokenizer)
    engine = engines.make(made, Mesh(made.mesh, 0), torch.device("cpu"), fresh=True)
    found = {}
    for packing in ("document", "packed"):
        batches = Batches(corpus, sequence=160, packing=packing, batch=4, seed=0, prefetch=0, form="pair")
        (pairs,) = sources(batches)
        assert sorted(entry for row in pairs.rows for entry in row) == list(range(len(pairs.entries)))
        splits = {"train": [pairs]}
        folder = recipes["dpo"].parent / packing
        reference.compute(
            folder, "a", "b", splits, logprobs=engine.logprobs, microbatch=4, mesh=Mesh(made.mesh, 0), advance=lambda *_: None
        )
        assert pairs.reference is not None
        found[packing] = pairs.reference
        if packing == "packed":
            assert len(pairs.rows) < 0.6 * len(pairs.entries)
            assert pairs.padding < 0.25
            assert "pairs in" in batches.packed()[0]
            batch = batches.at(0)
            assert batch.targets == sum(len(pairs.rows[sample]) for _, _, sample in batches.mixture.many(range(4)))
            engine.forward_backward(batch)
            assert torch.isfinite(engine.step(1.0).grad_norm)
    assert abs(found["document"] - found["packed"]).max() < 1e-4
    assert (found["document"] < -1).all()


# ---- Killed, resumed, and what is kept ----


def test_killed_and_resumed_it_is_the_run_it_would_have_been(recipes, undisturbed, tmp_path):
    folder = tmp_path / "run"

    def interrupted():
        real = Native.step
        steps = [0]

        def step(self, rate):
            steps[0] += 1
            if steps[0] == 13:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(self, rate)

        Native.step = step
        trained(recipes["dpo"], folder)

    child = os.fork()
    if child == 0:
        interrupted()
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    summary = trained(recipes["dpo"], folder, start="resume")
    assert summary["weights_sha256"] == undisturbed[1]["weights_sha256"]
    assert rows(folder) == rows(undisturbed[0])
    kept = [(one / "reference" / "train-0-00000.safetensors").read_bytes() for one in (folder, undisturbed[0])]
    assert kept[0] == kept[1]


def test_a_reference_that_was_changed_or_lost_is_refused(recipes, undisturbed, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed[0], folder)
    for path in (folder / "checkpoints").iterdir():  # an older step, so that there is something to do
        if path.name == max(one.name for one in (folder / "checkpoints").iterdir()):
            shutil.rmtree(path)
    (folder / "summary.json").unlink(missing_ok=True)
    part = folder / "reference" / "train-0-00000.safetensors"
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    with pytest.raises(RunError, match="not what was computed"):
        trained(recipes["dpo"], folder, start="resume")
    shutil.rmtree(folder / "reference")
    with pytest.raises(RunError, match="reference is gone"):
        trained(recipes["dpo"], folder, start="resume")


def test_a_reference_goes_on_where_it_was_interrupted(recipes, tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "PART", 16)
    made = planned(recipes["kto"])
    mesh = Mesh(made.mesh, 0)
    corpus = build.build(made.data, made.tokenizer)
    engine = engines.make(made, mesh, torch.device("cpu"), fresh=True)
    batches = Batches(corpus, sequence=160, packing="document", batch=4, seed=0, prefetch=0, form="single")
    read = sources(batches)
    calls = []

    def counted(limit):
        def logprobs(part):
            calls.append(part)
            if len(calls) > limit:
                raise KeyboardInterrupt
            return engine.logprobs(part)

        return logprobs

    def computed(folder, limit, how="b"):
        calls.clear()
        for pairs in read:
            pairs.reference = None
        options = {"logprobs": counted(limit), "microbatch": 8, "mesh": mesh, "advance": lambda *_: None}
        return reference.compute(folder, "a", how, {"train": read}, **options)

    whole = computed(tmp_path / "whole", 10**6)
    assert read[0].reference is not None
    numbers, every = read[0].reference.copy(), len(calls)
    with pytest.raises(KeyboardInterrupt):
        computed(tmp_path / "cut", 14)
    assert reference.known(tmp_path / "cut", "a", {"train": read}) is None  # not all there
    assert computed(tmp_path / "cut", 10**6) == whole
    assert len(calls) == every - 12  # three parts of two rounds, each of an answer and a foreign one, were there
    assert np.array_equal(read[0].reference, numbers)
    computed(tmp_path / "cut", 10**6, how="other numbers")
    assert len(calls) == every
    with pytest.raises(RunError, match="of another run or corpus"):
        reference.known(tmp_path / "cut", "z", {"train": read})


# ---- What is refused ----


@pytest.mark.parametrize(
    ("kind", "overrides", "says"),
    [
        ("dpo", ("data.packing=stream",), "keeps pairs whole"),
        ("kto", ("data.packing=packed",), "one a row"),
        ("dpo", ("train.dropout=0.1",), "differ from its reference by chance"),
        ("dpo", ("train.neftune=5.0",), "differ from its reference by chance"),
        ("dpo", ("loss.z_loss=1e-4",), "of the next token"),
        ("dpo", ("objective.reference=adapter",), "needs an adapter"),
        ("dpo", ("objective.kind=language",), "reads text"),
        ("dpo", ("mesh.context=2", "mesh.shard=1"), "several ranks"),
        ("dpo", ("mesh.pipeline=2", "mesh.shard=1", "train.microbatch=4"), "through its stages"),
    ],
)
def test_what_an_objective_cannot_be_combined_with_is_refused_by_name(recipes, kind, overrides, says):
    with pytest.raises(PlanError, match=says):
        planned(recipes[kind], *overrides)


def test_pairs_that_do_not_fit_are_counted_and_answers_alone_are_kto_s(recipes, tmp_path):
    with pytest.raises(DataError, match=r"\d+ are longer than train.sequence 8"):
        trained(recipes["dpo"], tmp_path / "short", "train.sequence=8")
    with pytest.raises(DataError, match="judged alone"):
        trained(recipes["kto"], tmp_path / "alone", "objective.kind=dpo")


def test_an_objective_is_what_a_run_is(recipes):
    one, other = planned(recipes["dpo"]), planned(recipes["dpo"], "objective.beta=0.2")
    assert one.identity != other.identity
    assert one.meaning != other.meaning
    assert any("objective.beta" in line for line in one.differences(other))


def test_an_adapter_is_its_own_reference(recipes, tmp_path):
    """The model without its adapters says what the starting weights said: bit for bit the same run."""
    lora = ("adapter.rank=4", "train.steps=6", "validation.every=0", "data.validation=0.0")
    for name in ("start", "adapter"):
        trained(recipes["dpo"], tmp_path / name, *lora, f"objective.reference={name}")
    assert rows(tmp_path / "start") == rows(tmp_path / "adapter")
    assert (tmp_path / "start" / "reference").is_dir()
    assert not (tmp_path / "adapter" / "reference").exists()


def test_a_plan_knows_what_a_reference_costs(recipes):
    """FLOPs of its forwards, and on a site with accelerators seconds: of every step, or of the rows once before the first."""

    def big(*overrides):
        sizes = (
            "model.architecture=llama-3.1-8b",
            "train.precision=bf16",
            "train.nproc=8",
            "train.sequence=2048",
            "train.batch=64",
            "train.microbatch=2",
            *overrides,
        )
        return plan(load.recipe(recipes["dpo"], sizes), load.site("jupiter"))

    def step_s(made):
        assert made.expected.step_s is not None, made.expected.unknown
        return made.expected.step_s.mid

    text = big("objective.kind=language", "data.sources=[{kind='jsonl', path='x', format='chat'}]")
    start, kto, simpo = big(), big("objective.kind=kto"), big("objective.kind=simpo")
    own = big("adapter.rank=8", "objective.reference=adapter")
    lora = big("adapter.rank=8")
    forward = text.flops_per_token / 3
    logits = 2 * 4096 * 128256
    assert start.flops_per_token == simpo.flops_per_token == pytest.approx(text.flops_per_token + logits)
    assert kto.flops_per_token == pytest.approx(text.flops_per_token + forward + logits)
    assert own.flops_per_token - lora.flops_per_token == pytest.approx(forward)
    assert simpo.expected.reference_s is None
    assert step_s(start) == pytest.approx(step_s(text))
    assert start.expected.reference_s is not None
    assert 0.2 < start.expected.reference_s / (start.steps * step_s(start)) < 0.4
    assert step_s(kto) > 1.2 * step_s(start)
    assert step_s(own) > 1.2 * step_s(lora)
    assert own.expected.reference_s is None


def recorded(rank, recipe, overrides):
    """As `stepped`, from buffers, as a CUDA graph's step runs; a plan for a CPU refuses it."""
    real = engines.make

    def make(made, *rest, **named):
        kept = tuple(fusion for fusion in made.fusions if fusion.name != "graph")
        return real(made.model_copy(update={"fusions": (*kept, Fusion(name="graph", on=True, why="test"))}), *rest, **named)

    engines.make = make
    try:
        return stepped(rank, recipe, 1, overrides)
    finally:
        engines.make = real


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_steps_from_buffers_and_released_gradients_keep_to_the_numbers(recipes, kind):
    plain = ("optim.clip=false", "data.validation=0.0")
    whole = stepped(0, recipes[kind], 1, plain)[0]
    assert recorded(0, recipes[kind], plain)[0] == whole
    same(stepped(0, recipes[kind], 1, (*plain, "train.release=true"))[0], whole)


@pytest.mark.skipif("GIGATRAIN_COMPILED" not in os.environ, reason="minutes of compiling; GIGATRAIN_COMPILED=1 runs it")
@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_compiled_layers_keep_to_the_numbers(recipes, kind):
    same(stepped(0, recipes[kind], 1, ("train.compile=true",))[0], stepped(0, recipes[kind], 1, ())[0])
