"""Real checkpoints of other systems, by those systems, become transformers folders with the same weights."""

import json
from pathlib import Path

import foreigners
import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from distributed import together
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh

from gigatrain import cli, load
from gigatrain.errors import CheckpointError, RunError
from gigatrain.importing import sources
from gigatrain.importing.convert import convert
from gigatrain.importing.names import Halved


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """config.json and the model of it."""
    folder = tmp_path_factory.mktemp("foreign")
    module = foreigners.model()
    module.config.architectures = ["LlamaForCausalLM"]
    module.config.save_pretrained(folder)
    return folder / "config.json", module


def all_equal(folder, expected, dtype=None):
    found = {name: tensor for path in Path(folder).glob("model*.safetensors") for name, tensor in load_file(path).items()}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], torch.as_tensor(tensor).to(dtype or found[name].dtype)), name


def whole(source):
    return {name: tensor.rows(0, tensor.shape[0] if tensor.shape else 1) for name, tensor in source.weights.items()}


def test_a_state_dict_becomes_a_model_by_the_command(begun, tmp_path, capsys):
    config, module = begun
    wrapped = {
        "model": {f"module._orig_mod.{name}": tensor for name, tensor in module.state_dict().items()},
        "optimizer": {"state": {}},
        "step": 7,
    }
    torch.save(wrapped, tmp_path / "last.pt")
    cli.main(["import", str(tmp_path / "last.pt"), str(tmp_path / "out"), "--config", str(config), "--max-shard-size", "1MB"])
    said = capsys.readouterr().out
    assert "not taken: optimizer, step" in said
    assert "read without unpickling, in a process with walls around" in said
    all_equal(tmp_path / "out", module.state_dict())
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    tokens = torch.arange(20).view(2, 10)
    assert torch.equal(theirs(tokens).logits, module(tokens).logits)
    with pytest.raises(RunError, match="did not import, and would be lost"):
        convert(tmp_path / "last.pt", config.parent, config=config)
    with pytest.raises(SystemExit):
        cli.main(["import", str(tmp_path / "none"), str(tmp_path / "out2"), "--config", str(config)])
    assert "there is no file or folder" in capsys.readouterr().err
    assert not (tmp_path / "out2").exists()


@pytest.mark.long
def test_a_recipe_gives_the_numbers_and_starts_from_what_was_imported(tiny, begun, tmp_path):
    _, module = begun
    torch.save(module.state_dict(), tmp_path / "last.pt")
    recipe = load.recipe(tiny, ["model.architecture.tied=false"])
    convert(tmp_path / "last.pt", tmp_path / "out", recipe=recipe, dtype="bf16")
    all_equal(tmp_path / "out", module.state_dict(), torch.bfloat16)
    again = load.recipe(tiny, [f'model={{from="{tmp_path / "out"}"}}'])
    assert load.architecture(again.model).parameters() == load.architecture(recipe.model).parameters()
    with pytest.raises(CheckpointError, match=r"lacks model.layers.2..* of a llama of these numbers"):
        convert(
            tmp_path / "last.pt", tmp_path / "x", recipe=load.recipe(tiny, ["model.architecture.tied=false", "model.architecture.layers=3"])
        )
    with pytest.raises(CheckpointError, match=r"model.embed_tokens.weight is \[320, 32\] in the state dict.*but \[321, 32\]"):
        convert(
            tmp_path / "last.pt",
            tmp_path / "x",
            recipe=load.recipe(tiny, ["model.architecture.tied=false", "model.architecture.vocab=321"]),
        )


def _dcp_saved(rank, folder):
    """Sharded over two ranks by FSDP2, with an optimizer beside it."""
    from torch.distributed.checkpoint.state_dict import get_state_dict

    module = foreigners.model()
    fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    tokens = torch.arange(16).view(1, 16) + rank
    module(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    weights, states = get_state_dict(module, optimizer)
    dcp.save({"model": weights, "optimizer": states, "step": 3}, checkpoint_id=folder)
    return {name: tensor.full_tensor().numpy() for name, tensor in weights.items()}  # type: ignore[union-attr]


def test_a_sharded_dcp_folder_is_put_together_from_its_chunks(begun, tmp_path):
    expected = together(2, _dcp_saved, str(tmp_path / "dcp"))[0]
    made = convert(tmp_path / "dcp", tmp_path / "out", config=begun[0])
    assert (made.kind, made.tensors) == ("torch DCP", len(expected))
    assert "optimizer" in made.left
    all_equal(tmp_path / "out", expected)
    source = sources.found(tmp_path / "dcp")
    tensor = source.weights["model.model.embed_tokens.weight"]
    for start, stop in ((0, 320), (159, 161), (160, 200), (3, 4)):
        assert torch.equal(tensor.rows(start, stop), torch.as_tensor(expected["model.embed_tokens.weight"])[start:stop])
    (tmp_path / "dcp" / "__1_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"__1_0.distcp cannot be read: No such file"):
        convert(tmp_path / "dcp", tmp_path / "out2", config=begun[0])
    assert not (tmp_path / "out2").exists()


TITAN = {
    "tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head", "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj", "feed_forward.w3": "mlp.up_proj",
}  # fmt: skip


def test_torchtitan_names_and_order_of_rows(begun, tmp_path):
    """Its rotation of neighbouring channels on its own order of rows gives the scores of transformers' on the imported order."""
    config, module = begun
    state, titan = module.state_dict(), {}
    for mine, theirs in TITAN.items():
        for name in state:
            if name.endswith(f"{theirs}.weight"):
                tensor = state[name]
                if mine in ("attention.wq", "attention.wk"):  # halves to pairs
                    heads = 4 if mine == "attention.wq" else 2
                    tensor = tensor.view(heads, 2, 4, 32).transpose(1, 2).reshape(-1, 32)
                layer = f"layers.{name.split('.')[2]}." if ".layers." in name else ""
                titan[f"{layer}{mine}.weight"] = tensor
    assert len(titan) == len(state)
    dcp.save({"model": titan, "freqs_cis": torch.ones(3)}, checkpoint_id=str(tmp_path / "dcp"))
    convert(tmp_path / "dcp", tmp_path / "out", config=config)
    all_equal(tmp_path / "out", state)
    # A head of 8 channels by both rotations, as scores of a query at 5 and a key at 2.
    q, k = torch.randn(8, 32), torch.randn(8, 32)
    x, angles = torch.randn(32), 1e4 ** (-torch.arange(4) / 4)

    def pairs(w, at):
        return torch.view_as_complex((w @ x).view(4, 2)) * torch.polar(torch.ones(4), at * angles)

    def halves(w, at):
        a, b = (w @ x).chunk(2)
        return torch.cat([a * (at * angles).cos() - b * (at * angles).sin(), b * (at * angles).cos() + a * (at * angles).sin()])

    score = torch.view_as_real(pairs(q, 5)).flatten() @ torch.view_as_real(pairs(k, 2)).flatten()
    turned = [Halved(_Held(w), 1).rows(0, 8) for w in (q, k)]
    torch.testing.assert_close(halves(turned[0], 5) @ halves(turned[1], 2), score)


class _Held:
    def __init__(self, tensor):
        self.tensor, self.shape, self.dtype = tensor, tuple(tensor.shape), tensor.dtype

    def rows(self, start, stop):
        return self.tensor[start:stop]


@pytest.mark.parametrize(
    ("zero", "precision"),
    [
        pytest.param(1, "fp32", marks=pytest.mark.long),
        pytest.param(1, "bf16", marks=pytest.mark.long),
        pytest.param(2, "fp32", marks=pytest.mark.long),
        pytest.param(3, "fp32", marks=pytest.mark.long),
    ],
)
def test_deepspeed_checkpoints_give_the_masters_that_deepspeed_says_it_holds(begun, tmp_path, zero, precision):
    expected = together(2, foreigners.deepspeed_saved, str(tmp_path / "ds"), zero, precision)[0]
    made = convert(tmp_path / "ds", tmp_path / "out", config=begun[0])  # by its file `latest`
    assert made.kind == f"DeepSpeed ZeRO-{zero} of 2 ranks"
    all_equal(tmp_path / "out", expected)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    if zero == 1 and precision == "fp32":
        source = sources.found(tmp_path / "ds" / "step2")
        next((tmp_path / "ds" / "step2").glob("*zero_pp_rank_1*")).unlink()
        with pytest.raises(CheckpointError, match="saved by 2 ranks and holds the files of 1"):
            sources.found(tmp_path / "ds" / "step2")
        assert len(source.weights) == len(expected)


@pytest.mark.long
def test_deepspeed_universal(begun, tmp_path):
    expected = together(2, foreigners.deepspeed_saved, str(tmp_path / "ds"), 1, "bf16")[0]
    foreigners.universal(tmp_path / "ds" / "step2", tmp_path / "universal")
    made = convert(tmp_path / "universal", tmp_path / "out", config=begun[0])
    assert made.kind == "DeepSpeed universal"
    all_equal(tmp_path / "out", expected)
