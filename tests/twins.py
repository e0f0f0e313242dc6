"""A tiny twin's whole life, for tests and for benchmarks/recipes.py: trained, saved, resumed, exported, loaded by transformers."""

import io
import json
import shutil
from pathlib import Path

import torch
import transformers
from rich.console import Console
from safetensors.torch import load_file

from gigatrain import load, loop
from gigatrain.architectures import class_of
from gigatrain.models import hf
from gigatrain.models.decoder import Decoder
from gigatrain.observe.display import Display
from gigatrain.planning.plan import Plan, plan


def planned(name: str, data: Path) -> Plan:
    """On a machine without a GPU; twins of one task have the same data, which is tokenised once."""
    return plan(load.recipe(name, [f"data.folder={data}"]), load.site("laptop"))


def lives(name: str, folder: Path, data: Path) -> str:
    """Trains to the end, and again from the middle: the same weights. Then the export, in transformers and in ours: the same logits."""
    made = planned(name, data)
    whole, half = folder / "whole", folder / "half"
    summary = loop.train(made, whole, display=_quiet())
    assert summary is not None
    assert summary["steps"] == made.steps, sorted(summary)
    shutil.copytree(whole, half)
    newest = sorted((half / "checkpoints").iterdir())[-1]
    assert str(made.steps) in newest.name
    shutil.rmtree(newest)
    shutil.rmtree(half / "export")
    assert loop.train(made, half, start="resume", display=_quiet()) is not None
    first, second = (load_file(run / "export" / _weights(run / "export")) for run in (whole, half))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    if made.adapter is not None:
        return f"{made.parameters:,} parameters, adapter exported and resumed bitwise"
    architecture = made.decoder
    theirs = getattr(transformers, class_of(architecture.family) or "").from_pretrained(whole / "export", dtype=torch.float32)
    ours = Decoder(architecture)
    hf.load_weights(ours, whole / "export")
    tokens = torch.arange(2, 40).view(2, 19)
    torch.testing.assert_close(ours.logits(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)
    losses = [row["loss"] for line in (whole / "metrics.jsonl").read_text().splitlines() if "loss" in (row := json.loads(line))]
    return f"{made.parameters:,} parameters, loss {losses[0]:.2f} to {losses[-1]:.2f}, resumed bitwise, logits as transformers'"


def _weights(export: Path) -> str:
    return next(path.name for path in sorted(export.glob("*.safetensors")))


def _quiet() -> Display:
    return Display(Console(file=io.StringIO(), force_terminal=False))
