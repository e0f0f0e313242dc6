"""Adapters beside frozen weights: outputs, losses and gradients are peft's, and what cannot be is refused by name."""

import copy
import json

import pytest
import torch
import transformers

from gigatrain import architectures
from gigatrain.config import Adapter
from gigatrain.models import adapters, hf
from gigatrain.models.decoder import Decoder

peft = pytest.importorskip("peft")

SIZES = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
FAMILIES = {"llama": transformers.LlamaConfig, "qwen3": transformers.Qwen3Config}


def theirs(family, tied=False):
    torch.manual_seed(7)
    config = FAMILIES[family](**SIZES, tie_word_embeddings=tied, attn_implementation="eager")
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def with_peft(model, adapter, seed=3):
    """peft's model of the same adapter, of which B is not 0 and lengths are not those of the base."""
    named = "all-linear" if adapter.targets == "all-linear" else list(adapter.targets)
    config = peft.LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        use_rslora=adapter.rslora,
        use_dora=adapter.kind == "dora",
        target_modules=named,
        task_type="CAUSAL_LM",
    )
    found = peft.get_peft_model(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in found.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05, generator=generator)
        if "magnitude" in name:
            parameter.data.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
    return found.train()


def ours(model, adapter, folder, tmp_path):
    """Our decoder on the base's folder, with the adapter of `folder`."""
    base = tmp_path / "base"
    model.save_pretrained(base)
    arch = architectures.from_hf_config(json.loads((base / "config.json").read_text()))
    adapter = adapter.model_copy(update={"source": None if folder is None else str(folder)})
    decoder = Decoder(arch)
    adapters.adapt(decoder, adapter, torch.float32)
    parameters = dict(decoder.named_parameters())
    with torch.no_grad():
        for name, value in adapters.first(decoder, hf.read_weights(arch, adapters.base_shapes(decoder), base), adapter, 0):
            parameters[name].copy_(value)
    return decoder


KINDS = {
    "lora": Adapter(rank=4, alpha=8.0),
    "rslora": Adapter(rank=4, alpha=8.0, rslora=True, targets=("q_proj", "self_attn.v_proj", "down_proj")),
    "dora": Adapter(kind="dora", rank=4, alpha=8.0),
}


def within(found, expected, what):
    """At most 1e-6 of the tensor's largest value."""
    assert (found - expected).abs().max() <= 1e-6 * max(1.0, expected.abs().max().item()), (what, (found - expected).abs().max().item())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_losses_and_gradients_are_pefts(family, kind, tmp_path):
    adapter, base = KINDS[kind], theirs(family)
    reference = with_peft(base, adapter)
    reference.save_pretrained(tmp_path / "adapter")
    model = ours(base, adapter, tmp_path / "adapter", tmp_path)
    tokens = torch.randint(131, (2, 24), generator=torch.Generator().manual_seed(0))
    labels = tokens.roll(-1, 1)
    labels[:, -1] = -100
    within(model.logits(tokens), reference(tokens).logits, "logits")
    loss = model.loss(tokens, labels)[0] / (labels >= 0).sum()
    loss.backward()
    expected = torch.nn.functional.cross_entropy(reference(tokens).logits.flatten(0, 1), labels.flatten())
    expected.backward()
    within(loss.detach(), expected.detach(), "loss")
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in gradients.values())
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    count = 0
    for name, parameter in reference.named_parameters():
        if parameter.requires_grad:
            mine = name.removeprefix("base_model.model.").replace(".default.weight", "").replace("lora_magnitude_vector", "lora_growth")
            within(gradients[mine], parameter.grad, name)
            count += 1
    assert count == len(gradients)
    with torch.no_grad(), adapters.disabled(model):
        within(model.logits(tokens), base(tokens).logits, "without")
    assert (model.logits(tokens) - base(tokens).logits).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_changes_nothing_yet_and_is_drawn_as_pefts(kind, tmp_path):
    base = theirs("llama")
    model = ours(base, KINDS[kind], None, tmp_path)
    tokens = torch.arange(20)[None]
    within(model.logits(tokens), base(tokens).logits, "logits")
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            bound = parameter.shape[1] ** -0.5
            assert 0.8 * bound < parameter.abs().max() <= bound
