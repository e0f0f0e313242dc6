"""Adapters beside frozen weights: outputs, losses and gradients are peft's, and what cannot be is refused by name."""

import copy
import json
import random
from dataclasses import replace

import pytest
import torch
import transformers

from gigatrain import architectures
from gigatrain.config import Adapter
from gigatrain.errors import CheckpointError
from gigatrain.kernels import dropout_add
from gigatrain.kernels.ops import REFERENCE
from gigatrain.models import adapters, hf, nf4
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


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("quantise", ["none", "nf4"])
def test_first_values_by_the_box_are_those_of_the_whole(kind, quantise, tmp_path):
    """Whatever a rank's share is: of 4 bits whole rows are read, of a growth that an adapter's folder has the rows that its lengths are of; no more."""
    reference = with_peft(theirs("llama", tied=True), KINDS[kind])
    reference.save_pretrained(tmp_path / "adapter")
    theirs("llama", tied=True).save_pretrained(tmp_path / "base")
    arch = architectures.from_hf_config(json.loads((tmp_path / "base" / "config.json").read_text()))
    for source in (None, str(tmp_path / "adapter")):
        adapter = KINDS[kind].model_copy(update={"quantise": quantise, "source": source})
        model = Decoder(arch)
        adapters.adapt(model, adapter, torch.float32)
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        of_base = adapters.base_shapes(model)
        whole = {
            name: value.clone() for name, value in adapters.first(model, hf.read_weights(arch, of_base, tmp_path / "base"), adapter, 3)
        }
        assert whole.keys() == shapes.keys()
        for seed in range(3):
            random_, boxes = random.Random(seed), {}
            for name, shape in shapes.items():
                first = random_.randrange(shape[0])
                boxes[name] = (first, *(0,) * (len(shape) - 1)), (random_.randrange(shape[0] - first + 1), *shape[1:])
            for name in shapes:
                if name.endswith(".scales"):
                    boxes[name] = (
                        boxes[name.replace(".scales", ".codes")][0],
                        (boxes[name.replace(".scales", ".codes")][1][0], shapes[name][1]),
                    )
            for trained in (True, False):
                read = adapters.base_boxes(model, boxes, adapter, trained=trained)
                base = hf.read_weights(arch, of_base, tmp_path / "base", boxes=read)
                found = dict(adapters.first(model, base, adapter, 3, boxes, trained=trained))
                there = {name for name, (_, size) in boxes.items() if 0 not in size and (trained or ".lora_" not in name)}
                assert there <= found.keys()
                for name, value in found.items():
                    assert torch.equal(value, whole[name][hf.cut_of(*boxes[name])]), (source, seed, name)
                rows = sum(size[0] for name, (_, size) in read.items() if name.endswith("_proj.weight"))
                most = sum(size[0] for name, (_, size) in boxes.items() if name.endswith(("_proj.weight", ".codes")))
                assert rows == most or (kind == "dora" and source is not None and trained)


class SavesItsSeed(torch.autograd.Function):
    """As the fused dropout: its mask is drawn again in the backward, of a seed that is kept in its place."""

    @staticmethod
    def forward(ctx, x, residual, p, seed):
        ctx.p = p
        ctx.save_for_backward(seed)
        return dropout_add.reference(x, residual, p, seed)

    @staticmethod
    def backward(ctx, dy):
        (seed,) = ctx.saved_tensors
        return dropout_add.reference(dy, torch.zeros_like(dy), ctx.p, seed), dy, None, None


def test_the_base_alone_draws_nothing_and_leaves_the_seeds_of_the_forward_before_it():
    """A reference model in the same step (dpo): no mask, no noise, and the policy's backward finds its seeds as they were."""
    arch = architectures.Architecture(family="llama", vocab=67, hidden=32, layers=2, heads=2, intermediate=48)

    def gradients(between):
        ops = replace(REFERENCE, dropout_add=SavesItsSeed.apply)
        model = Decoder(arch, ops, neftune=5.0)
        model.init_weights(0.2, False, 0)
        adapters.adapt(model, Adapter(rank=4, dropout=0.3), torch.float32)
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
        tokens = torch.randint(67, (2, 12), generator=torch.Generator().manual_seed(0))
        found, sums = [], torch.tensor(0.0)
        for seed in (5, 6):
            loss = model.logprobs(tokens, tokens.roll(-1, 1), seed=torch.tensor(seed)).sum()
            if between:
                with torch.no_grad(), adapters.disabled(model):
                    found.append(model.logprobs(tokens, tokens.roll(-1, 1), seed=torch.tensor(seed)))
                assert all(module.training for module in model.modules())
            sums = sums + loss.detach()
            loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, found, sums

    (alone, _, one), (beside, found, other) = gradients(between=False), gradients(between=True)
    assert torch.equal(found[0], found[1])
    assert torch.equal(one, other)
    assert alone.keys() == beside.keys() != set()
    assert all(torch.equal(alone[name], beside[name]) for name in alone)


def test_four_bits_are_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(0)
    weight = torch.randn(48, 192) * torch.rand(48, 1)
    weight[3] = 0.0
    codes, scales = nf4.quantised(weight)
    assert (codes.numel(), scales.numel()) == (weight.numel() // 2, weight.numel() // 64)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert torch.equal(state.absmax.view(48, 3), scales)
    # Which of two levels an element half-way between them gets is a matter of rounding.
    assert (packed.view(48, 96) != codes).float().mean() < 1e-3
    for dtype in (torch.float32, torch.bfloat16):
        whole = nf4.restored(codes, scales, dtype)
        assert torch.equal(whole, nf4.restorer("bitsandbytes")(codes, scales, dtype))
        assert (whole.float() - weight).abs().max() < 0.16 * weight.abs().max()
    assert torch.equal(
        nf4.restored(*nf4.quantised(nf4.restored(codes, scales, torch.float32)), torch.float32), nf4.restored(codes, scales, torch.float32)
    )


def test_codes_are_kept_for_the_backward_and_not_the_weight(tmp_path):
    """As the adapter beside the restored weights, and what is saved has no matrix of them."""
    adapter = KINDS["lora"].model_copy(update={"quantise": "nf4"})
    base = theirs("llama")
    narrow = ours(base, adapter, None, tmp_path)
    state = base.state_dict()
    for name, weight in state.items():
        if name.endswith("_proj.weight"):
            weight.copy_(nf4.restored(*nf4.quantised(weight), torch.float32))
    wide = ours(base, KINDS["lora"], None, tmp_path)
    tokens = torch.arange(24)[None]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda tensor: tensor):
        loss = narrow.loss(tokens, tokens)[0]
    assert not any(shape[-2:] in ((64, 128), (128, 64)) for shape in kept if len(shape) >= 2)
    within(loss.detach(), wide.loss(tokens, tokens)[0].detach(), "loss")


def refusals(tmp_path, adapter, **changes):
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8.0, "use_dora": False, "use_rslora": False, "bias": "none", **changes}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    return adapters.Stored(tmp_path, adapter)


@pytest.mark.parametrize(
    ("changes", "said"), [({"r": 8}, "r 8, here 4"), ({"use_dora": True}, "use_dora True, here False"), ({}, "cannot be read")]
)
def test_another_adapter_is_refused(tmp_path, changes, said):
    with pytest.raises(CheckpointError, match=said):
        refusals(tmp_path, KINDS["lora"], **changes)
