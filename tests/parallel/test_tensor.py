"""Tensor parallelism against the uncut decoder: losses, every gradient, weights after updates, and what is sent."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from distributed import together
from matrix import long_but
from torch import Tensor, distributed
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from gigatrain import config
from gigatrain.architectures import Architecture
from gigatrain.kernels.ops import REFERENCE, Ops, choose
from gigatrain.models.decoder import LAYOUT, Decoder, initial
from gigatrain.parallel import tensor
from gigatrain.parallel.mesh import Mesh
from gigatrain.parallel.places import Place, Places, chunk, whole

FAST = choose(
    {"rms_norm": "lean", "add_rms_norm": "lean", "rope": "lean", "qk_norm_rope": "lean", "attention": "sdpa"}
    | {"linear_cross_entropy": "chunked"}
)
SIZES: dict[str, Any] = {"vocab": 64, "hidden": 32, "layers": 2, "heads": 4, "kv_heads": 4, "head_dim": 8, "intermediate": 48}
ROPE = {"theta": 100.0}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama", "kv_heads": 2},
    "llama-biases": {"family": "llama", "qkv_bias": True, "output_bias": True, "mlp_bias": True, "kv_heads": 1},
    "qwen2": {"family": "qwen2", "tied": True},
    "qwen3": {"family": "qwen3", "kv_heads": 2},
    "gemma2": {"family": "gemma2", "window": 5, "attention_softcap": 4.0, "logit_softcap": 3.0},
    "olmo2": {"family": "olmo2"},
    "olmo3": {"family": "olmo3", "window": 5, "window_layers": (True, False)},
    "apertus": {"family": "apertus", "qkv_bias": True, "output_bias": True},
    "arcee": {"family": "arcee", "mlp_bias": True, "kv_heads": 2},
    "smollm3": {"family": "smollm3", "rope_layers": (True, False)},
    "mixtral": {"family": "mixtral", "experts": 4, "experts_per_token": 2},
    "qwen3-moe": {"family": "qwen3_moe", "experts": 4, "experts_per_token": 2, "expert_intermediate": 24, "moe_layers": (False, True)},
    "granite": {"family": "granite", "embedding_scale": 6.5, "residual_scale": 0.22, "logit_divisor": 3.0},
}


def architecture(name: str) -> Architecture:
    return Architecture.model_validate(SIZES | {"rope": ROPE} | FAMILIES[name])


def start(name: str, parameter: str, shape: Any) -> Tensor:
    """A whole first weight, no norm, bias or scalar at its constant."""
    found = initial(parameter, shape, architecture(name), 0.2, False, 0, "cpu").double()
    if found.dim() == 1:
        found += 0.3 * torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(parameter)))
    return found


def uncut(name: str, dtype: torch.dtype, ops: Ops = REFERENCE, **options: Any) -> Decoder:
    model = Decoder(architecture(name), ops, **options).to(dtype)
    with torch.no_grad():
        for parameter, value in model.named_parameters():
            value.copy_(start(name, parameter, value.shape))
    return model


def shared(name: str, mesh: Mesh, dtype: torch.dtype, ops: Ops = REFERENCE, **options: Any) -> tuple[Decoder, Places]:
    arch = architecture(name)
    with torch.device("meta"):
        model = Decoder(arch, tensor.ops(ops, mesh), **options)
    places = whole(model)
    tensor.cut(model, LAYOUT, arch, mesh, places)
    model.to(dtype).to_empty(device="cpu")
    assert set(places) == {name for name, _ in model.named_parameters()}
    with torch.no_grad():
        for parameter, value in model.named_parameters():
            assert tuple(value.shape) == places[parameter].size
            value.copy_(places[parameter].of(start(name, parameter, places[parameter].shape)))
    return model, places


def batch(rows: int = 3, tokens: int = 16, seed: int = 0) -> dict[str, Any]:
    """Packed samples with masked labels; the first row is two documents."""
    generator = torch.Generator().manual_seed(seed)
    tokens_bt = torch.randint(0, SIZES["vocab"], (rows, tokens), generator=generator)
    labels_bt = torch.where(torch.rand((rows, tokens), generator=generator) < 0.2, -100, tokens_bt.roll(-1, 1))
    positions, documents = torch.arange(tokens).repeat(rows, 1), torch.zeros(rows, tokens, dtype=torch.int32)
    positions[0, 7:] -= 7
    documents[0, 7:] = 1
    return {"tokens_bt": tokens_bt, "labels_bt": labels_bt, "positions_bt": positions, "documents_bt": documents}


def summed(place: Place, grad: Tensor, mesh: Mesh) -> Tensor:
    """A gradient as the engine sees it: partial ones are summed."""
    return mesh.sum(grad.clone(), *place.partial) if place.partial else grad


def differences(model: Decoder, places: Places, oracle: Decoder, mesh: Mesh) -> dict[str, float]:
    """Of every parameter: norm of the gradient's error over the norm of the whole gradient."""
    whole_grads = {name: parameter.grad for name, parameter in oracle.named_parameters()}
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        exact = whole_grads[name]
        assert exact is not None
        error = summed(places[name], parameter.grad, mesh) - places[name].of(exact)
        found[name] = error.norm().item() / exact.norm().item()
    return found


TERMS: dict[str, Any] = {"z_loss": 1e-2, "label_smoothing": 0.1}


def _gradients(rank: int, ranks: int, names: list[str], dtype: torch.dtype, options: dict[str, Any]) -> list[tuple[str, float]]:
    mesh, found = Mesh(config.Mesh(shard=1, tensor=ranks), rank), []
    seed = torch.tensor(3) if options.get("dropout") else None
    for name in names:
        for ops in (REFERENCE, FAST) if ranks == 2 else (FAST,):
            oracle = uncut(name, dtype, ops, dropout=options.get("dropout", 0.0))
            model, places = shared(name, mesh, dtype, ops, **options)
            for inputs in (batch(), {key: value for key, value in batch(2, 12).items() if key in ("tokens_bt", "labels_bt")}):
                exact, exact_ce = oracle.loss(**inputs, **TERMS, seed=seed)
                loss, ce = model.loss(**inputs, **TERMS, seed=seed)
                (exact / 40).backward()
                (loss / 40).backward()
                found += [(f"{name} loss", abs(loss / exact - 1).item()), (f"{name} ce", abs(ce / exact_ce - 1).item())]
            found += [(f"{name} {parameter}", error) for parameter, error in differences(model, places, oracle, mesh).items()]
            with torch.no_grad():
                evaluated, _ = model.eval().loss(**batch())
                found.append((f"{name} evaluation", abs(evaluated / oracle.eval().loss(**batch())[0] - 1).item()))
    return found


@pytest.mark.parametrize("ranks", long_but([0], [2, 4]))
def test_loss_and_every_gradient_are_those_of_the_uncut_decoder(ranks: int) -> None:
    for found in together(ranks, _gradients, ranks, list(FAMILIES), torch.float64, {}):
        assert len({name for name, _ in found}) > 200
        assert max(found, key=lambda pair: pair[1])[1] <= 1e-12, max(found, key=lambda pair: pair[1])


@pytest.mark.parametrize("recompute", ["none", "lean", "selective", "full"])
def test_recomputation_and_dropout_change_nothing(recompute: str) -> None:
    """A rank's dropout mask is its part of the whole one."""
    for found in together(2, _gradients, 2, ["qwen3", "olmo2", "arcee"], torch.float64, {"recompute": recompute, "dropout": 0.3}):
        assert max(found, key=lambda pair: pair[1])[1] <= 1e-12, max(found, key=lambda pair: pair[1])


def test_losses_in_single_precision() -> None:
    for found in together(2, _gradients, 2, ["llama", "gemma2"], torch.float32, {}):
        assert max(error for name, error in found if name.endswith(("loss", "ce", "evaluation"))) <= 1e-6


def _rounded(rank: int, name: str, dtype: torch.dtype) -> list[tuple[float, float]]:
    """Errors of all gradients against fp64, of the cut and of the uncut model, whose weights are rounded alike."""
    mesh = Mesh(config.Mesh(shard=1, tensor=2), rank)
    model, places = shared(name, mesh, dtype)
    plain, oracle = uncut(name, dtype), uncut(name, dtype).double()
    exact_loss, loss, plain_loss = (each.loss(**batch())[0] for each in (oracle, model, plain))
    for value in (loss, plain_loss, exact_loss):
        value.backward()
    found = [(abs(loss - exact_loss).item(), abs(plain_loss - exact_loss).item())]
    for (parameter, ours), (_, theirs), (_, exact) in zip(*(each.named_parameters() for each in (model, plain, oracle)), strict=True):
        assert not any(each.grad is None for each in (ours, theirs, exact))
        box = places[parameter].of(exact.grad)
        pair = (summed(places[parameter], ours.grad, mesh), places[parameter].of(theirs.grad))
        found.append(tuple((grad - box).norm().item() for grad in pair))  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "apertus"])
def test_errs_at_most_twice_as_much_as_uncut(name: str, dtype: torch.dtype) -> None:
    for found in together(2, _rounded, name, dtype):
        ours, theirs = (math.hypot(*errors) for errors in zip(*found, strict=True))
        assert ours <= 2 * theirs, (ours, theirs)


class _Sent(TorchDispatchMode):
    """Counts collectives, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).split(".")
        if "c10d" in name[0] and name[1] != "wait_tensor":
            self.counts[name[1]] += 1
        return func(*args, **(kwargs or {}))


def _sent(rank: int, name: str, recompute: str, layers: int) -> list[dict[str, int]]:
    mesh = Mesh(config.Mesh(shard=1, tensor=2), rank)
    sizes = architecture(name).model_copy(update={"layers": layers})
    with torch.device("meta"):
        model = Decoder(sizes, tensor.ops(FAST, mesh), recompute=recompute)  # type: ignore[arg-type]
    tensor.cut(model, LAYOUT, sizes, mesh, whole(model))
    model.to_empty(device="cpu").init_weights(0.1, False, 0)
    with _Sent() as forward:
        loss, _ = model.loss(**batch())
    with _Sent() as backward:
        loss.backward()
    return [dict(forward.counts), dict(backward.counts)]


@pytest.mark.parametrize(
    ("recompute", "gathered", "scattered"),
    [
        ("none", 2, 2),
        ("lean", 4, 2),  # each block's input is gathered again rather than kept
        ("full", 4, 3),  # the last scatter of a layer is not made again: nothing asks for it
        ("selective", 4, 3),
    ],
)
def test_collectives_of_a_layer(recompute: str, gathered: int, scattered: int) -> None:
    for name in ("llama", "apertus"):
        counts = [together(2, _sent, name, recompute, layers)[0] for layers in (1, 3)]
        layer = [
            {op: (more.get(op, 0) - few.get(op, 0)) / 2 for op in more if more.get(op, 0) != few.get(op, 0)}
            for few, more in zip(*counts, strict=True)
        ]
        assert layer == [
            {"all_gather_into_tensor": 2, "reduce_scatter_tensor": 2},
            {"all_gather_into_tensor": gathered, "reduce_scatter_tensor": scattered},
        ]


def _trained(rank: int, name: str) -> float:
    """Two updates on four ranks, weights sharded by FSDP2 over two of them: the largest relative error of a weight's whole change."""
    mesh = Mesh(config.Mesh(shard=2, tensor=2), rank)
    model, places = shared(name, mesh, torch.float64)
    weights = mesh.torch(("shard", "context"))
    for unit in (*model.layers, model):
        fully_shard(unit, mesh=weights)
    register_fsdp_forward_method(model, "loss")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
    oracle = uncut(name, torch.float64)
    first = {parameter: value.detach().clone() for parameter, value in oracle.named_parameters()}
    share, _ = mesh.data
    for step in range(2):
        parts = [batch(seed=2 * step + index) for index in range(2)]
        for part in parts:
            (oracle.loss(**part)[0] / 90).backward()
        (model.loss(**parts[share])[0] / 90).backward()
        with torch.no_grad():
            for value in oracle.parameters():
                value.sub_(0.1 * value.grad)  # type: ignore[operator]
                value.grad = None
            for parameter, value in model.named_parameters():
                assert isinstance(value, DTensor)
                assert isinstance(value.grad, DTensor)
                value.to_local().sub_(0.1 * summed(places[parameter], value.grad.to_local(), mesh))
                value.grad = None
    worst = 0.0
    for parameter, value in model.named_parameters():
        assert isinstance(value, DTensor)
        place = places[parameter]
        box = place.cut(0, *chunk(place.size[0], mesh.index("shard"), 2))
        exact = dict(oracle.named_parameters())[parameter]
        worst = max(worst, ((value.to_local() - box.of(exact)).norm() / (exact - first[parameter]).norm()).item())
    return worst


@pytest.mark.parametrize("name", ["qwen2", "apertus", "olmo2"])
def test_two_updates_under_fsdp_give_the_same_weights(name: str) -> None:
    assert max(together(4, _trained, name)) <= 1e-12


def _compiled(rank: int, name: str, recompute: str, backend: str) -> float:
    mesh = Mesh(config.Mesh(shard=1, tensor=2), rank)
    oracle = uncut(name, torch.float64)
    model, places = shared(name, mesh, torch.float64, recompute=recompute)
    for layer in model.layers:
        layer.compile(fullgraph=True, backend=backend)
    for rows in (3, 2):  # the second with a size that the first trace has not seen
        for each in (oracle, model):
            (each.loss(**batch(rows))[0] / 40).backward()
    return max(differences(model, places, oracle, mesh).values())


@pytest.mark.parametrize(
    ("name", "recompute", "backend"),
    [
        ("qwen3", "none", "aot_eager"),
        ("olmo2", "full", "aot_eager"),
        ("llama-biases", "selective", "aot_eager"),
        ("gemma2", "none", "inductor"),
    ],
)
@pytest.mark.long
def test_layers_compile_as_one_graph(name: str, recompute: str, backend: str) -> None:
    assert max(together(2, _compiled, name, recompute, backend)) <= 1e-12


def _refused(rank: int) -> str:
    from gigatrain.errors import RunError

    mesh = Mesh(config.Mesh(shard=1, tensor=2), rank)
    with pytest.raises(RunError) as raised:
        tensor.pipeline_products(mesh)
    assert distributed.get_world_size() == 2
    return str(raised.value)


def test_async_is_refused_without_cuda() -> None:
    assert all("engine.async_tensor = false" in text for text in together(2, _refused))
