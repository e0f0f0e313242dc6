"""What a run of a family with experts leaves: a folder that transformers loads, with the logits of our decoder."""

import io

import pytest
import torch
import transformers
from rich.console import Console

from gigatrain import load, loop
from gigatrain.architectures import class_of
from gigatrain.export import export
from gigatrain.generate import generate
from gigatrain.models import hf
from gigatrain.models.decoder import Decoder
from gigatrain.observe.display import Display
from gigatrain.planning.plan import plan

LATENT = "kv_heads=4 head_dim=12 q_rank=16 kv_rank=16 rope_head_dim=4 value_head_dim=8 expert_intermediate=16"
ROPE = '{kind="yarn",factor=4.0,original_positions=16,mscale=1.0,mscale_all_dim=1.0,query_beta=0.1}'
FAMILIES = {
    "olmoe": ("kv_heads=4", ("loss.router_aux=0.01", "loss.router_z=0.001")),
    "deepseek_v3": (
        f"{LATENT} groups=4 groups_per_token=2 moe_layers=[false,true]",
        ("loss.router_bias_rate=0.01", "train.precision=bf16"),
    ),
    "mistral4": (f"{LATENT} rope={ROPE}", ("loss.router_aux=0.01",)),
    "gpt_oss": ("window=16", ("train.recompute=lean", "train.precision=bf16")),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_is_exported_and_generates(tiny, tmp_path, family):
    numbers, others = FAMILIES[family]
    sizes = f"family={family} experts=8 experts_per_token=2 tied=false {numbers}".split()
    recipe = load.recipe(
        tiny, [*(f"model.architecture.{one}" for one in sizes), *others, "train.steps=3", "export=false", "validation.every=0"]
    )
    made = plan(recipe, load.site("laptop"))
    loop.train(made, tmp_path / "run", display=Display(Console(file=io.StringIO(), force_terminal=False)))
    assert export(tmp_path / "run", tmp_path / "model") == 3
    theirs = getattr(transformers, class_of(family) or "").from_pretrained(tmp_path / "model", dtype=torch.float32)
    ours = Decoder(made.decoder)
    hf.load_weights(ours, tmp_path / "model")
    tokens = torch.arange(2, 40).view(2, 19)
    torch.testing.assert_close(ours.logits(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)
    for name, correction in ours.corrections().items():
        assert correction.abs().max() >= 0.01 - 1e-6, name
        assert torch.equal(correction, theirs.get_buffer(name))
    if family == "mistral4":  # which no Auto class of transformers loads
        assert generate(tmp_path / "model", "def", tokens=3, temperature=0.0).startswith("def")
