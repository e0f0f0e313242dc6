"""The kernels of a plan: every operation has one and a reason, and the rules choose none that its device would refuse."""

import pytest

from gigatrain import load
from gigatrain.errors import PlanError
from gigatrain.planning.kernels import IMPLEMENTATIONS
from gigatrain.planning.plan import plan


def made(*overrides):
    return plan(load.recipe("quickstart", overrides), load.site("laptop"))


def test_each_operation_has_a_kernel_and_a_reason():
    assert [choice.op for choice in made().kernels] == list(IMPLEMENTATIONS)
    assert all(choice.why for choice in made().kernels)
    assert {choice.kernel for choice in made("kernels=reference").kernels} == {"reference"}


def test_a_compiled_run_leaves_the_fusing_to_the_compiler():
    chosen = {choice.op: choice.kernel for choice in made("train.compile=true").kernels}
    assert (chosen["rms_norm"], chosen["attention"], chosen["linear_cross_entropy"]) == ("reference", "sdpa", "chunked")


def test_implementations_are_those_of_the_kernels():
    from gigatrain.kernels.ops import OPERATIONS

    shown = {name: tuple(operation.versions) for name, operation in OPERATIONS.items() if name in IMPLEMENTATIONS}
    assert shown == IMPLEMENTATIONS


def test_a_recipe_chooses_per_operation():
    chosen = {choice.op: (choice.kernel, choice.why) for choice in made("kernels.attention=sdpa", "kernels.rope=reference").kernels}
    assert chosen["attention"] == ("sdpa", "the recipe says so")
    assert chosen["rope"] == ("reference", "the recipe says so")
    assert chosen["rms_norm"][0] == "lean"
    rest = {choice.op: choice.kernel for choice in made("kernels.default=reference", "kernels.rope=lean").kernels}
    assert rest.pop("rope") == "lean"
    assert set(rest.values()) == {"reference"}


def test_a_gpu_gets_the_fused_kernels_and_a_cpu_never_does():
    recipe = load.recipe("quickstart")
    on_gpu = {
        choice.op: choice.kernel for choice in plan(recipe, load.site("one-gpu").model_copy(update={"memory_bytes": 80 << 30})).kernels
    }
    fused = {op for op, names in IMPLEMENTATIONS.items() if "fused" in names}
    assert {op for op, kernel in on_gpu.items() if kernel == "fused"} == fused
    assert "fused" not in {choice.kernel for choice in made().kernels}


@pytest.mark.parametrize(
    ("hidden", "width", "starts", "ends"),
    [
        (2048, 768, "spares passes over memory worth 20 % of its products' time on an H200", "slower than torch's"),
        (4096, 14336, "spares passes over memory worth 3 % of its products' time", 'in bf16 "glued" may be faster, measure it'),
    ],
)
def test_the_experts_kernel_says_what_it_spares(hidden, width, starts, ends):
    sizes = {"hidden": hidden, "expert_intermediate": width, "experts": 8, "experts_per_token": 2, "family": "qwen3_moe"}
    overrides = [f"model.architecture.{name}={value}" for name, value in sizes.items()]
    found = plan(load.recipe("quickstart", overrides), load.site("one-gpu").model_copy(update={"memory_bytes": 900 << 30}))
    chosen = {choice.op: choice for choice in found.kernels}
    assert {chosen[op].kernel for op in ("router", "moe", "experts", "expert_sort")} == {"fused"}
    assert chosen["moe"].why.startswith(starts)
    assert chosen["moe"].why.endswith(ends)


@pytest.mark.parametrize(
    ("accelerator", "more", "kernel"),
    [
        ("h200", [], "glued"),
        ("h100", [], "glued"),
        ("a100", [], "fused"),
        ("b200", [], "fused"),
        ("h200", ["train.precision=fp32"], "fused"),
        ("h200", ["model.architecture.expert_intermediate=100"], "fused"),
        ("h200", ["adapter.rank=4"], "grouped"),
        ("b200", ["adapter.rank=4"], "grouped"),
        ("mi300x", ["adapter.rank=4", "train.precision=fp32", "model.architecture.expert_intermediate=100"], "grouped"),
        # Where torch's grouped product would read the counts on the host, a run refuses it: kernels/moe.py's `reads_counts`.
        ("a100", ["adapter.rank=4"], "fused"),
        ("h200", ["adapter.rank=4", "train.precision=fp32"], "fused"),
        (None, ["adapter.rank=4"], "fused"),
        ("h200", ["adapter.rank=4", "model.architecture.expert_intermediate=100"], "fused"),
    ],
)
def test_the_products_of_experts_are_torchs_where_they_leave_the_counts_on_the_device(accelerator, more, kernel):
    overrides = [
        f"model.architecture.{name}" for name in ("family=qwen3_moe", "experts=8", "experts_per_token=2", "expert_intermediate=96")
    ]
    site = load.site("one-gpu").model_copy(update={"memory_bytes": 80 << 30, "accelerator": accelerator})
    chosen = {choice.op: choice.kernel for choice in plan(load.recipe("quickstart", ["optim.name=adamw", *overrides, *more]), site).kernels}
    assert (chosen["moe"], chosen["experts"]) == (kernel, kernel)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("kernels.rms_nrom=lean", "kernels.rms_nrom: no operation is called so; did you mean rms_norm"),
        ("kernels.attention=flash9", "kernels.attention 'flash9': choose one of reference, sdpa, blocked"),
        ("kernels.rope=fused", 'kernels.rope "fused": Triton kernels need a GPU, and laptop has none; choose reference or lean'),
        ("kernels.moe=glued", 'kernels.moe "glued": Triton kernels need a GPU, and laptop has none; choose reference or grouped'),
        ("kernels.default=fast", "kernels.default 'fast' is neither auto nor reference"),
    ],
)
def test_refuses_a_kernel_that_is_not(override, said):
    with pytest.raises(PlanError, match=said):
        made(override)
