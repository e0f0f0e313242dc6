"""The quickstart's three recipes one after the other, tiny: text, then answers, then which answer; what each gives is where the next begins."""

import json
import os

import pytest
from rich.console import Console

from gigatrain import load, loop
from gigatrain.data import sources
from gigatrain.observe.display import Display
from gigatrain.planning.plan import plan

FILES = ("textwrap.py", "shlex.py", "posixpath.py", "heapq.py", "bisect.py", "statistics.py", "calendar.py", "fractions.py")
SMALL = 'model.architecture={family = "llama", vocab = 512, hidden = 64, layers = 2, heads = 4, kv_heads = 2, head_dim = 16, intermediate = 128, tied = true}'
SETS = (
    SMALL, "train.precision=fp32", "train.sequence=128", "train.microbatch=8", "schedule.warmup=2", "report.every=5", "report.trackers=[]",
    "data.workers=1", "checkpoint.every=1000", "validation.every=1000",
)  # fmt: skip


@pytest.fixture
def few(monkeypatch):
    """A few modules in place of all."""
    found = [piece for piece in sources._stdlib() if piece.name in FILES]
    assert len(found) == len(FILES)
    monkeypatch.setattr(sources, "_stdlib", lambda: found)


def went(name, folder, *overrides):
    recipe = load.recipe(name, [*SETS, f"data.folder={folder.parent}/cache", *overrides])
    with Display(Console(file=open(os.devnull, "w"))) as display:
        loop.train(plan(recipe, load.site("laptop")), folder, display=display)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "tokens" in row], [row for row in rows if "val_loss" in row]


def test_text_then_answers_then_which_answer(few, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    went(
        "quickstart",
        tmp_path / "one",
        "tokenizer.train.vocab=512",
        "train.steps=20",
        "optim.lr=4e-3",
        "sample.prompt=def ",
        "sample.tokens=2",
    )
    start = [f"model.from={tmp_path}/one/export", "model.positions=128", f"tokenizer.from={tmp_path}/one/export"]
    taught, held = went("quickstart-sft", tmp_path / "two", *start, "train.steps=30", "optim.lr=4e-3", "data.validation=0.2")
    assert taught[-1]["loss"] < taught[0]["loss"] - 1
    assert held[-1]["val_loss"] < taught[0]["loss"]
    start = [f"model.from={tmp_path}/two/export", "model.positions=128", f"tokenizer.from={tmp_path}/two/export"]
    preferred, held = went(
        "quickstart-dpo", tmp_path / "three", *start, "train.steps=20", "report.every=1", "optim.lr=1e-3", "data.validation=0.2"
    )
    # A policy that is its reference: nothing is preferred, and the loss is log 2 and the recipe's share of the answers' own.
    assert preferred[0]["reward_chosen"] == pytest.approx(0.0, abs=1e-2)
    assert preferred[0]["margin"] == pytest.approx(0.0, abs=1e-2)
    assert preferred[0]["loss"] > 0.6931
    assert preferred[-1]["loss"] < preferred[0]["loss"] - 0.05
    assert preferred[-1]["accuracy"] > 0.7
    assert (tmp_path / "three" / "export" / "model.safetensors").is_file()
    assert (
        "chat_template"
        in "".join(path.name + path.read_text() for path in (tmp_path / "three" / "export").glob("*.jinja"))
        + (tmp_path / "three" / "export" / "tokenizer_config.json").read_text()
    )
