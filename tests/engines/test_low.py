"""The low-precision lane in a whole run: every engine and cut of the model, exact resumption, the start-up check, and losses that follow bf16's."""

import json

import pytest
import torch
from distributed import together
from matrix import long_but
from programs import program
from test_meshes import BASE, batch, joined, trained

from gigatrain import engines, load, loop
from gigatrain.engines import low, ready
from gigatrain.engines.native import Native
from gigatrain.errors import KernelError, PlanError, RunError
from gigatrain.kernels import fp8, fp8_linear, linear
from gigatrain.kernels.linear import Linear
from gigatrain.parallel.mesh import alone
from gigatrain.planning.plan import plan

LOW = ("train.precision=fp8", "fp8.emulate=true", "fp8.least=[16, 16]")
FORMS = {
    "rowwise": (),
    "delayed": ("fp8.scaling=tensorwise", "fp8.amax=delayed", "fp8.history=3"),
    "nvfp4": ("fp8.scaling=nvfp4", "model.architecture.hidden=64", "model.architecture.head_dim=16", "model.architecture.intermediate=64"),
}


def made(tiny, *overrides):
    return plan(load.recipe(tiny, (*LOW, *overrides)), load.site("laptop"))


def losses(folder):
    return [line.get("loss", line.get("val_loss")) for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())]


def test_each_matrix_has_the_product_that_the_plan_says(tiny):
    found = made(tiny, 'fp8.high=["k_proj"]')
    engine = Native(found, alone(), torch.device("cpu"))
    products = {name.split(".")[-1]: module.product for name, module in engine.model.named_modules() if isinstance(module, Linear)}
    assert products.pop("k_proj") is linear.reference
    assert products.keys() == {"q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len({id(product) for product in products.values()}) == 1  # one, so that layers share codes
    assert not isinstance(engine.model.lm_head, Linear)


def test_a_matrix_that_the_plan_does_not_name_is_refused(tiny):
    found = made(tiny)
    assert found.fp8 is not None
    lacking = found.model_copy(update={"fp8": found.fp8.model_copy(update={"low": found.fp8.low[1:]})})
    with pytest.raises(PlanError, match=r"does not know the matrix model.layers.0.self_attn.q_proj"):
        engines.make(lacking, alone(), torch.device("cpu"), fresh=True)


@pytest.mark.parametrize("form", long_but([0], FORMS))
def test_a_resumed_run_is_the_unbroken_one(tiny, tmp_path, form):
    """Delayed scales come back with the checkpoint, stochastic rounding with the random state; validations in between change nothing."""
    overrides = (*FORMS[form], "train.recompute=full", "export=false", "train.steps=6")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    loop.train(made(tiny, *overrides), whole)
    engine_step, steps = Native.step, []

    def failing(self, rate):
        steps.append(rate)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return engine_step(self, rate)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Native, "step", failing)
        with pytest.raises(KeyboardInterrupt):
            loop.train(made(tiny, *overrides), broken)
    loop.train(made(tiny, *overrides), broken, start="resume")
    assert losses(broken)[-1] == losses(whole)[-1]


def test_delayed_scales_follow_a_released_step_as_any_other(tiny):
    overrides = (*FORMS["delayed"], "optim.clip=false")
    found = []
    for release in ("false", "true"):
        engine = engines.make(made(tiny, *overrides, f"train.release={release}"), alone(), torch.device("cpu"), fresh=True)
        assert isinstance(engine, Native)
        for step in range(3):
            engine.forward_backward(batch(engine.plan, step, 0, 1))
            engine.step(1.0)
        found.append(engine._delayed[0])
    assert not found[1].fresh
    assert torch.equal(found[0].scales, found[1].scales)


MESHES = {
    "fsdp": ("mesh.shard=2",),
    "tensor": ("mesh.tensor=2", "model.architecture.hidden=64", "model.architecture.head_dim=16"),
    "pipeline": ("mesh.pipeline=2",),
    "delayed over copies": ("mesh.shard=1", "mesh.replicate=2", "fp8.scaling=tensorwise", "fp8.amax=delayed"),
}


@pytest.mark.parametrize("name", MESHES)
def test_every_cut_trains_as_one_process_does_but_for_what_shares_a_scale(tiny, name):
    """Scales of a weight gradient's operands are over a rank's own tokens, and of a cut matrix over its share: losses agree to the format's noise."""
    forms = tuple(one for one in MESHES[name] if not one.startswith("mesh."))
    overrides = (*BASE, *LOW, "train.batch=4", "train.microbatch=2", *forms)
    ((expected, _, held),) = [trained(0, tiny, overrides, 1, 4)]
    found = together(2, trained, tiny, (*overrides, *MESHES[name]), 2, 4)
    for numbers, _, other in found:
        for (loss, _, targets), (known, _, counted) in zip(numbers, expected, strict=True):
            assert targets == counted
            assert loss == pytest.approx(known, rel=2e-3)
        assert other[0] == pytest.approx(held[0], rel=2e-3)
    joined([pieces for _, pieces, _ in found])


@pytest.mark.long
def test_zero_trains_so_too(tiny):
    overrides = (*BASE, *LOW, "train.batch=4", "train.microbatch=2", "optim.name=adamw")
    expected, _, _ = trained(0, tiny, overrides, 1, 3)
    for numbers, _, _ in together(2, trained, tiny, (*overrides, "engine.name=deepspeed", "engine.zero=3"), 2, 3):
        assert [n[0] for n in numbers] == pytest.approx([n[0] for n in expected], rel=2e-3)


def test_a_gpu_without_the_format_is_refused_at_the_start(tiny, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200")
    found = made(
        tiny, "fp8.scaling=mxfp8", "model.architecture.hidden=64", "model.architecture.head_dim=32", "model.architecture.intermediate=64"
    )
    assert found.fp8 is not None
    gpu = found.model_copy(update={"device": "cuda", "fp8": found.fp8.model_copy(update={"emulate": False})})
    with pytest.raises(
        RunError, match=r"mxfp8 needs tensor cores with block scales .* NVIDIA H200 has 9.0; choose another, or set fp8.emulate = true"
    ):
        ready.prepare(gpu)
    ready.prepare(found.model_copy(update={"device": "cuda"}))  # emulated, it runs


def test_the_check_at_the_start_passes_and_finds_what_is_wrong(tiny, monkeypatch):
    found = made(tiny)
    fused = found.model_copy(
        update={"kernels": tuple(c.model_copy(update={"kernel": "fused"}) if c.op == "quantise" else c for c in found.kernels)}
    )
    low.verify(fused, torch.device("cpu"))
    right = fp8.fused

    def off(*inputs, **options):
        codes, scales, *rest = right(*inputs, **options)
        codes.view(torch.uint8).view(-1)[3:4].add_(1)
        return codes, scales, *rest

    monkeypatch.setattr(fp8, "fused", off)
    with pytest.raises(
        KernelError,
        match=r"self_attn.q_proj: the fused quantiser's input \(272, 32\) is not plain torch's on this device: 1 of 8,704 codes from \[0, 3\]",
    ):
        low.verify(fused, torch.device("cpu"))
    monkeypatch.setattr(fp8, "fused", right)
    product = fp8_linear.product

    def lossy(a, b, form, roles, dtype):
        return product(a, b, form, roles, dtype) * (1.02 if form.quantise == "fused" else 1.0)

    monkeypatch.setattr(fp8_linear, "product", lossy)
    with pytest.raises(KernelError, match=r"rowwise's forward errs by 2.0.e-02 of its size on this device, and may by 7.81e-03"):
        low.verify(fused, torch.device("cpu"))


def benchmark():
    return program("benchmarks/fp8.py")


def test_the_benchmark_models_and_compares(capsys):
    module = benchmark()
    module.model()
    assert "blockwise, fused into producers" in capsys.readouterr().out
    assert module.compare([2.0, 2.0, 4.0, 2.0], [2.0, 2.0, 2.0, 2.0], 2) == (3.0, 0.5, 0.5, 3)
    assert module.compare([1.0, float("nan")], [1.0, 1.0], 1)[2] == float("inf")


@pytest.mark.long
@pytest.mark.parametrize("form", ["rowwise", "tensorwise"])
def test_losses_follow_those_of_bf16(tiny, form):
    """benchmarks/fp8.py says by how much over 500 steps of a larger model: here 60 steps of a tiny one, by the mean of the last 20."""
    recipe = ("train.steps=60", "train.batch=8", "optim.lr=3e-3")
    means = []
    for overrides in (("train.precision=bf16",), (*LOW, f"fp8.scaling={form}")):
        numbers, _, _ = trained(0, tiny, (*recipe, *overrides), 1, 60)
        means.append(sum(n[0] for n in numbers[-20:]) / 20)
    assert abs(means[1] / means[0] - 1) < 0.005
