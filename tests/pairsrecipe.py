"""A tiny recipe over chat pairs that a tiny model can tell apart, for tests and for programs that are none: the preferred answer counts up, the other down."""

import json
from pathlib import Path
from random import Random

PAIRS = """
name = "pairs"
[model.architecture]
family = "llama"
vocab = 300
hidden = 32
layers = 2
heads = 4
kv_heads = 2
head_dim = 8
intermediate = 48
tied = true
[tokenizer]
template = "chatml"
train = {{ vocab = 300 }}
[data]
sources = [{{ kind = "jsonl", path = "{path}", format = "preference" }}]
folder = "{cache}"
validation = 0.15
packing = "document"
[objective]
kind = "{kind}"
[train]
sequence = 160
batch = 8
steps = 20
precision = "fp32"
[optim]
lr = 3e-3
[schedule]
warmup = 2
[validation]
every = 10
[checkpoint]
every = 5
keep = 2
[report]
every = 5
trackers = []
"""


def records(count: int, *, labelled: bool = False) -> list[dict]:
    drawn, found = Random(7), []
    for number in range(count):
        start, name = drawn.randrange(2, 7), drawn.choice(["Ada", "Emil", "Ida", "Otto"])
        up, down = (" ".join(str(start + step * way) for step in range(drawn.randrange(2, 4))) for way in (1, -1))
        prompt = [{"role": "user", "content": f"{name} says {start}. Count up!"}]
        good, bad = ([{"role": "assistant", "content": answer}] for answer in (up, down))
        if labelled:
            found.append({"prompt": prompt, "completion": good if number % 2 else bad, "label": bool(number % 2)})
        else:
            found.append({"prompt": prompt, "chosen": good, "rejected": bad})
    return found


def write(folder: Path, kind: str = "dpo", count: int = 120, cache: Path | None = None) -> Path:
    """The recipe's file in a folder, with its data beside it."""
    path = folder / f"{kind}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records(count, labelled=kind == "kto")))
    recipe = folder / f"{kind}.toml"
    recipe.write_text(PAIRS.format(path=path, cache=cache or folder / "cache", kind=kind))
    return recipe
