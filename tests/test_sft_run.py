"""Fine-tuning by the command: conversations in, a packed run that a kill does not change, answers in the report, and what it refuses."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tinychat

from gigatrain import load
from gigatrain.errors import PlanError
from gigatrain.planning.plan import plan


def command(*words: object, ends: int = 0) -> str:
    done = subprocess.run([sys.executable, "-m", "gigatrain", *map(str, words)], check=False, capture_output=True, text=True, timeout=240)
    assert done.returncode == ends, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return tinychat.recipe(tmp_path_factory.mktemp("sft"))


def test_a_user_sees_what_is_trained(recipe):
    shown = command("data", "show", recipe, "--count", 1)
    assert "113 documents in 44 rows of 128, 9.6% padding" in shown
    assert "<|im_start|>assistant\n⟪It is " in shown
    assert shown.count("⟪") == shown.count("<|im_end|>⟫") + 1  # the first explains the mark


@pytest.mark.long
def test_a_run_says_what_it_leaves_out_and_that_its_tokenizer_is_not_the_weights_own(tmp_path):
    """On a DPO-like second run: weights of the first, and a tokenizer that is trained anew on fewer conversations."""
    recipe, chats = tinychat.recipe(tmp_path / "second"), tmp_path / "second" / "chats.jsonl"
    first = command("train", recipe, "--run", tmp_path / "first", "--set", "train.steps=1")
    assert "left out" not in first
    assert "WEIGHTS" not in first
    lines = chats.read_text().splitlines()[:60]
    chats.write_text("\n".join([*lines[:3], '{"messages": [', *(line.replace("What is", "Please sum") for line in lines[3:])]))
    weights = tmp_path / "first" / "export"
    second = command("train", recipe, "--run", tmp_path / "run", "--set", "train.steps=1", "--set", f"model.from={weights}")
    assert (
        f"1 documents are left out (unparsable 1), such as line 4 of {chats}: unparsable: no JSON: Expecting value at character" in second
    )
    assert f'another id in this run\'s tokenizer, or none: its embedding is of other words; set tokenizer.from = "{weights}"' in second


@pytest.mark.long
def test_a_run_from_conversations_to_answers(recipe, tmp_path):
    """Learns a rule of a few tokens; stopped half way and gone on it ends with the same weights; the report has its answers."""
    changes = [
        "train.steps=60",
        "optim.lr=2e-2",
        "train.neftune=1.0",
        "sample.held_out=2",
        "sample.temperature=0.0",
        "sample.tokens=12",
        "report.every=5",
    ]
    sets = [word for change in changes for word in ("--set", change)]
    assert "packed   source 0" in command("train", recipe, "--run", tmp_path / "whole", *sets)
    stopped = tmp_path / "stopped"
    process = subprocess.Popen(
        [sys.executable, "-m", "gigatrain", "train", str(recipe), "--run", str(stopped), *sets], stdout=subprocess.DEVNULL
    )
    try:
        while process.poll() is None and not ((stopped / "metrics.jsonl").is_file() and (stopped / "metrics.jsonl").stat().st_size):
            time.sleep(0.02)
        process.terminate()
        assert process.wait(120) == 75, "saved, and to be started again"
    finally:
        process.kill()
        process.wait()
    assert not (stopped / "summary.json").exists()
    command("train", recipe, "--run", stopped, "--resume", *sets)
    one, two = (json.loads((folder / "summary.json").read_text()) for folder in (tmp_path / "whole", stopped))
    assert one["weights_sha256"] == two["weights_sha256"]
    assert one["loss"] < 2.0
    rows = [json.loads(line) for line in (tmp_path / "whole" / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    for row in rows:
        assert row["prompt"].endswith("<|im_start|>assistant\n")
        assert row["written"].startswith("It is ")
        assert row["written"].endswith("<|im_end|>")
    command("report", tmp_path / "whole", "-o", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "Held-out conversations" in page
    assert "It is " in page
    # The export talks in the template, by transformers alone.
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "whole" / "export")
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "What is 1 + 2?"}], add_generation_prompt=True, tokenize=False)
    assert asked == "<|im_start|>user\nWhat is 1 + 2?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["train.neftune=5.0", "mesh.tensor=2"], r"train\.neftune 5\.0 is noise on whole rows.* mesh\.tensor 2 cuts them"),
        (["tokenizer.train.vocab=500"], r"tokenizer\.train\.vocab 500 is above model\.architecture\.vocab 400"),
    ],
)
def test_what_cannot_be_is_refused(recipe, overrides, why):
    with pytest.raises(PlanError, match=why):
        plan(load.recipe(recipe, overrides), load.site("laptop"), 2 if "mesh.tensor=2" in overrides else 1)


@pytest.mark.long
def test_a_model_without_rows_for_the_template_is_refused(recipe, tmp_path):
    """ChatML's two tokens are behind the tokenizer's own: the model must embed them."""
    import chatshapes

    chatshapes.made(tmp_path / "own", "llama3", marks=False)
    text = recipe.read_text().replace("train.vocab = 400", f'from = "{tmp_path / "own"}"').replace("vocab = 400", "vocab = 346")
    (tmp_path / "tinychat.toml").write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "gigatrain", "train", tmp_path / "tinychat.toml", "--run", tmp_path / "run"],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 7
    assert "the tokenizer has 347 ids and the model embeds 346" in done.stdout + done.stderr
