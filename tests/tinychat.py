"""A small file of conversations, and a recipe that is fine-tuned on it."""

import json
import random
from pathlib import Path

RECIPE = """
name = "tinychat"
[model.architecture]
family = "llama"
vocab = 400
hidden = 32
layers = 2
heads = 2
kv_heads = 1
intermediate = 64
[tokenizer]
template = "chatml"
train.vocab = 400
[data]
folder = "{cache}"
validation = 0.1
packing = "packed"
[[data.sources]]
kind = "jsonl"
path = "{chats}"
format = "chat"
[train]
steps = 6
sequence = 128
batch = 8
microbatch = 2
precision = "fp32"
[optim]
lr = 1e-3
"""


def chats(count: int = 120, seed: int = 0) -> list[dict[str, object]]:
    """Questions that a few words answer, of one to three turns, some with a system's text."""
    draw, found = random.Random(seed), []
    for number in range(count):
        messages = [{"role": "system", "content": "Add."}] if number % 4 == 0 else []
        for _ in range(draw.randint(1, 3)):
            a, b = draw.randint(0, 99), draw.randint(0, 99)
            messages += [{"role": "user", "content": f"What is {a} + {b}?"}, {"role": "assistant", "content": f"It is {a + b}."}]
        found.append({"messages": messages, "id": number})
    return found


def recipe(folder: Path) -> Path:
    """The recipe's file, with its conversations beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats()))
    (folder / "tinychat.toml").write_text(RECIPE.format(cache=folder / "cache", chats=folder / "chats.jsonl"))
    return folder / "tinychat.toml"
