"""Evaluations end to end: a run that validates on several sets, its export, its card, tasks of our own in lm-eval, bits per byte, and talking to it."""

import io
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tinychat
import torch
import transformers
import yaml
from rich.console import Console

from gigatrain import cli, config, evaluate, load, loop
from gigatrain.data import tokenizer
from gigatrain.data.corpus import Corpus
from gigatrain.errors import RecipeError, RunError
from gigatrain.evaluate import tasks as harness
from gigatrain.evaluate import texts
from gigatrain.export import export
from gigatrain.exporting import readers
from gigatrain.exporting.card import card as of_run
from gigatrain.exporting.generation import ends_of_turn, generation_config
from gigatrain.generate import conversation, generate
from gigatrain.models import hf
from gigatrain.models.decoder import Decoder
from gigatrain.observe import evals
from gigatrain.observe.display import Display
from gigatrain.observe.report.collect import collect
from gigatrain.observe.report.page import page
from gigatrain.planning.plan import plan

BROKEN = (
    "task: gt_broken\noutput_type: multiple_choice\ndataset_path: json\ndataset_kwargs:\n  data_files: nowhere.jsonl\ntest_split: test\n"
)
TASKS = Path(__file__).parent / "evaltasks"
PROSE = ("The rain fell all day.\n", "Été à Zürich: 25 °C, 日本.\n")
SETS = """
[[validation.sets]]
name = "prose"
kind = "text"
path = "{prose}"
[[validation.sets]]
name = "more-chats"
kind = "jsonl"
path = "{chats}"
format = "chat"
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of six steps on conversations, which validates on those held out and on two further sets."""
    folder = tmp_path_factory.mktemp("eval")
    recipe = tinychat.recipe(folder)
    (folder / "prose").mkdir()
    for number, text in enumerate(PROSE):
        (folder / "prose" / f"{number}.txt").write_text(text, encoding="utf-8")
    more = tinychat.chats(10, seed=7)
    (folder / "more.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in more))
    text = recipe.read_text() + SETS.format(prose=folder / "prose", chats=folder / "more.jsonl")
    recipe.write_text(text + "[validation]\nevery = 3\n" if "[validation]\n" not in text else text)
    made = plan(load.recipe(recipe, ["report.trackers=[]", "report.every=2", "checkpoint.every=3"]), load.site("laptop"))
    loop.train(made, folder / "run", display=Display(Console(file=io.StringIO(), force_terminal=False)))
    return folder / "run"


def validations(run):
    return [row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "val_loss" in row]


def test_each_set_has_its_own_figures_and_the_unnamed_ones_are_those_of_the_held_out(run):
    found = validations(run)
    assert [row["step"] for row in found] == [3, 6]
    last = found[-1]
    assert list(last["val_sets"]) == ["held-out", "prose", "more-chats"]
    held = last["val_sets"]["held-out"]
    assert [held[key] for key in ("loss", "targets", "perplexity")] == [last[f"val_{key}"] for key in ("loss", "targets", "perplexity")]
    for one in last["val_sets"].values():
        assert one["perplexity"] == pytest.approx(math.exp(one["loss"]))
        assert one["bits_per_byte"] > 0
    prose, ready = last["val_sets"]["prose"], tokenizer.load(str(run / "tokenizer"))
    # Whole texts, of which packing leaves out the first token, that nothing precedes; the token that ends a text has no bytes.
    sizes = ready.token_bytes()
    assert sizes is not None
    size = sum(len(text.encode()) - sizes[ready.encode(text)[0]] for text in PROSE)
    assert prose["bits_per_byte"] == pytest.approx(prose["loss"] * prose["targets"] / math.log(2) / size)
    value = collect(run)
    assert [(one["name"], one["loss"]) for one in value["sets"]] == [(name, one["loss"]) for name, one in last["val_sets"].items()]
    assert all(len(one["curve"]) == 2 for one in value["sets"])
    assert "more-chats" in page([value])


def test_sets_are_tokenised_ahead(run, capsys):
    cli.main(["data", "build", str(run.parent / "tinychat.toml")])
    said = capsys.readouterr().out
    assert "validation set prose: " in said
    assert "2 documents" in said


def test_bytes_of_ids_are_those_of_the_text_they_stand_for(run):
    ready = tokenizer.load(str(run / "tokenizer"))
    sizes = ready.token_bytes()
    assert sizes is not None
    for text in (*PROSE, "x = [1, 2]\n\n\t# ∑ <|endoftext|>"):
        assert sizes[ready.encode(text)].sum() == len(text.encode())
    assert sizes[ready.eos] == 0
    content = json.loads((run / "tokenizer" / "tokenizer.json").read_text())
    backend = type(ready.backend).from_str(json.dumps(content | {"normalizer": {"type": "NFKC"}}))
    assert tokenizer.Tokenizer(backend, ready.file, ready.vocab, ready.bos, ready.eos, "").token_bytes() is None  # it changes texts


def test_two_sets_of_one_name_are_refused():
    recipe = load.recipe("quickstart")
    with pytest.raises(ValueError, match="two of `sets` are called 'a'"):
        type(recipe.validation).model_validate({"sets": ({"name": "a", "kind": "stdlib"},) * 2})
    with pytest.raises(RecipeError):
        load.recipe("quickstart", ['validation.sets=[{name="a",kind="stdlib",unknown=1}]'])


def test_the_export_says_where_an_answer_ends_and_its_template_works(run):
    told = json.loads((run / "export" / "generation_config.json").read_text())
    ours = tokenizer.load(str(run / "export"))
    end = ours.backend.token_to_id("<|im_end|>")
    assert told["eos_token_id"] == [ours.eos, end]
    assert (told["do_sample"], told["temperature"], told["top_k"]) == (True, 0.8, 50)
    theirs = transformers.AutoTokenizer.from_pretrained(run / "export")
    text = theirs.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>assistant\n")
    assert transformers.GenerationConfig.from_pretrained(run / "export").eos_token_id == [ours.eos, end]


def test_ends_and_draws_of_other_recipes(run, tmp_path):
    sample = load.recipe("quickstart").sample
    assert generation_config({"bos": 1, "eos": 2, "pad": None}, [], sample, None)["eos_token_id"] == 2
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 9]}')
    greedy = sample.model_copy(update={"temperature": 0.0})
    assert generation_config({"bos": 1, "eos": 2}, [7], greedy, tmp_path) == {
        "bos_token_id": 1,
        "do_sample": False,
        "eos_token_id": [2, 7, 9],
    }
    # What the base says of its answers stays, but for what the recipe sets.
    ids = {"bos_token_id": 4, "pad_token_id": 5, "eos_token_id": 9, "transformers_version": "4.1"}
    own = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.1}
    (tmp_path / "generation_config.json").write_text(json.dumps(ids | own))
    unsaid = config.Sample(prompt="def")
    expected = {"bos_token_id": 1, "eos_token_id": [2, 9]}
    assert generation_config({"bos": 1, "eos": 2}, [], unsaid, tmp_path) == expected | own
    warmer = unsaid.model_copy(update={"temperature": 1.2})
    assert generation_config({"bos": 1, "eos": 2}, [], warmer, tmp_path) == expected | own | {"temperature": 1.2}
    fewer = unsaid.model_copy(update={"top_k": 0})
    assert generation_config({"bos": 1, "eos": 2}, [], fewer, tmp_path) == expected | own | {"top_k": 0}
    assert generation_config({"bos": 1, "eos": 2}, [], greedy, tmp_path) == expected | {"do_sample": False, "repetition_penalty": 1.1}
    (tmp_path / "generation_config.json").write_text("[")
    assert generation_config({"eos": 2}, [], unsaid, tmp_path) == {"eos_token_id": 2, "do_sample": True, "temperature": 0.8, "top_k": 50}
    shutil.copytree(run / "tokenizer", tmp_path / "bare")
    (tmp_path / "bare" / "chat_template.jinja").write_text("{% for m in messages %}{{ raise_exception('no talk') }}{% endfor %}")
    assert ends_of_turn(tmp_path / "bare") == ([], "the chat template does not take a question and its answer: no talk")
    (tmp_path / "bare" / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    assert ends_of_turn(tmp_path / "bare")[1] == "the chat template puts no token of its own behind an answer"


def test_a_fine_tuned_model_draws_as_its_base_did_and_says_whose_adapter_it_is(run, tmp_path, monkeypatch):
    """Of the run's own export, whose file is changed as a maker's; named by a path that holds only where the training ran."""
    shutil.copytree(run / "export", tmp_path / "base")
    path = tmp_path / "base" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.1}))
    monkeypatch.chdir(tmp_path)
    overrides = ["model.from=base", "adapter.rank=2", "train.steps=1", "export=false", "report.trackers=[]", "validation.sets=[]"]
    made = plan(load.recipe(run.parent / "tinychat.toml", overrides), load.site("laptop"))
    loop.train(made, tmp_path / "run", display=Display(Console(file=io.StringIO(), force_terminal=False)))
    export(tmp_path / "run", tmp_path / "merged")
    export(tmp_path / "run", tmp_path / "adapter", adapter=True)
    kept = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert [kept[key] for key in ("temperature", "top_p", "top_k", "repetition_penalty")] == [0.6, 0.95, 20, 1.1]
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(
        transformers.GenerationMixin, "_sample", lambda self, ids, generation_config, **_: drawn.update(generation_config.to_dict()) or ids
    )
    generate(tmp_path / "merged", "It", tokens=1)
    assert (drawn["do_sample"], drawn["temperature"], drawn["top_p"], drawn["top_k"]) == (True, 0.6, 0.95, 20)
    generate(tmp_path / "merged", "It", tokens=1, top_k=3)
    assert (drawn["temperature"], drawn["top_k"]) == (0.6, 3)
    named = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(tmp_path / "base")
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert f"is where that lay, `{tmp_path / 'base'}`: name its place on the hub before you publish." in card
    shutil.copytree(tmp_path / "base", tmp_path / "mine" / "export")
    made = made.model_copy(update={"source": str(tmp_path / "mine" / "export")})
    assert "It started from `mine/export`; the licence of that model: unknown" in of_run(tmp_path / "run", made, step=1, chat=True)
    assert "is where that lay" not in (tmp_path / "merged" / "README.md").read_text()


def test_greedy_answers_are_those_of_our_decoder(run, capsys):
    """In the chat template, and token by token those of the model that trained."""
    messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": "What is 2 + 3?"}]
    theirs = transformers.AutoTokenizer.from_pretrained(run / "export")
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    made = load.read_json(type(plan(load.recipe("quickstart"), load.site("laptop"))), (run / "plan.json").read_text(), "plan", RunError)
    ours = Decoder(made.decoder)
    hf.load_weights(ours, run / "export")
    ends, tokens = json.loads((run / "export" / "generation_config.json").read_text())["eos_token_id"], list(ids)
    for _ in range(12):
        tokens.append(int(ours.logits(torch.tensor([tokens]))[0, -1].argmax()))
        if tokens[-1] in ends:
            break
    expected = theirs.decode(tokens[len(ids) :], skip_special_tokens=True)
    assert generate(run, None, messages=messages, tokens=12, temperature=0.0) == expected
    talk = run.parent / "talk.json"
    talk.write_text(json.dumps({"messages": messages}))
    cli.main(["generate", str(run), "--messages", str(talk), "--tokens", "12", "--temperature", "0", "--json"])
    assert json.loads(capsys.readouterr().out) == {"messages": messages, "text": expected}
    cli.main(["generate", str(run), "--chat", "--prompt", "What is 2 + 3?", "--tokens", "12", "--temperature", "0"])
    alone = [{"role": "user", "content": "What is 2 + 3?"}]
    streamed = generate(run, None, messages=alone, tokens=12, temperature=0.0, stream=True)
    assert capsys.readouterr().out.rstrip("\n") == "\n".join([streamed, streamed]).rstrip("\n")


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("{", "not JSON"),
        ("[]", "no list of"),
        ('[{"role": "user"}, {"role": "robot", "content": "x"}]', "message 1 is"),
        ('[{"role": "user", "content": 3}]', "message 0 is"),
    ],
)
def test_conversations_that_are_none_are_refused(said, why):
    with pytest.raises(RunError, match=why):
        conversation(said)


def test_a_model_without_a_template_is_not_talked_with(run, tmp_path, capsys):
    shutil.copytree(run / "export", tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    with pytest.raises(SystemExit, match="7"):
        cli.main(["generate", str(tmp_path / "model"), "--chat", "--prompt", "Hi"])
    assert "has no chat template" in capsys.readouterr().err
    for arguments in (["--chat"], ["--prompt", "a", "--messages", "b"]):
        with pytest.raises(SystemExit, match="7"):
            cli.main(["generate", str(tmp_path / "model"), *arguments])


# The card.


def front_matter(text):
    assert text.startswith("---\n")
    return yaml.safe_load(text[4:].partition("\n---\n")[0])


def test_the_card_is_of_the_run(run):
    text = (run / "export" / "README.md").read_text()
    front = front_matter(text)
    assert front["library_name"] == "transformers"
    assert front["tags"] == ["gigatrain"]
    assert "license" not in front  # drawn anew: none follows
    from huggingface_hub import ModelCard

    assert ModelCard(text).data.to_dict()["pipeline_tag"] == "text-generation"
    value, last = collect(run), validations(run)[-1]
    for said in (value["run"]["plan_sha256"], value["run"]["id"], f"{last['val_loss']:.4f}", "more-chats", "apply_chat_template"):
        assert said in text
    assert f"| {value['headline']['tokens']['value']:,} | " in text
    assert "| energy | not measured |" in text or "kWh" in text
    data = json.loads((run / "data.json").read_text())
    corpus = next(
        Corpus.open(path.parent)
        for path in (run.parent / "cache").glob("*/manifest.json")
        if json.loads(path.read_text())["sha256"] == data["sha256"]
    )
    assert f"{corpus.totals('train')['tokens']:,} tokens in all" in text
    totals = corpus.manifest["sources"][0]["splits"]["train"]
    share = f"{totals['trained']:,} of {totals['tokens']:,} tokens ({100 * totals['trained'] / totals['tokens']:.3g} %) have a loss"
    assert 0 < totals["trained"] < totals["tokens"]
    assert f"It was trained on the assistant's turns of conversations. {share}; the others are only read." in text
    assert "next token of its documents" not in text
    done = value["headline"]["tokens"]["value"]
    assert f"of which those with a loss were read {done / totals['trained']:.2f} times" in text
    code = text.partition("```python\n")[2].partition("```")[0]
    names = {}
    exec(code.replace('"."', repr(str(run / "export"))).replace("max_new_tokens=100", "max_new_tokens=2"), names)  # noqa: S102 (what a reader would run)
    assert f"{names['model'].num_parameters():,} parameters" in text


def test_a_card_names_the_base_its_licence_and_measured_energy(run, tmp_path, monkeypatch):
    from gigatrain import run as runs
    from gigatrain.exporting import card

    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: apache-2.0\ntags:\n- x\n---\n# Base\n")
    (base / "config.json").write_text('{"_name_or_path": "someone/base-7b"}')
    made = runs.stored_plan(run).model_copy(update={"source": str(base)})
    value = collect(run)
    value["headline"] |= {
        "mwh": {"value": 0.0123, "boundary": "facility", "provenance": {"measured": 0.8, "declared": 0.2}},
        "kg_co2e": {"value": 2.5},
        "eur": {"value": 1.25},
    }
    value["energy"] = {"sources": [{"what": "carbon_g_kwh", "value": 203, "basis": "declared", "source": "the operator | 2025"}]}
    monkeypatch.setattr(card, "collect", lambda folder: value)
    text = card.card(run, made, step=6, chat=True)
    front = front_matter(text)
    assert (front["license"], front["base_model"]) == ("apache-2.0", ["someone/base-7b"])
    assert front["co2_eq_emissions"]["emissions"] == 2500
    assert front["co2_eq_emissions"]["training_type"] == "fine-tuning"
    assert "| energy | 12.3 kWh | at the boundary “facility”; " in text
    assert "2.5 kg CO2e | the facility's energy times 203 g CO2e/kWh (declared: the operator \\| 2025) |" in text
    assert "someone/base-7b](https://huggingface.co/someone/base-7b); the licence of that model: `apache-2.0`" in text


@pytest.mark.parametrize(
    ("objective", "formats", "expected"),
    [
        ({}, ["text"], "the next token of its documents."),
        ({}, ["chat", "completion"], "the assistant's turns of conversations and the completions of prompts. "),
        (
            {"kind": "dpo"},
            ["preference"],
            "pairs of a preferred and a refused answer, by DPO, strength 0.1, against the weights it started from.",
        ),
        ({"kind": "simpo"}, ["preference"], "pairs of a preferred and a refused answer, by SIMPO, strength 2."),
        (
            {"kind": "kto", "reference": "adapter"},
            ["preference"],
            "single answers that are good or not, by KTO, strength 0.1, against the model without its adapter.",
        ),
        (
            {"kind": "distil", "teacher": "mistralai/Big", "temperature": 2.0},
            ["text"],
            "the probabilities of a teacher, [mistralai/Big](https://huggingface.co/mistralai/Big) (50 % of the loss, at temperature 2; the rest is cross "
            "entropy, of the next token of its documents), whose licence may bind what is made with it.",
        ),
    ],
)
def test_the_card_says_what_was_learned_of_what(run, tmp_path, objective, formats, expected):
    from gigatrain import run as runs
    from gigatrain.exporting import card

    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "export"))
    record = json.loads((tmp_path / "run" / "data.json").read_text())
    if formats == ["text"]:  # of which no corpus keeps marks
        for one in record["sources"]:
            one["train"].pop("trained", None)
    (tmp_path / "run" / "data.json").write_text(json.dumps(record))
    made = runs.stored_plan(run)
    several = tuple(made.data.sources[0].model_copy(update={"format": one}) for one in formats)
    changes = {"objective": config.Objective(**objective), "data": made.data.model_copy(update={"sources": several})}
    text = card.card(tmp_path / "run", made.model_copy(update=changes), step=6, chat=True)
    assert f" It was trained on {expected}" in text
    assert ("| loss, nats an answer or pair | " in text) == changes["objective"].pairs
    assert (" have a loss; the others are only read." in text) == (formats[0] == "chat")


def _hub(home, name):
    """A snapshot as the hub's own client keeps it, with a card and without weights."""
    folder = home / "hub" / f"models--{name.replace('/', '--')}"
    place = folder / "snapshots" / ("0" * 40)
    place.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    return place


def test_a_card_knows_the_licence_of_a_base_of_the_hub(run, tmp_path, monkeypatch):
    """As its card says, which is fetched with its weights; else as the shipped recipes do."""
    from huggingface_hub import constants

    from gigatrain import run as runs
    from gigatrain.exporting import card

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def made(name):
        return card.card(run, runs.stored_plan(run).model_copy(update={"source": name}), step=6, chat=True)

    text = made("meta-llama/Llama-3.1-8B-Instruct")
    assert front_matter(text)["license"] == "llama3.1"
    assert "the licence of that model: `llama3.1` (by gigatrain's recipes of llama-3.1-8b; its card on the hub has the last word)." in text
    named = front_matter(made("deepseek-ai/DeepSeek-V3"))
    assert (named["license"], named["license_name"]) == ("other", "DeepSeek Model License")
    text = made("someone/unheard-of")
    assert "license" not in front_matter(text)
    assert "unknown: no card beside its weights names one" in text
    place = _hub(tmp_path, "someone/unheard-of")
    (place / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    assert hf.kept("someone/unheard-of") == place
    assert front_matter(made("someone/unheard-of"))["license"] == "cc-by-4.0"
    assert hf.kept("../nowhere") is None
    fetched: dict[str, Any] = {}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **how: fetched.update(how) or str(place))
    hf.locate("someone/unheard-of")
    assert "README.md" in fetched["allow_patterns"]


def test_every_shipped_licence_has_its_name_on_the_hub():
    from gigatrain import catalog
    from gigatrain.exporting import card

    root = load.shipped("recipes")
    called = {catalog.facts(root, model).licence for model in catalog.models(root)}
    assert set(card.IDENTIFIERS) <= called
    assert called - set(card.IDENTIFIERS) == {"CC BY-SA 4.0, Gemma Terms", "DeepSeek Model License"}  # "other", by their names


# lm-eval.


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    """Tasks of our own, beside their data."""
    pytest.importorskip("lm_eval")
    folder = tmp_path_factory.mktemp("tasks") / "tasks"
    shutil.copytree(TASKS, folder)
    for path in folder.glob("*.yaml"):
        path.write_text(path.read_text().replace("DATA", str(folder)))
    return folder


def test_tasks_of_ones_own_are_evaluated_kept_and_shown(run, own, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    names = "gt_both,gt_copying,gt_prose"
    arguments = ["--include", str(own), "--batch", "4", "--limit", "4", "--few-shot", "1", "--out", str(tmp_path / "out.json"), "--json"]
    cli.main(["eval", str(run), "--tasks", names, *arguments, "--bits-per-byte", str(own / "prose.jsonl")])
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "out.json").read_text()) == evals.read(run)[-1]
    rows = found["tasks"]
    assert (found["step"], found["run"]) == (6, collect(run)["run"]["id"])
    assert set(rows) == {*names.split(","), "gt_capitals", "gt_capitals_again"}
    group = rows["gt_both"]
    assert (group["samples"], group["limit"]) == (8, 4)
    each = [rows[name]["metrics"]["acc,none"]["value"] for name in ("gt_capitals", "gt_capitals_again")]
    assert group["metrics"]["acc,none"]["value"] == pytest.approx(sum(each) / 2)
    assert rows["gt_capitals"] | {"metrics": None} == {"metrics": None, "samples": 4, "limit": 4, "few_shot": 1, "version": "1.0"}
    assert set(rows["gt_capitals"]["metrics"]) == {"acc,none", "acc_norm,none"}
    assert rows["gt_prose"]["limit"] is None  # it has but two
    theirs = transformers.AutoTokenizer.from_pretrained(run / "export")
    model = transformers.AutoModelForCausalLM.from_pretrained(run / "export")
    harness_bits, bits = rows["gt_prose"]["metrics"]["bits_per_byte,none"]["value"], found["texts"][0]
    # The harness counts the bos that this tokenizer puts before a text as a token of it.
    assert bits["bytes"] == sum(len(json.loads(line)["text"].encode()) for line in (own / "prose.jsonl").read_text().splitlines())
    assert harness_bits > bits["bits_per_byte"]
    shifted = sum(
        texts._nats(
            model,
            [theirs.bos_token_id, theirs.bos_token_id, *theirs(json.loads(line)["text"], add_special_tokens=False)["input_ids"]],
            128,
            1,
        )
        for line in (own / "prose.jsonl").read_text().splitlines()
    )
    assert harness_bits == pytest.approx(shifted / math.log(2) / bits["bytes"], rel=1e-5)
    value = collect(run)
    assert {one["task"] for one in value["evals"]["tasks"]} == set(rows)
    assert "gt_capitals" in page([value])
    export(run, tmp_path / "model")
    text = (tmp_path / "model" / "README.md").read_text()
    assert r"gt\_capitals | acc | " in text
    results = front_matter(text)["model-index"][0]["results"]
    assert {one["dataset"]["name"] for one in results} == set(rows)
    from huggingface_hub import ModelCard

    data: Any = ModelCard(text).data
    assert {one.task_type for one in data.eval_results} == {"text-generation"}


def test_what_cannot_be_evaluated_is_named(run, own, tmp_path):
    with pytest.raises(RunError, match="task 'gt_hub' needs data from the hub"):
        harness.chosen(["gt_hub"], [own])
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.yaml").write_text(BROKEN)
    with pytest.raises(RunError, match="task 'gt_broken' cannot be loaded"):
        harness.chosen(["gt_broken"], [broken])
    with pytest.raises(RunError, match="is no folder"):
        harness.chosen(["a"], [tmp_path / "nowhere"])
    absent = ModuleNotFoundError("No module named 'langdetect'", name="langdetect")
    assert "needs the package langdetect, which is not installed here; pip install langdetect" in harness._unloaded("ifeval", absent)


def test_without_lm_eval_the_way_out_is_said(run, tmp_path):
    """In a process that has no lm-eval."""
    code = (
        "import sys, importlib.metadata as m; real = m.version\n"
        "def version(name):\n    if name == 'lm_eval': raise m.PackageNotFoundError(name)\n    return real(name)\n"
        "m.version = version\nfrom gigatrain import cli; cli.main(sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "eval", str(run), "--tasks", "x"],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        env=dict(os.environ),
    )
    assert done.returncode == 7
    assert "pip install 'gigatrain[eval]'" in done.stderr
    assert "Traceback" not in done.stderr
    with pytest.raises(RunError, match="nothing to evaluate"):
        evaluate.evaluate(run)
    with pytest.raises(RunError, match="there is no folder"):
        evaluate.evaluate(run, texts=[run / "plan.json"], out=tmp_path / "no" / "where.json")


# Bits per byte.


@pytest.mark.parametrize("tokens", [2, 5, 8, 9, 10, 17, 64])
@pytest.mark.parametrize("length", [2, 3, 8])
def test_windows_predict_each_token_once_with_at_least_half_a_context(tokens, length):
    seen = []
    for begin, stop, first in texts.windows(tokens, length):
        assert 0 <= begin < stop <= tokens
        assert stop - 1 - begin <= length
        assert first - begin >= min(first, length // 2)
        seen += range(first, stop)
    assert seen == list(range(1, tokens))


def test_bits_per_byte_are_the_sum_of_log_probabilities_over_bytes_in_any_batch(run):
    model = transformers.AutoModelForCausalLM.from_pretrained(run / "export")
    theirs = transformers.AutoTokenizer.from_pretrained(run / "export")
    found = [texts.Document("a", PROSE[0]), texts.Document("a", PROSE[1]), texts.Document("b", PROSE[1] * 9)]
    rows = texts.measure(found, model, theirs, context=None, batch=1)
    nats = 0.0
    for text in PROSE:
        ids = [theirs.bos_token_id, *theirs(text, add_special_tokens=False)["input_ids"]]
        scores = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
        nats -= sum(scores[at, ids[at + 1]].item() for at in range(len(ids) - 1))
    assert rows[0]["bits_per_byte"] == pytest.approx(nats / math.log(2) / sum(len(text.encode()) for text in PROSE), rel=1e-6)
    short = texts.measure(found, model, theirs, context=16, batch=1)
    many = texts.measure(found, model, theirs, context=16, batch=5)
    assert [row["nats"] for row in many] == pytest.approx([row["nats"] for row in short], rel=1e-6)
    assert short[1]["tokens"] == rows[1]["tokens"] > 128
    with pytest.raises(RunError, match="more than the model's 128 positions"):
        texts.measure(found, model, theirs, context=129, batch=1)


def test_texts_that_are_none_are_refused(tmp_path, run, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n\n{"body": "y"}\n')
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "c.txt").write_text("")
    for name, code, why in (("a.jsonl", 5, "line 3"), ("b.txt", 5, "no UTF-8"), ("c.txt", 7, "no text"), ("d.txt", 5, "cannot be read")):
        with pytest.raises(SystemExit, match=str(code)):
            cli.main(["eval", str(run), "--bits-per-byte", str(tmp_path / name)])
        assert why in capsys.readouterr().err


def test_evaluations_of_a_folder_are_never_written_over_and_damaged_ones_passed_over(tmp_path):
    one = {"format": 1, "step": 3, "tasks": {"t": {"metrics": {"acc,none": {"value": 0.5}}}}}
    paths = [evals.keep(tmp_path, one | {"step": 3}), evals.keep(tmp_path, one | {"step": 3})]
    assert len(set(paths)) == 2
    (tmp_path / "evals" / "0.json").write_text("{")
    (tmp_path / "evals" / "1.json").write_text('{"format": 1, "step": 1, "tasks": {"t": 3}}')
    assert [found["step"] for found in evals.read(tmp_path)] == [1, 3, 3]
    assert evals.latest(tmp_path)["t"]["metrics"] == {"acc,none": {"value": 0.5}}


# Readers.


def test_readers_of_an_export_and_what_breaks_it(run, tmp_path, capsys):
    cli.main(["export", str(run), str(tmp_path / "model"), "--check", "--max-shard-size", "1MB"])
    said = capsys.readouterr().out
    for reader in ("files", "config", "tokenizer", "transformers", "vLLM"):
        assert f"  {reader:12} ok" in said
    assert "one that gigatrain trained" in said
    model = tmp_path / "model"
    with pytest.raises(SystemExit, match="7"):
        cli.main(["export", str(run)])

    def broken(name, change):
        path = model / name
        before = path.read_bytes()
        change(path)
        found = [one for one in readers.check(model) if one.health == "bad"]
        path.write_bytes(before)
        return " ".join(one.text for one in found)

    def keys(**values):
        return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | values))

    assert "auto_map" in broken("tokenizer_config.json", keys(auto_map={"AutoTokenizer": "x.y"}))
    assert "readers want one name" in broken("config.json", keys(architectures=[]))
    assert "lm_head.weight is there" in broken("config.json", keys(tie_word_embeddings=True))
    assert "layers, and config.json says 3" in broken("config.json", keys(num_hidden_layers=3))
    assert "outside of the vocabulary" in broken("generation_config.json", keys(eos_token_id=[1, 4000]))
    assert "model.safetensors is " in broken("model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-1]))
    assert "mismatched" in broken("config.json", keys(intermediate_size=96)) or "does not load" in broken(
        "config.json", keys(intermediate_size=96)
    )
    assert not broken("config.json", lambda path: None)
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 64}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    found = list(readers._llamacpp(model, {"architectures": ["LlamaForCausalLM"], "rope_parameters": rope}, {}))
    assert [one.health for one in found][:2] == ["ok", "refuses"]
    assert "refuses" in next(iter(readers._llamacpp(model, {"architectures": ["HeliumForCausalLM"]}, {}))).line()


def test_an_adapters_card_and_folder_say_what_they_are(run, tmp_path):
    """Of an adapter beside the run's own export: merged, and alone."""
    overrides = [
        f"model.from={run / 'export'}",
        "adapter.rank=2",
        "train.steps=2",
        "export=false",
        "report.trackers=[]",
        "validation.sets=[]",
    ]
    made = plan(load.recipe(run.parent / "tinychat.toml", overrides), load.site("laptop"))
    loop.train(made, tmp_path / "run", display=Display(Console(file=io.StringIO(), force_terminal=False)))
    export(tmp_path / "run", tmp_path / "merged")
    export(tmp_path / "run", tmp_path / "adapter", adapter=True)
    merged, alone = ((tmp_path / name / "README.md").read_text() for name in ("merged", "adapter"))
    assert (front_matter(merged)["library_name"], front_matter(alone)["library_name"]) == ("transformers", "peft")
    assert front_matter(alone)["tags"] == ["gigatrain", "lora"]
    assert "Only an adapter was trained (lora, rank 2, alpha 32), beside the base's frozen weights. Here it is merged into them." in merged
    assert "This folder holds it alone" in alone
    assert "AutoPeftModelForCausalLM.from_pretrained(folder" in alone
    assert not [one for one in readers.check(tmp_path / "merged") if one.health == "bad"]
    found = readers.check(tmp_path / "adapter")
    assert [one.health for one in found if one.reader in ("adapter", "peft")] == ["ok", "ok"]
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 3}))
    assert next(one.health for one in readers.check(tmp_path / "adapter")) == "bad"
    with pytest.raises(RunError, match="is an adapter alone"):
        generate(tmp_path / "adapter", "x", tokens=1, temperature=0.0)
