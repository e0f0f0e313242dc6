"""Distillation end to end: a teacher's words kept beside the corpus or said in every step, the same on every engine, resumed, and hashed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from distributed import together
from test_loop import planned, same_state, trained

from gigatrain import engines, load, teaching
from gigatrain.data import taught
from gigatrain.data.corpus import Corpus
from gigatrain.data.loader import Batches
from gigatrain.errors import DataError, PlanError, RecipeError, RunError
from gigatrain.models import autonumbers
from gigatrain.objectives.teacher import Teacher
from gigatrain.parallel.mesh import Mesh, alone
from gigatrain.planning.plan import plan

QUIET = ("export=false", "validation.every=0")


@pytest.fixture(scope="module")
def teacher(tiny, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("runs") / "teacher"
    trained(tiny, folder, "train.steps=20", "export=true", "validation.every=0", "checkpoint.every=20")
    return str(folder / "export")


@pytest.fixture(scope="module")
def learns(teacher) -> tuple[str, ...]:
    return (
        *QUIET, "model.architecture.layers=1", "objective.kind=distil", f"objective.teacher={teacher}", "objective.top_k=8", "objective.temperature=2.0",
        "train.sequence=48",
    )  # fmt: skip


@pytest.fixture(scope="module")
def kept(tiny, learns) -> Path:
    (said,) = teaching.taught(str(tiny), learns, None)
    assert "the 8 likeliest tokens of" in said
    return Path(said.split(": the")[0])


def test_words_that_are_kept_are_those_that_are_said(tiny, learns, kept, tmp_path):
    one, other, plain = (tmp_path / name for name in ("kept", "online", "plain"))
    found = trained(tiny, one, *learns)
    said = trained(tiny, other, *learns, "objective.online=true")
    assert found["loss"] == pytest.approx(said["loss"], rel=1e-4)  # words are kept in fp16
    assert found["val_loss"] == pytest.approx(said["val_loss"], rel=1e-4)
    rows = [[json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (one, other)]
    kls = [[row["kl"] for row in some if "kl" in row] for some in rows]
    assert kls[0] == pytest.approx(kls[1], rel=1e-2)
    assert kls[0][-1] < kls[0][0]
    assert found["tokens"] == 12 * 4 * 48
    language = [override for override in learns if not override.startswith("objective")]
    assert trained(tiny, plain, *language)["loss"] != pytest.approx(found["loss"], rel=1e-4)


def test_a_resume_is_the_run_that_was_not_disturbed(tiny, learns, kept, tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    trained(tiny, whole, *learns)
    shutil.copytree(whole, folder)
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "step-00000012")
    trained(tiny, folder, *learns, start="resume")
    same_state(folder, whole)


def test_what_was_kept_is_checked(tiny, learns, kept, tmp_path):
    part = next(kept.glob("train-*"))
    before = part.read_bytes()
    damaged = bytearray(before)
    damaged[-3] ^= 1
    part.write_bytes(damaged)
    with pytest.raises(DataError, match=r"train-0-00000.safetensors is missing or not what was taught"):
        trained(tiny, tmp_path / "one", *learns)
    part.unlink()
    index = (kept / "index.json").read_text()
    list(teaching.taught(str(tiny), learns, None))  # goes on at the part that is missing
    assert part.read_bytes() == before
    assert (kept / "index.json").read_text() == index
    with pytest.raises(DataError, match=r"no teacher's words lie beside .* top_k 9.*gigatrain data teach"):
        trained(tiny, tmp_path / "two", *learns, "objective.top_k=9")
    (kept / "index.json").write_text(index.replace('"top_k": 8', '"top_k": 7'))
    with pytest.raises(DataError, match="index.json is damaged"):
        trained(tiny, tmp_path / "three", *learns)
    (kept / "index.json").write_text(index)


def test_ranks_share_what_is_checked(tiny, learns, kept):
    parts = sorted(kept.glob("train-*"))
    assert len(parts) > 3
    before = parts[3].read_bytes()
    damaged = bytearray(before)
    damaged[-3] ^= 1
    parts[3].write_bytes(damaged)
    corpus, objective, refused, alive = Corpus.open(kept.parent), load.recipe(tiny, learns).objective, [], []
    for rank in range(3):
        try:
            taught.Taught(corpus, objective, 48, "stream", check=True, rank=rank, ranks=3, alive=lambda rank=rank: alive.append(rank))
        except DataError as error:
            refused.append((rank, parts[3].name in str(error)))
    parts[3].write_bytes(before)
    assert refused == [(0, True)]  # 3 is the second of the first rank's
    assert [alive.count(rank) for rank in range(3)] == [1, *(len(range(rank, len(parts), 3)) for rank in (1, 2))]


def stepped(rank, recipe, overrides, ranks, folder):
    made = plan(load.recipe(recipe, overrides), load.site("laptop"), ranks)
    mesh = Mesh(made.mesh, rank) if ranks > 1 else alone()
    engine = engines.make(made, mesh, torch.device("cpu"), fresh=True)
    corpus = Corpus.open(Path(folder))
    reader, readers = mesh.data
    batches = Batches(
        corpus, sequence=48, packing="stream", batch=4, microbatch=made.microbatch, seed=0, rank=reader, ranks=readers, prefetch=0
    )
    if made.objective.online:
        batches.teacher = Teacher(
            made.objective, vocab=320, tokenizer=corpus.tokenizer(), compute=torch.float32, device=torch.device("cpu")
        )
    else:
        batches.taught = {48: taught.Taught(corpus, made.objective, 48, "stream", check=False)}
    numbers = []
    for _ in range(3):
        engine.forward_backward(next(batches))
        update = engine.step(1.0)
        numbers.append(
            (update.nats.item() / update.targets.item(), update.grad_norm.item(), [] if update.beside is None else update.beside[1].item())
        )
    return numbers


@pytest.mark.parametrize(
    "how",
    [
        ("engine.name=native",),
        ("engine.name=native", "mesh.context=2"),
        ("engine.name=native", "objective.online=true", "train.microbatch=1"),
        pytest.param(("engine.name=deepspeed", "engine.zero=2"), marks=pytest.mark.long),
        pytest.param(("engine.name=deepspeed", "engine.zero=3"), marks=pytest.mark.long),
    ],
)
def test_every_engine_learns_the_same(tiny, learns, kept, how):
    first = stepped(0, tiny, learns, 1, kept.parent)
    close = 2e-3 if "objective.online=true" in how else 2e-5  # words that are kept are fp16
    for numbers in together(2, stepped, tiny, (*learns, *how), 2, str(kept.parent)):
        assert numbers == [pytest.approx(one, rel=close) for one in first]


def test_phases_are_taught_each_at_its_length(tiny, learns, tmp_path):
    recipe = tmp_path / "phased.toml"
    recipe.write_text(tiny.read_text().replace("steps = 12\n", ""))
    phased = (*learns, "train.phases=[{steps=2},{steps=2,sequence=64,batch=2}]")
    assert len(list(teaching.taught(str(recipe), phased, None))) == 2
    assert trained(recipe, tmp_path / "run", *phased)["steps"] == 4


@pytest.mark.long
def test_a_phase_of_another_length_may_be_added(tiny, learns, tmp_path):
    """Words of lengths that the run has not come to are none of its past; those that it learnt from are."""
    recipe, one, two = tmp_path / "phased.toml", "train.phases=[{steps=2}]", "train.phases=[{steps=2},{steps=2,sequence=56,batch=2}]"
    recipe.write_text(tiny.read_text().replace("steps = 12\n", ""))
    list(teaching.taught(str(recipe), (*learns, one), None))
    trained(recipe, tmp_path / "run", *learns, one)
    with pytest.raises(DataError, match="no teacher's words lie beside .* sequence 56.*gigatrain data teach"):
        trained(recipe, tmp_path / "run", *learns, two, start="other-numbers")
    list(teaching.taught(str(recipe), (*learns, two), None))
    assert trained(recipe, tmp_path / "run", *learns, two, start="other-numbers")["steps"] == 4


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("mesh.tensor=2",), 'mesh.tensor 2 cannot be used with objective.kind "distil"'),
        (("mesh.pipeline=2", "model.architecture.layers=2", "train.microbatch=1"), "mesh.pipeline 2 cannot be used"),
        (("mesh.context=2", "objective.online=true"), "gigatrain data teach"),
        (("loss.z_loss=1e-4",), "loss.z_loss 0.0001 is not added"),
    ],
)
def test_what_cannot_be_is_refused(tiny, learns, overrides, said):
    with pytest.raises(PlanError, match=said):
        planned(tiny, *learns, *overrides)


def test_a_student_of_transformers_own_code_is_refused(tiny, learns, tmp_path):
    transformers.GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=64).save_pretrained(tmp_path)
    text = tiny.read_text()
    start, end = text.index("[model.architecture]"), text.index("[tokenizer.train]")
    (tmp_path / "own.toml").write_text(text[:start] + f'[model]\nfrom = "{tmp_path}"\nfresh = true\n' + text[end:])
    overrides = [one for one in learns if not one.startswith("model.")] + ["data.packing=document"]
    with pytest.raises(PlanError, match="GPT2LMHeadModel is transformers' own code; choose a student of one of our families"):
        plan(load.recipe(tmp_path / "own.toml", overrides), load.site("laptop"), 1, measure=autonumbers.numbers)


@pytest.mark.parametrize("online", [True, False])
def test_a_teacher_of_another_tokenizer_is_refused(tiny, learns, kept, teacher, tmp_path, online):
    """Of as many tokens: two exchanged, or none said. One that knows more tokens, as an instruct model beside its base, teaches."""

    def learn(changed):
        overrides = (*learns, f"objective.teacher={changed}", "train.steps=2")
        if online:
            return trained(tiny, tmp_path / changed.name / "run", *overrides, "objective.online=true")
        return list(teaching.taught(str(tiny), overrides, None))

    def copied(name, act):
        shutil.copytree(teacher, tmp_path / name)
        path = tmp_path / name / "tokenizer.json"
        found = json.loads(path.read_text())
        act(found)
        path.write_text(json.dumps(found))
        return tmp_path / name

    def exchange(found):
        vocab = found["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]

    def know_more(found):
        found["added_tokens"].append(found["added_tokens"][0] | {"id": 320, "content": "<|more|>"})

    with pytest.raises(
        RunError, match=r"2 of 320 tokens have other ids in .*tokenizer.json: \d+ is 'a' here, and 'b' there. .* set tokenizer.from"
    ):
        learn(copied("other", exchange))
    none = copied("none", exchange)
    (none / "tokenizer.json").unlink()
    with pytest.raises(RunError, match=r"has no tokenizer.json, so that nothing says whether its ids mean the same tokens; copy the one"):
        learn(none)
    learn(copied("more", know_more))


def test_contradictions_are_refused(tiny, teacher, tmp_path):
    for overrides in (("objective.kind=distil",), ("objective.top_k=4",), ("objective.teacher=x",)):
        with pytest.raises(RecipeError):
            load.recipe(tiny, overrides)
    with pytest.raises(RunError, match="learns from no teacher; name one with --teacher"):
        list(teaching.taught(str(tiny), (), None))
    with pytest.raises(RunError, match="top_k 400 is above the 320 tokens"):
        list(teaching.taught(str(tiny), ("objective.top_k=400",), teacher))


def test_a_plan_knows_its_teacher(tiny, learns, teacher):
    kept_, online = planned(tiny, *learns), planned(tiny, *learns, "objective.online=true")
    assert online.memory.weights - kept_.memory.weights == 4 * planned(tiny).parameters
    assert "teacher's forward" in online.expected.unknown["step_s"]
    assert kept_.meaning != planned(tiny, *learns, "objective.weight=0.9").meaning
