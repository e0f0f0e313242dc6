"""Stages on several processes against one process with the whole model: loss and every gradient."""

import functools
import math
from typing import Any

import pytest
import torch
from distributed import together
from matrix import long_but

from gigatrain import config
from gigatrain.architectures import Architecture
from gigatrain.data.loader import Microbatch
from gigatrain.engines import stage
from gigatrain.errors import KernelError
from gigatrain.kernels.ops import choose
from gigatrain.models.decoder import LAYOUT, Decoder, Part
from gigatrain.parallel import shard, tensor
from gigatrain.parallel.mesh import Mesh, alone
from gigatrain.parallel.pipeline import Pipeline
from gigatrain.parallel.places import whole
from gigatrain.parallel.tied import Tied
from gigatrain.planning import layout

SMALL: dict[str, Any] = {
    "family": "qwen3", "vocab": 96, "hidden": 32, "layers": 8, "heads": 4, "kv_heads": 2, "head_dim": 8, "intermediate": 48,
    "window": 5, "window_layers": (False, True), "qkv_bias": True, "output_bias": True,
}  # fmt: skip
GEMMA = {
    "family": "gemma2", "vocab": 96, "hidden": 32, "layers": 8, "heads": 4, "kv_heads": 2, "head_dim": 8, "intermediate": 48, "window": 5, "tied": False,
    "attention_softcap": 20.0, "logit_softcap": 15.0,
}  # fmt: skip
LEAN = dict.fromkeys(("rms_norm", "add_rms_norm", "rope", "qk_norm_rope"), "lean") | {
    "linear_cross_entropy": "chunked",
    "attention": "sdpa",
}
TOKENS = 12


def microbatches(rows: tuple[int, ...], seed: int = 0) -> list[Microbatch]:
    """Of these numbers of rows; every second has documents, and some labels are none."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index, count in enumerate(rows):
        tokens = torch.randint(0, 96, (count, TOKENS), generator=generator)
        labels = torch.where(torch.rand(tokens.shape, generator=generator) < 0.2, -100, tokens.roll(-1, 1))
        documents, positions = None, torch.arange(TOKENS).expand(count, -1)
        if index % 2:
            documents = (positions >= 4).int() + (positions >= 9).int()
            positions = positions - torch.tensor([0, 4, 9])[documents.long()]
        found.append(Microbatch(tokens, labels, positions.contiguous(), documents))
    return found


def fill(model: torch.nn.Module) -> None:
    """Weights by name alone, norms and biases away from their constants; a head tied to an embedding elsewhere has its values."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            tied = name == Tied.HEAD and model.arch.tied  # type: ignore[union-attr]
            generator = torch.Generator().manual_seed(sum(map(ord, Tied.EMBEDDING if tied else name)))
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def make(case: dict[str, Any], part: Part | None = None, dtype: torch.dtype | None = None) -> Decoder:
    architecture = Architecture(**(SMALL | case.get("architecture", {})))
    model = Decoder(
        architecture, choose(case.get("kernels", {})), recompute=case.get("recompute", "none"), dropout=case.get("dropout", 0.0), part=part
    )
    return model.to(case.get("dtype", torch.float32) if dtype is None else dtype)


def reference(case: dict[str, Any], parts: list[Microbatch], share: float) -> tuple[float, float, dict[str, torch.Tensor], Decoder]:
    model = make(case | {"recompute": "none"}, dtype=case.get("compute"))
    fill(model)
    wide = torch.float64 if case.get("dtype") == torch.float64 else torch.float32
    sums = {name: torch.zeros(p.shape, dtype=wide) for name, p in model.named_parameters()}
    loss_sum = nats = 0.0
    for index, part in enumerate(parts):
        seed = torch.tensor(100 + index) if case.get("dropout") else None
        positions = None if part.documents is None else part.positions
        loss, ce = model.loss(part.tokens, part.labels, positions, part.documents, seed=seed, **case.get("terms", {}))
        (loss * share).backward()
        loss_sum, nats = loss_sum + loss.item() * share, nats + ce.item()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            sums[name] += parameter.grad
            parameter.grad = None
    return loss_sum, nats, sums, model


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def train(rank: int, case: dict[str, Any]) -> dict[str, Any]:
    """Two steps of a pipeline; the largest relative errors of this rank."""
    axes = {axis: case.get(axis, 1) for axis in ("pipeline", "shard", "replicate", "tensor")}
    mesh = Mesh(config.Mesh(**axes), rank)
    schedule, ranks = case["schedule"], case["pipeline"]
    each = case.get("stages", 1 if schedule == "1f1b" else 2)
    count = ranks * each
    whole_model = make(case)
    cuts = layout.stages(whole_model.arch, TOKENS, count)
    mine = layout.held(schedule, mesh.index("pipeline"), ranks, each)
    modules = {n: make(case, Part(cuts[n], n == 0, n == count - 1)) for n in mine}
    places = {}
    for module in modules.values():
        fill(module)
        boxes = whole(module)
        if mesh.size("tensor") > 1:
            module.ops = tensor.ops(module.ops, mesh)
            tensor.cut(module, LAYOUT, module.arch, mesh, boxes)
        if mesh.size("shard") > 1:
            dtype = case.get("compute", torch.float32)
            shard.apply(module, mesh, boxes, config.Engine(reshard=case.get("reshard", False)), compute=dtype, stored=torch.float32)
        places |= boxes
    wide = torch.float64 if case.get("dtype") == torch.float64 else torch.float32
    sums = {
        name: torch.full(shard.local(p).shape, float("nan"), dtype=wide)
        for module in modules.values()
        for name, p in module.named_parameters()
    }
    compute = functools.partial(stage.compute, **case.get("terms", {}))
    dtype = case.get("compute", case.get("dtype", torch.float32))
    pipeline = Pipeline(
        modules, count, mesh, schedule=schedule, compute=compute, hidden=32, dtype=dtype, sums=sums, cut=mesh.size("tensor")
    )
    tied = Tied(mesh, schedule) if whole_model.arch.tied else None
    data, readers = mesh.data
    rows = case.get("rows", (2, 2, 2, 1))
    share = 1 / 50
    worst: dict[str, Any] = {"loss": 0.0, "nats": 0.0, "grad": 0.0, "evaluated": 0.0}
    for turn in range(2):
        every = [microbatches(rows, seed=10 * turn + reader) for reader in range(readers)]
        loss_sum, nats_sum, expected, model = reference(case, [part for parts in every for part in parts], share)
        seeds = [torch.tensor(100 + data * len(rows) + i) if case.get("dropout") else None for i in range(len(rows))]
        loss, nats = pipeline.run(tuple(every[data]), torch.tensor(share), seeds)
        loss, nats = (mesh.sum(total, "pipeline", "shard", "replicate") for total in (loss, nats))
        for name, total in sums.items():
            mesh.sum(total, "replicate", *places[name].partial)
        if tied is not None:
            tied.sum(sums)
        for torchs in pipeline._schedules.values():
            kept = torchs._stages if hasattr(torchs, "_stages") else [torchs._stage]
            received = [one for part in kept for infos in (part.args_recv_info, part.grad_recv_info) for one in infos.values()]
            assert all(info.buffer.numel() == 0 for infos in received for info in infos)
            assert all(not part.fwd_cache for part in kept)
        assert all(p.grad is None for module in modules.values() for p in module.parameters())
        worst["loss"] = max(worst["loss"], abs(loss.item() - loss_sum) / abs(loss_sum))
        worst["nats"] = max(worst["nats"], abs(nats.item() - nats_sum) / nats_sum)
        for module in modules.values():
            for name, parameter in module.named_parameters():
                right = places[name].of(expected[Tied.EMBEDDING if name == Tied.HEAD and tied else name])
                assert sums[name].shape == right.shape == shard.local(parameter).shape
                worst["grad"] = max(worst["grad"], apart(sums[name], right))
        if turn == 0:  # between two steps
            for module in modules.values():
                module.eval()
            held_out = list(microbatches((2, 2, 1, 2, 1, 2, 2, 2, 2), seed=5))
            for parts in (held_out, held_out[:1]):
                found = mesh.sum(pipeline.evaluate(iter(parts)), "pipeline").item()
                model.eval()
                with torch.no_grad():
                    right = sum(
                        model.loss(p.tokens, p.labels, None if p.documents is None else p.positions, p.documents)[1].item() for p in parts
                    )
                worst["evaluated"] = max(worst["evaluated"], abs(found - right) / right)
            for module in modules.values():
                module.train()
    return worst


SCHEDULES = ("1f1b", "interleaved", "zbv")


def several(rank: int, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [train(rank, case) for case in cases]


def check(*cases: dict[str, Any], limit: float = 1e-6) -> None:
    """Cases of equal meshes, one after the other in the same processes."""
    ranks = math.prod(cases[0].get(axis, 1) for axis in ("pipeline", "shard", "replicate", "tensor"))
    for rank, found in enumerate(together(ranks, several, list(cases), timeout_s=200)):
        for case, worst in zip(cases, found, strict=True):
            assert all(error <= limit for error in worst.values()), (rank, case, worst)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_two_ranks_give_one_ranks_loss_and_gradients(schedule):
    case = {"pipeline": 2, "schedule": schedule}
    check(case, case | {"architecture": {"tied": True}}, case | {"kernels": LEAN, "recompute": "lean"}, limit=5e-7)


@pytest.mark.parametrize("schedule", long_but([2], SCHEDULES))
def test_four_ranks_with_few_and_many_microbatches(schedule):
    """No order of sends and receives locks up; fewer microbatches than ranks too, where the schedule takes them."""
    counts = {"1f1b": (4, 5, 8), "interleaved": (2, 4, 6, 8), "zbv": (1, 3, 8)}[schedule]
    check(*({"pipeline": 4, "schedule": schedule, "rows": (1,) * count, "architecture": {"tied": count == 8}} for count in counts))


@pytest.mark.parametrize("schedule", long_but([1], SCHEDULES))
def test_recomputed_layers_and_dropout(schedule):
    terms = {"z_loss": 1e-3, "label_smoothing": 0.1}
    case = {"pipeline": 2, "schedule": schedule, "dropout": 0.2, "terms": terms, "architecture": GEMMA, "rows": (2, 1)}
    check(case, case | {"recompute": "selective"}, case | {"recompute": "full", "kernels": LEAN | {"attention": "reference"}})


def test_three_stages_a_rank():
    check({"pipeline": 2, "schedule": "interleaved", "stages": 3, "rows": (2, 1, 2, 1, 2, 2)})


@pytest.mark.parametrize("schedule", long_but([0], SCHEDULES))
def test_sums_are_fp32_where_weights_are_bf16(schedule):
    """Equal to the sums of one process; sixteen bf16 gradients summed in bf16 would be 1e-3 apart."""
    check({"pipeline": 2, "schedule": schedule, "dtype": torch.bfloat16, "rows": (1,) * 16})


@pytest.mark.parametrize("schedule", long_but([0], SCHEDULES))
def test_with_sharded_weights(schedule):
    case = {"pipeline": 2, "shard": 2, "schedule": schedule}
    check(
        case | {"architecture": {"tied": True}},
        case | {"compute": torch.bfloat16, "rows": (1,) * 8},
        case | {"recompute": "full", "reshard": True},
    )


@pytest.mark.parametrize("schedule", long_but([2], SCHEDULES))
def test_with_shared_matrices(schedule):
    """In fp64, since shared matrices add up in another order; the loss itself is summed in fp32."""
    case = {"pipeline": 2, "tensor": 2, "schedule": schedule, "architecture": {"tied": True}, "kernels": LEAN, "dtype": torch.float64}
    check(case, limit=2e-7)


def test_a_user_error_of_a_stage_stays_one():
    """Torch's schedules wrap what a stage raises."""

    class Wrapping:
        def step(self, **_: Any) -> None:
            raise RuntimeError("in a schedule") from KernelError("no such kernel")

    module = make({}, Part(range(8), True, True))
    sums = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    pipeline = Pipeline({0: module}, 1, alone(), schedule="1f1b", compute=compute_nothing, hidden=32, dtype=torch.float32, sums=sums)
    pipeline._schedules[2, True] = Wrapping()
    with pytest.raises(KernelError, match="no such kernel"):
        pipeline.run(microbatches((1, 1)), torch.ones(()), [None, None])


def counted(rank: int) -> list[tuple[Any, ...]]:
    """(schedule, ranks, each, microbatches, most live activations of every rank by torch's own order)."""
    found = []
    for schedule, each in (("1f1b", 1), ("interleaved", 2), ("interleaved", 3), ("zbv", 2)):
        mesh = Mesh(config.Mesh(pipeline=4, shard=1), rank)
        count = 4 * each
        modules = {n: torch.nn.Identity() for n in layout.held(schedule, rank, 4, each)}  # type: ignore[arg-type]
        pipeline = Pipeline(modules, count, mesh, schedule=schedule, compute=compute_nothing, hidden=1, dtype=torch.float32, sums={})
        for n in (4, 6, 8, 16):
            order = pipeline._made(n, True)._get_pipeline_order() if schedule == "1f1b" else pipeline._made(n, True).pipeline_order
            ends = "B" if schedule != "zbv" else "W"
            most = []
            for actions in order.values():
                live = peak = 0
                for action in (str(one) for one in actions if one is not None):
                    kind = action.lstrip("0123456789")[0]
                    live += (kind == "F") - (kind == ends)
                    peak = max(peak, live)
                most.append(peak)
            found.append((schedule, 4, each, n, most))
    return found


def compute_nothing(*_: Any) -> Any:
    raise AssertionError


def test_live_activations_are_those_of_torchs_order():
    for schedule, ranks, each, count, most in together(4, counted)[0]:
        assert [layout.live(schedule, rank, ranks, each, count) for rank in range(ranks)] == most, (schedule, each, count)


def copies(rank: int, schedule: str) -> tuple[list[float], list[float]]:
    mesh = Mesh(config.Mesh(pipeline=4, shard=1), rank)
    tied = Tied(mesh, schedule)
    mine = {
        name: torch.full((3,), value + rank)
        for name, value, here in ((Tied.EMBEDDING, 1.0, tied.first), (Tied.HEAD, 10.0, tied.last))
        if here
    }
    assert [tied.counts(name) for name in (Tied.EMBEDDING, Tied.HEAD, "other")] == [True, False, True]
    tied.sum(mine)
    summed = [tensor[0].item() for tensor in mine.values()]
    for name, tensor_ in mine.items():
        tensor_.fill_(5.0 if name == Tied.EMBEDDING else 7.0)
    tied.align(mine)
    return summed, [tensor[0].item() for tensor in mine.values()]


def test_a_tied_embedding_has_one_gradient_and_one_value():
    assert together(4, copies, "1f1b") == [([14.0], [5.0]), ([], []), ([], []), ([14.0], [5.0])]
    assert together(4, copies, "zbv") == [([11.0, 11.0], [5.0, 5.0]), ([], []), ([], []), ([], [])]
