"""A run with an adapter from its base to peft and transformers: saved, killed, resumed, exported both ways, and refused beside another base."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from rich.console import Console
from safetensors.torch import load_file, save_file

from gigatrain import load, loop, restore, run
from gigatrain.architectures import to_hf_config
from gigatrain.errors import CheckpointError, RunError
from gigatrain.export import export
from gigatrain.generate import generate
from gigatrain.models import hf
from gigatrain.models.decoder import Decoder
from gigatrain.observe.display import Display
from gigatrain.planning.plan import plan

LORA = ("adapter.rank=4", "adapter.alpha=8.0", "optim.lr=1e-2", "validation.every=0", "report.every=3", "train.steps=6", "export=false")
FORMS = {
    "lora": LORA,
    "dora": (*LORA, "adapter.kind=dora", "adapter.targets=['q_proj','down_proj']", "adapter.train_embeddings=true"),
    "nf4": (*LORA, "adapter.quantise=nf4", "adapter.rslora=true"),
    "bf16": (*LORA, "adapter.kind=dora", "train.precision=bf16", "adapter.dropout=0.1"),
}
SIZES = (
    "model.architecture.hidden=64",
    "model.architecture.head_dim=16",
    "model.architecture.intermediate=64",
    "model.architecture.tied=false",
)


def quiet():
    return Display(Console(file=io.StringIO(), force_terminal=False))


@pytest.fixture(scope="module")
def base(tiny, tmp_path_factory):
    """A folder of a model as transformers writes it."""
    folder = tmp_path_factory.mktemp("base")
    architecture = plan(load.recipe(tiny, SIZES), load.site("laptop")).decoder
    model = Decoder(architecture)
    model.init_weights(0.2, False, 5)
    hf.save_weights(model, architecture, folder)
    (folder / "config.json").write_text(
        json.dumps(to_hf_config(architecture, max_positions=64, dtype="float32", bos=None, eos=None, pad=None))
    )
    return folder


@torch.no_grad()
def greedy(model, tokens, count):
    for _ in range(count):
        tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], 1)
    return tokens


def made(tiny, base, *overrides):
    return plan(load.recipe(tiny, [*SIZES, f"model.from={base}", *overrides]), load.site("laptop"))


@pytest.mark.parametrize("form", FORMS)
def test_both_exports_answer_as_the_run(tiny, base, tmp_path, form):
    peft = pytest.importorskip("peft")
    trained = made(tiny, base, *FORMS[form])
    loop.train(trained, tmp_path / "run", display=quiet())
    kept = run.checkpoints(tmp_path / "run").latest()[0]
    whole = {"model.embed_tokens.weight"} if form == "dora" else set()
    assert {name for name in kept.tensors("weights") if ".lora_" not in name} == whole
    assert kept.state["base"]["from"] == str(base)
    assert export(tmp_path / "run", tmp_path / "model") == 6
    assert export(tmp_path / "run", tmp_path / "adapter", adapter=True) == 6
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    beside = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    plain = beside.state_dict()
    if form == "nf4":  # what it was trained beside
        from gigatrain.models import nf4

        for name, weight in plain.items():
            if name.endswith("_proj.weight"):
                weight.copy_(nf4.restored(*nf4.quantised(weight), torch.float32))
    adapted = peft.PeftModel.from_pretrained(beside, tmp_path / "adapter").eval()
    tokens = torch.arange(3, 43).view(2, 20)
    rounded = form == "bf16"  # merged weights are rounded once more than the two apart
    torch.testing.assert_close(merged(tokens).logits, adapted(tokens).logits, rtol=1e-5, atol=0.2 if rounded else 2e-5)
    if not rounded:
        assert torch.equal(*(greedy(model, tokens, 12) for model in (merged, adapted)))
    moved = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)(tokens).logits
    assert (merged(tokens).logits - moved).abs().max() > 1e-2
    assert generate(tmp_path / "run", "def", tokens=4, temperature=0.0) == generate(tmp_path / "model", "def", tokens=4, temperature=0.0)
    # The folder that was written is where another run may begin.
    more = (*FORMS[form], f"adapter.from={tmp_path / 'adapter'}", "train.steps=1", "optim.lr=1e-9", "adapter.train_embeddings=false")
    if form != "dora":  # whose embedding is in the folder too
        loop.train(made(tiny, base, *more), tmp_path / "again", display=quiet())
        export(tmp_path / "again", tmp_path / "adapter2", adapter=True)
        first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "adapter2"))
        assert first.keys() == second.keys()
        for name in first:
            torch.testing.assert_close(first[name], second[name], rtol=1e-5, atol=1e-6)
    else:
        with pytest.raises(CheckpointError, match="embed_tokens"):
            loop.train(made(tiny, base, *more), tmp_path / "again", display=quiet())


KILLED = """
import os, signal, sys
from gigatrain import load, loop
from gigatrain.engines.native import Native
from gigatrain.planning.plan import plan
from pathlib import Path
step = Native.step
def dying(self, rate, count=[0]):
    count[0] += 1
    if count[0] == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, rate)
Native.step = dying
recipe, folder, *overrides = sys.argv[1:]
loop.train(plan(load.recipe(recipe, overrides), load.site("laptop")), Path(folder))
"""


def test_a_killed_run_resumes_bitwise_and_only_beside_its_base(tiny, base, tmp_path):
    mine = tmp_path / "base"
    shutil.copytree(base, mine)
    overrides = [*FORMS["lora"], "adapter.dropout=0.1", "checkpoint.every=2"]
    chosen = made(tiny, mine, *overrides)
    loop.train(chosen, tmp_path / "whole", display=quiet())
    arguments = [str(tiny), str(tmp_path / "killed"), *SIZES, f"model.from={mine}", *overrides]
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments],
        check=False,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert ended.returncode == -9, ended.stderr.decode()[-2000:]
    loop.train(chosen, tmp_path / "killed", start="resume", display=quiet())
    for name in ("whole", "killed"):
        export(tmp_path / name, tmp_path / f"{name}-adapter", adapter=True)
    first, second = ((tmp_path / f"{name}-adapter" / "adapter_model.safetensors").read_bytes() for name in ("whole", "killed"))
    assert first == second
    elsewhere = mine.rename(tmp_path / "elsewhere")  # a base is known by its hash
    again = loop.train(made(tiny, elsewhere, *overrides), tmp_path / "killed", start="resume", display=quiet())
    assert again is not None
    assert again["steps"] == 6
    elsewhere.rename(mine)
    weights = load_file(mine / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1e-3
    save_file(weights, mine / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="SHA-256"):
        loop.train(chosen, tmp_path / "killed", start="resume", display=quiet())
    with pytest.raises(CheckpointError, match="SHA-256"):
        export(tmp_path / "whole", tmp_path / "model")


def test_another_run_begins_with_an_adapter_of_its_form_beside_its_base(tiny, base, tmp_path):
    """`optim.from`: refused by name for another form, another base, and where only one of both has an adapter."""
    mine, few = tmp_path / "base", (*LORA, "train.steps=2")
    shutil.copytree(base, mine)
    loop.train(made(tiny, mine, *few), tmp_path / "first", display=quiet())

    def begun(name, *overrides):
        screen = io.StringIO()
        loop.train(
            made(tiny, mine, f"optim.from={tmp_path / 'first'}", *overrides),
            tmp_path / name,
            display=Display(Console(file=screen, width=400)),
        )
        return screen.getvalue()

    assert "weights and optimizer of" in begun("again", *few)
    with pytest.raises(CheckpointError) as raised:
        begun("other", *few, "adapter.alpha=4.0", "adapter.rslora=true", "adapter.kind=dora", "adapter.rank=8")
    assert "kind 'lora', here 'dora'; rank 4, here 8; alpha 8.0, here 4.0; rslora False, here True; set [adapter]" in str(raised.value)
    narrow = made(tiny, mine, *few, "adapter.quantise=nf4")
    assert restore._same_form(narrow, tmp_path / "first") == ["adapter was trained beside weights of quantise none, here nf4"]
    whole = [one for one in few if not one.startswith("adapter.")]
    with pytest.raises(CheckpointError, match="the recipe has none"):
        begun("whole", *whole)
    weights = load_file(mine / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1e-3
    save_file(weights, mine / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="SHA-256"):
        begun("elsewhere", *few)


def test_a_run_without_an_adapter_has_none_to_export(tiny, tmp_path):
    loop.train(
        plan(load.recipe(tiny, ["train.steps=1", "validation.every=0", "export=false"]), load.site("laptop")),
        tmp_path / "run",
        display=quiet(),
    )
    with pytest.raises(RunError, match="no \\[adapter\\]"):
        export(tmp_path / "run", Path(tmp_path / "adapter"), adapter=True)
