"""Models of transformers that are not ours, tiny and random: equal to transformers itself, alone and sharded, drawn, read and written."""

import json
import os
from typing import Any, cast

import pytest
import safetensors
import torch
import transformers
from distributed import together
from torch.nn import functional as F

from gigatrain import foreign
from gigatrain.errors import CheckpointError, PlanError, RecipeError
from gigatrain.models import autonumbers, autoweights
from gigatrain.models.automodel import Auto

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 96, **IDS}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96, **IDS}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
TINY = {
    "gpt_neox": LLAMA,
    "phi": LLAMA | {"num_key_value_heads": 2, "partial_rotary_factor": 0.5},  # its head has a bias
    "falcon": LLAMA | {"alibi": False, "multi_query": True, "parallel_attn": True},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "vocab_size": 96, **IDS},
    "mamba2": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "vocab_size": 96, **IDS},
    "gpt2": GPT | {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1},
    "opt": LLAMA | {"ffn_dim": 48, "word_embed_proj_dim": 16, "max_position_embeddings": 64},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96, **IDS},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 96, **IDS},
    "starcoder2": LLAMA | {"num_key_value_heads": 2},
    "gptj": GPT | {"rotary_dim": 4},  # a bias too, and a table of sines
    "cohere": LLAMA | {"num_key_value_heads": 2, "logit_scale": 0.25},
    "recurrent_gemma": LLAMA | {"num_key_value_heads": 1, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 8, "head_dim": 8},
    "gemma": LLAMA | {"num_key_value_heads": 2, "head_dim": 8},
    "minicpm3": LLAMA | LATENT | {"scale_emb": 12, "dim_model_base": 8},  # divides its hidden states before the head
    "olmo": LLAMA,
    "modernbert-decoder": LLAMA,  # its tied head would be drawn twice as wide
    "stablelm": LLAMA | {"num_key_value_heads": 2},
    "nemotron": LLAMA | {"num_key_value_heads": 2, "head_dim": 8},
    "glm": LLAMA | {"num_key_value_heads": 2, "head_dim": 8},
    "glm4": LLAMA | {"num_key_value_heads": 2, "head_dim": 8},
}  # fmt: skip
MIXTRAL = LLAMA | {"model_type": "mixtral", "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
CPU = torch.device("cpu")


def config(kind):
    return {"model_type": kind, **TINY[kind]}


def theirs(given):
    """The model as transformers builds it, without dropout, and weights that are not as small as fresh ones."""
    torch.manual_seed(0)
    read = transformers.CONFIG_MAPPING[given["model_type"]].from_dict(given)
    model = transformers.AutoModelForCausalLM.from_config(read, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def ours(model, given, **options):
    """Ours from meta, with the parameters of `model` but buffers of its own."""
    auto = Auto(given, **options)
    assert all(parameter.is_meta for parameter in auto.parameters())
    auto.to_empty(device="cpu")
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in auto.named_parameters():
            parameter.copy_(weights.pop(name))
    assert not weights
    return auto


def drawn(rows=3, tokens=17):
    generator = torch.Generator().manual_seed(1)
    tokens_bt = torch.randint(3, 96, (rows, tokens), generator=generator)
    labels_bt = torch.cat([tokens_bt[:, 1:], torch.full((rows, 1), -100)], 1)
    return tokens_bt, labels_bt


def error(left, right):
    return ((left - right).norm() / right.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("kind", TINY)
def test_loss_and_every_gradient_are_those_of_transformers(kind):
    model = theirs(config(kind)).double()
    auto = ours(model, config(kind)).double()
    tokens_bt, labels_bt = drawn()
    output = model(input_ids=tokens_bt, labels=tokens_bt, use_cache=False)
    expected = F.cross_entropy(output.logits.double().flatten(0, 1), labels_bt.flatten(), reduction="sum")
    loss, plain = auto.loss(tokens_bt, labels_bt)
    assert auto.head.separate
    # What transformers rounds to fp32 in between (logits, or a norm) is all that may differ.
    tight = 1e-11 if output.logits.dtype == torch.float64 and kind not in ("recurrent_gemma",) else 2e-6
    assert error(loss, expected) < tight
    assert error(plain, expected) < tight
    assert error(loss / (labels_bt >= 0).sum(), output.loss) < 1e-6
    loss.backward()
    expected.backward()
    found = dict(model.named_parameters())
    for name, parameter in auto.named_parameters():
        wanted = found[name].grad
        assert wanted is not None, name
        assert (parameter.grad - wanted).norm() <= tight * wanted.norm() + 1e-3 * tight, name


def test_terms_of_the_loss_reach_it_past_scale_and_bias():
    for kind in ("phi", "cohere", "recurrent_gemma"):
        model = theirs(config(kind))
        tokens_bt, labels_bt = drawn()
        logits = model(input_ids=tokens_bt, use_cache=False).logits.flatten(0, 1).double()
        some, labels = labels_bt.flatten() >= 0, labels_bt.flatten()
        smooth = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=0.1) + 0.01 * logits[some].logsumexp(-1).square().sum()
        assert error(ours(model, config(kind)).loss(tokens_bt, labels_bt, z_loss=0.01, label_smoothing=0.1)[0].double(), smooth) < 1e-6


def test_a_head_that_cannot_be_told_apart_gives_the_models_own_logits():
    given = config("gpt_neox")
    model = theirs(given)
    auto = ours(model, given)
    expected = auto.loss(*drawn())[0]
    auto.head = foreign.Head(separate=False, why="so that it is tried")
    assert error(auto.loss(*drawn())[0], expected) < 1e-6
    auto.verify(documents=True, device=CPU)


def test_scale_soft_cap_and_bias_are_measured():
    assert Auto(config("cohere")).head == foreign.Head(separate=True, scale=0.25)
    assert Auto(config("phi")).head == foreign.Head(separate=True, bias=True)
    assert Auto(config("recurrent_gemma")).head == foreign.Head(separate=True, softcap=30.0)
    assert Auto(config("gptj")).head.bias


@pytest.mark.parametrize("kind", ["cohere", "phi"])  # a scale, and a bias
def test_log_probabilities_of_labels_are_those_of_the_logits(kind):
    """What losses of pairs are made of, with their gradient; 0 without a label."""
    auto = ours(theirs(config(kind)), config(kind))
    tokens_bt, labels_bt = drawn()
    labels_bt[0, :5] = -100
    found = auto.logprobs(tokens_bt, labels_bt)
    wanted = torch.log_softmax(auto.logits(tokens_bt).float(), -1).gather(-1, labels_bt.clamp(min=0)[..., None])[..., 0]
    wanted = wanted * (labels_bt >= 0)
    assert found.shape == labels_bt.shape
    assert error(found, wanted) < 1e-5
    parameters = list(auto.parameters())
    both = (torch.autograd.grad(one.square().sum(), parameters) for one in (found, wanted))
    for mine, peer in zip(*both, strict=True):
        assert error(mine, peer) < 1e-4


@pytest.mark.parametrize("kind", TINY)
def test_padding_at_the_end_is_seen_by_no_token(kind):
    auto = ours(theirs(config(kind)), config(kind))
    tokens_bt, labels_bt = drawn()
    labels_bt[:, 9:] = -100
    padded = tokens_bt.clone()
    padded[:, 10:] = 2
    assert error(auto.loss(padded, labels_bt)[0], auto.loss(tokens_bt, labels_bt)[0]) < 1e-6
    auto.verify(documents=False, device=CPU)


@pytest.mark.parametrize("kind", sorted(foreign.ISOLATING))
def test_documents_of_a_row_are_kept_apart(kind):
    auto = ours(theirs(config(kind)), config(kind)).double()
    tokens_bt, labels_bt = drawn(rows=2)
    labels_bt[:, 7] = -100
    positions_bt = torch.cat([torch.arange(8), torch.arange(9)])[None].expand(2, -1)
    documents_bt = (torch.arange(17) >= 8).int()[None].expand(2, -1)
    together_ = auto.loss(tokens_bt, labels_bt, positions_bt, documents_bt)[0]
    apart = auto.loss(tokens_bt[:, :8], labels_bt[:, :8])[0] + auto.loss(tokens_bt[:, 8:], labels_bt[:, 8:])[0]
    assert error(together_, apart) < 1e-6  # some rotations are fp32
    assert error(auto.loss(tokens_bt, labels_bt)[0], apart) > 1e-4
    auto.verify(documents=True, device=CPU)


def test_what_cannot_be_trained_as_meant_is_refused():
    def built(given):
        return ours(theirs(given), given)

    with pytest.raises(PlanError, match="does not keep the documents of a row apart"):
        built(config("falcon")).verify(documents=True, device=CPU)
    bert = {"model_type": "bert", **LLAMA, "hidden_dropout_prob": 0.1}
    with pytest.raises(PlanError, match="see those behind them.*is_decoder"):
        built(bert).verify(documents=False, device=CPU)
    built(bert | {"is_decoder": True}).verify(documents=False, device=CPU)
    wrong = built(config("cohere"))
    wrong.head = foreign.Head(separate=True)
    with pytest.raises(PlanError, match="not the cross entropy of its logits"):
        wrong.verify(documents=False, device=CPU)
    with pytest.raises(PlanError, match="lean"):
        Auto(config("phi"), recompute="lean")
    for extra, message in (
        ({"auto_map": {"AutoModelForCausalLM": "x.Y"}}, "never runs"),
        ({"model_type": "none_such"}, "no model_type 'none_such'"),
        ({"model_type": None}, "no model_type"),
        ({"model_type": "bart", "is_encoder_decoder": True}, "encoder with a decoder"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"output_router_logits": True}, "balancing loss"),
        ({"n_head": 5}, "transformers cannot build"),
        ({"n_head": "four"}, "transformers refuses"),
    ):
        with pytest.raises(RecipeError, match=message):
            Auto(config("gpt2") | extra)


def test_weights_that_layers_share_are_refused(monkeypatch):
    def tied(self, config):
        first(self, config)
        self.model.layers[1].mlp.c_fc.weight = self.model.layers[0].mlp.c_fc.weight

    first = transformers.Starcoder2ForCausalLM.__init__
    monkeypatch.setattr(transformers.Starcoder2ForCausalLM, "__init__", tied)
    with pytest.raises(PlanError, match=r"share model\.layers\.0\.mlp\.c_fc\.weight"):
        Auto(config("starcoder2"))


def test_nothing_in_a_forward_is_random():
    given = config("gpt2")
    auto = ours(theirs(given), given)
    assert auto.training
    assert error(auto.loss(*drawn())[0], auto.loss(*drawn())[0]) == 0.0
    cast(Any, auto.layers[0]).mlp.dropout.p = 0.5
    with pytest.raises(PlanError, match="draws random numbers"):
        auto.verify(documents=False, device=CPU)


@pytest.mark.parametrize("kind", ["gpt_neox", "mamba"])
def test_recomputed_layers_have_the_same_gradients(kind):
    model, found = theirs(config(kind)), []
    for recompute in ("none", "selective", "full"):
        auto = ours(model, config(kind), recompute=recompute)
        calls = []
        first = next(iter(auto.layers[0].children()))
        first.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        auto.loss(*drawn())[0].backward()
        assert len(calls) == (1 if recompute == "none" else 2)
        found.append([parameter.grad for parameter in auto.parameters()])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("kind", TINY)
def test_in_bf16_buffers_are_those_of_transformers_and_the_checks_hold(kind, tmp_path):
    model = theirs(config(kind))
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    auto = ours(model, config(kind), dtype=torch.bfloat16).to(torch.bfloat16)
    wanted = dict(loaded.named_buffers())
    for name, buffer in auto.model.named_buffers():
        assert buffer.dtype == wanted[name].dtype, name
        assert torch.equal(buffer, wanted[name]), name
    tokens_bt, _ = drawn()
    assert torch.equal(auto.logits(tokens_bt), loaded(input_ids=tokens_bt).logits)
    auto.verify(documents=kind in foreign.ISOLATING, device=CPU)


def test_kinds_and_decay():
    mamba, gpt2, mixtral = Auto(config("mamba")), Auto(config("gpt2")), Auto(MIXTRAL)
    assert [mamba.kind_of(f"backbone.layers.0.mixer.{n}") for n in ("A_log", "D", "conv1d.weight", "in_proj.weight", "dt_proj.bias")] == [
        "scalar", "scalar", "scalar", "matrix", "bias",
    ]  # fmt: skip
    assert [mamba.decays(f"backbone.layers.0.mixer.{n}") for n in ("A_log", "D", "conv1d.weight", "in_proj.weight", "dt_proj.bias")] == [
        False, False, True, True, False,
    ]  # fmt: skip
    assert mamba.kind_of("backbone.layers.0.norm.weight") == mamba.kind_of("backbone.norm_f.weight") == "norm"
    assert mamba.decays("backbone.embeddings.weight", True)
    assert not mamba.decays("backbone.embeddings.weight")
    assert gpt2.kind_of("transformer.h.1.attn.c_attn.weight") == "matrix"
    assert gpt2.kind_of("transformer.h.1.ln_1.weight") == "norm"
    assert gpt2.kind_of("transformer.wpe.weight") == "embed"
    neox = Auto(config("gpt_neox"))
    assert [name for name, _ in neox.named_parameters() if neox.kind_of(name) == "head"]
    kinds = {mixtral.kind_of(name) for name, _ in mixtral.named_parameters()}
    assert kinds == {"embed", "head", "norm", "matrix", "expert", "router"}


@pytest.mark.parametrize("kind", TINY)
def test_fresh_weights_are_drawn_as_transformers_draws_them(kind):
    given = config(kind)
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(transformers.CONFIG_MAPPING[kind].from_dict(given), dtype=torch.float32)
    wanted, found = dict(model.named_parameters()), dict(autoweights.fresh(given, 7))
    assert found.keys() == wanted.keys()
    again, other = dict(autoweights.fresh(given, 7)), dict(autoweights.fresh(given, 8))
    for name, tensor in found.items():
        assert torch.equal(tensor, again[name])
        reference = wanted[name].detach()
        if reference.std(correction=0) == 0:
            assert torch.equal(tensor, reference), name
        elif tensor.numel() > 500:
            assert abs(tensor.std() / reference.std() - 1) < 0.2, name
            assert not torch.equal(tensor, other[name]) or name.endswith("A_log"), name
    layers = [
        (name, name.replace(".0.", ".1.", 1)) for name in found if ".0." in name and found[name].numel() > 500 and "A_log" not in name
    ]
    assert layers
    assert not any(torch.equal(found[name], found[other]) for name, other in layers if other in found)


def test_fresh_weights_that_transformers_leaves_open_are_refused():
    given = {"model_type": "apertus", **LLAMA}  # its xIELU is filled where the module is made, and never drawn
    with pytest.raises(PlanError, match="no first value for model.layers.0.mlp.act_fn.alpha_p"):
        dict(autoweights.fresh(given, 0))


def filled(folder, given):
    auto = Auto(given)
    auto.to_empty(device="cpu")
    weights = dict(auto.named_parameters())
    with torch.no_grad():
        for name, tensor in autoweights.tensors(auto, folder):
            weights.pop(name).copy_(tensor)
    assert not weights
    return auto


@pytest.mark.parametrize("kind", ["gpt_neox", "phi", "mamba", "gpt2", "opt", "mixtral"])
def test_an_export_is_loaded_by_transformers_and_by_us(kind, tmp_path):
    given = MIXTRAL if kind == "mixtral" else config(kind)
    model = theirs(given)
    auto = ours(model, given)
    state = {name: p.detach() for name, p in auto.named_parameters()} | auto.persistent()
    autoweights.save(state, autonumbers.numbers(given), tmp_path, dtype=torch.float32, tokens={"eos_token_id": 2})
    loaded, report = cast(Any, transformers.AutoModelForCausalLM).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    tokens_bt, _ = drawn()
    expected = auto.logits(tokens_bt)
    assert torch.equal(loaded.eval()(input_ids=tokens_bt).logits, expected)
    assert torch.equal(filled(tmp_path, json.loads((tmp_path / "config.json").read_text())).logits(tokens_bt), expected)
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    if kind in ("gpt_neox", "mixtral"):  # as the released files have it
        assert {"gpt_neox": "embed_out.weight", "mixtral": "model.layers.1.block_sparse_moe.experts.3.w2.weight"}[kind] in names
    if kind == "gpt2":  # dropout is off here, and as it was in what is written
        assert json.loads((tmp_path / "config.json").read_text())["resid_pdrop"] == 0.1


def test_what_transformers_saves_is_read(tmp_path):
    """Experts are stored one by one, GPT-2's released files lack its prefix, and the routers' biases of DeepSeek's kind are buffers."""
    deepseek = LLAMA | {
        "model_type": "deepseek_v3",
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
    }
    deepseek |= {"topk_group": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 16, "n_shared_experts": 1, **LATENT}
    for given in (MIXTRAL, config("gpt2"), deepseek, config("recurrent_gemma")):
        folder = tmp_path / given["model_type"]
        model = theirs(given)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.linspace(-1, 1, buffer.numel()))
        (model.transformer if given["model_type"] == "gpt2" else model).save_pretrained(folder)
        tokens_bt, _ = drawn()
        auto = filled(folder, given)
        assert error(auto.logits(tokens_bt), model.eval()(input_ids=tokens_bt).logits) < 1e-6, given["model_type"]
        auto.verify(documents=False, device=CPU)
        if given is deepseek:
            assert [name.rpartition(".")[2] for name in auto.persistent()] == ["e_score_correction_bias"]
            with pytest.raises(PlanError, match="e_score_correction_bias"):
                autonumbers.numbers(given)  # no run before checkpoints hold them
    with pytest.raises(CheckpointError, match="32"):
        filled(tmp_path / "gpt2", config("gpt2") | {"n_embd": 64})
    with pytest.raises(CheckpointError, match="lacks"):
        filled(tmp_path / "gpt2", config("gpt2") | {"n_layer": 3})


@pytest.mark.parametrize("kind", [*TINY, "mixtral"])
def test_numbers(kind):
    given = MIXTRAL if kind == "mixtral" else config(kind)
    found, model = autonumbers.numbers(given), theirs(given)
    assert found.parameters() == sum(p.numel() for p in model.parameters())
    assert (found.hidden, found.vocab, found.layers) == (32, 96, 3 if kind == "recurrent_gemma" else 2)
    assert found.tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    assert type(found).model_validate_json(json.dumps(found.model_dump(mode="json"), allow_nan=False)) == found
    again = autonumbers.numbers(found.config)  # the run folder's copy is enough
    assert again == found
    assert found.saved[0] > 0


def test_flops_are_those_of_our_own_formula():
    llama = {"model_type": "llama", **LLAMA, "num_key_value_heads": 2}
    from gigatrain.architectures import from_hf_config

    ours_, found = from_hf_config(llama), autonumbers.numbers(llama)
    assert foreign.native(llama)
    assert not foreign.native(config("gpt_neox"))
    assert found.flops_per_token(17) == ours_.flops_per_token(17)
    assert (found.parameters(), found.matrix_parameters()) == (ours_.parameters(), ours_.matrix_parameters())
    sparse = autonumbers.numbers(MIXTRAL)
    assert sparse.matrices - (sparse.products - 96 * 32) == 2 * 2 * 3 * 32 * 48  # two of four experts in two layers
    assert autonumbers.numbers(config("mamba")).attention == ()


def sharded(rank, kind, cut):
    """FSDP2 by hand over two ranks, each with half of the rows: summed loss and whole gradients."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    given = config(kind)
    auto = Auto(given, recompute="full" if cut else "none")
    mesh = init_device_mesh("cpu", (2,))
    for layer in auto.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(auto, mesh=mesh, reshard_after_forward=True)
    register_fsdp_forward_method(auto, "loss")
    for module in auto.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    auto.to_empty(device="cpu")
    values = {name: p.detach() for name, p in theirs(given).named_parameters()}
    with torch.no_grad():
        for name, parameter in auto.named_parameters():
            local = cast(Any, parameter)._local_tensor
            local.copy_(values[name].chunk(2)[rank] if len(values[name].chunk(2)) > rank else local)
    auto.verify(documents=False, device=CPU)
    tokens_bt, labels_bt = drawn(rows=4)
    loss = auto.loss(tokens_bt[2 * rank : 2 * rank + 2], labels_bt[2 * rank : 2 * rank + 2])[0]
    loss.backward()
    return loss.item(), {name: cast(Any, parameter.grad).full_tensor() for name, parameter in auto.named_parameters()}


@pytest.mark.parametrize(
    ("kind", "cut"),
    [("gpt_neox", False), pytest.param("mamba", True, marks=pytest.mark.long), pytest.param("phi", False, marks=pytest.mark.long)],
)
def test_two_ranks_with_fsdp_are_one(kind, cut):
    auto = ours(theirs(config(kind)), config(kind))
    loss, _ = auto.loss(*drawn(rows=4))
    loss.backward()
    parts = together(2, sharded, kind, cut)
    assert abs(sum(part[0] for part in parts) / loss.item() - 1) < 1e-6
    for name, parameter in auto.named_parameters():
        assert error(parts[0][1][name], parameter.grad) < 2e-6, name


class Training(torch.nn.Module):
    """What DeepSpeed calls: the loss as a forward."""

    def __init__(self, model):
        super().__init__()
        self.decoder = model

    def forward(self, *inputs):
        return self.decoder.loss(*inputs)


def partitioned(rank, kind, stage):
    """Three steps of ZeRO over two ranks, each with half of the rows: the losses."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled
    model = Training(ours(theirs(config(kind)), config(kind)))
    settings = {"train_micro_batch_size_per_gpu": 2, "gradient_clipping": 0.0, "zero_allow_untested_optimizer": True}
    settings["zero_optimization"] = {"stage": stage, "stage3_param_persistence_threshold": 0}
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2), config=settings)
    tokens_bt, labels_bt = (x[2 * rank : 2 * rank + 2] for x in drawn(rows=4))
    losses = []
    for _ in range(3):
        loss = engine(tokens_bt, labels_bt)[0] / 64
        engine.backward(2 * loss)  # of which DeepSpeed takes the mean
        engine.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("kind", "stage"), [pytest.param("gpt_neox", 2, marks=pytest.mark.long), ("phi", 3), pytest.param("mamba", 3, marks=pytest.mark.long)]
)
def test_two_ranks_with_zero_are_one(kind, stage):
    pytest.importorskip("deepspeed")
    auto = ours(theirs(config(kind)), config(kind))
    optimizer = torch.optim.AdamW(auto.parameters(), lr=1e-2)
    found = together(2, partitioned, kind, stage)
    for first, second in zip(*found, strict=True):
        loss = auto.loss(*drawn(rows=4))[0] / 64
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert abs((first + second) / loss.item() - 1) < 1e-6
