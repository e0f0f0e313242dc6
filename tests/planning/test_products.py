"""The low-precision lane of a plan: which matrices are in it, why the others are not, and what is refused."""

import pytest

from gigatrain import load
from gigatrain.errors import PlanError
from gigatrain.planning import products
from gigatrain.planning.kernels import IMPLEMENTATIONS, NARROW
from gigatrain.planning.plan import plan

LOW = ("train.precision=fp8", "fp8.emulate=true", "fp8.least=[16, 16]")
WIDE = (
    "model.architecture.hidden=256",
    "model.architecture.heads=8",
    "model.architecture.kv_heads=4",
    "model.architecture.intermediate=512",
)
MOE = (
    "model.architecture.family=mixtral",
    "model.architecture.experts=4",
    "model.architecture.experts_per_token=2",
    "model.architecture.tied=false",
)
ALL = tuple(f"self_attn.{n}_proj" for n in "qkvo") + tuple(f"mlp.{n}_proj" for n in ("gate", "up", "down"))


def made(*overrides, site="laptop", ranks=None):
    return plan(load.recipe("quickstart", overrides), load.site(site).model_copy(update={"memory_bytes": 80 << 30}), ranks)


def kernels(found):
    return {choice.op: choice.kernel for choice in found.kernels}


def test_numbers_are_those_of_the_kernels():
    from gigatrain.kernels import fp8_linear
    from gigatrain.kernels.ops import OPERATIONS

    assert (products.VERSIONS, products.MULTIPLES, products.EMULATED) == (fp8_linear.VERSIONS, fp8_linear.MULTIPLES, fp8_linear.EMULATED)
    assert {name: tuple(operation.narrow) for name, operation in OPERATIONS.items() if operation.narrow} == NARROW
    assert not {name for op, names in NARROW.items() for name in names} & {name for op in NARROW for name in IMPLEMENTATIONS[op]}


def test_without_it_a_plan_has_none():
    assert made().fp8 is None
    assert made().compute == "bf16"
    assert made("train.precision=fp32").compute == "fp32"


@pytest.mark.parametrize(("scaling", "version"), products.VERSIONS.items())
def test_the_scaling_decides_the_version_whatever_kernels_says(scaling, version):
    for default in ("auto", "reference"):
        found = made(*LOW, *WIDE, f"fp8.scaling={scaling}", f"kernels={default}")
        assert found.fp8 is not None
        assert found.fp8.low == ALL
        assert found.fp8.high == ()
        assert kernels(found)["linear"] == version
        assert found.compute == "bf16"
    assert found.memory == made(*WIDE, "kernels=reference").memory


def test_a_plan_is_another_run_than_bf16_and_than_another_form():
    runs = [made(*WIDE), made(*WIDE, *LOW), made(*WIDE, *LOW, "fp8.scaling=mxfp8"), made(*WIDE, *LOW, "fp8.weight_gradient=bf16")]
    assert len({run.identity for run in runs}) == len(runs)


def test_matrices_that_do_not_fit_stay_high_by_name_and_with_the_reason():
    found = made(
        *LOW, "fp8.scaling=blockwise", "model.architecture.intermediate=384", "model.architecture.hidden=384", 'fp8.high=["o_proj"]'
    )
    assert found.fp8 is not None
    assert {kept.matrix: kept.why for kept in found.fp8.high} == {
        "self_attn.q_proj": "192 is not a multiple of 128",
        "self_attn.k_proj": "96 is not a multiple of 128",
        "self_attn.v_proj": "96 is not a multiple of 128",
        "self_attn.o_proj": "fp8.high says so",
    }
    small = made(*LOW, "fp8.least=[128, 192]").fp8
    assert small is not None
    assert [kept.why for kept in small.high] == ["96 x 192 is below fp8.least 128 x 192"] * 2
    assert "bf16: self_attn.k_proj (96 x 192 is below fp8.least 128 x 192)" in small.describe()
    assert "EMULATED" in small.describe()


def test_a_gpu_needs_multiples_of_512_for_blocks():
    wide = (
        "train.precision=fp8",
        "fp8.least=[16, 16]",
        "fp8.scaling=blockwise",
        "model.architecture.hidden=512",
        "model.architecture.intermediate=1024",
    )
    found = made(*wide, "model.architecture.heads=8", "model.architecture.kv_heads=4", "model.architecture.head_dim=64", site="one-gpu").fp8
    assert found is not None
    assert [(kept.matrix, kept.why) for kept in found.high] == [
        (f"self_attn.{name}_proj", "256 is not a multiple of 512") for name in ("k", "v")
    ]


def test_tensor_ranks_quantise_their_shares():
    found = made(*LOW, "mesh.tensor=2", "model.architecture.kv_heads=2", ranks=2)
    assert found.fp8 is not None
    assert found.fp8.low == ALL
    assert products.matrices(found.decoder, found.mesh) == {
        "self_attn.q_proj": (96, 192), "self_attn.k_proj": (32, 192), "self_attn.v_proj": (32, 192), "self_attn.o_proj": (192, 96),
        "mlp.gate_proj": (256, 192), "mlp.up_proj": (256, 192), "mlp.down_proj": (192, 256),
    }  # fmt: skip
    shared = made(*LOW, "mesh.tensor=2", "model.architecture.kv_heads=1", ranks=2)
    assert products.matrices(shared.decoder, shared.mesh)["self_attn.k_proj"] == (32, 192)  # one head that both ranks compute


def test_experts_are_rowwise_or_high():
    low = made(*LOW, *WIDE, *MOE)
    assert low.fp8 is not None
    assert low.fp8.low[-1] == products.EXPERTS
    assert kernels(low)["experts"] == kernels(low)["moe"] == "fp8_rowwise"
    high = made(*LOW, *WIDE, *MOE, "fp8.scaling=tensorwise")
    assert high.fp8 is not None
    assert [(kept.matrix, kept.why) for kept in high.fp8.high] == [
        (products.EXPERTS, "torch's grouped products take rowwise scales, not tensorwise")
    ]
    assert kernels(high)["experts"] == "grouped"


def test_experts_stay_high_where_the_keys_cannot_be_followed():
    high = made(*LOW, *WIDE, *MOE, "fp8.scales=fp32")
    assert high.fp8 is not None
    assert [kept.why for kept in high.fp8.high] == ["experts in FP8 have scales of powers of two, and fp8.scales is fp32"]
    emulated = made(*LOW, *WIDE, *MOE, site="one-gpu")
    assert emulated.fp8 is not None
    assert [kept.why for kept in emulated.fp8.high] == ["experts in FP8 are not emulated on a GPU"]


def test_two_choices_of_one_product_are_refused():
    with pytest.raises(
        PlanError, match=r'kernels.moe "grouped" and train.precision "fp8" both choose these products; leave kernels.moe out'
    ):
        made(*LOW, *WIDE, *MOE, "kernels.moe=grouped")


def test_a_table_that_nobody_reads_is_refused():
    with pytest.raises(PlanError, match=r'\[fp8\] is read where train.precision is "fp8", and it is "bf16"; set it, or remove the table'):
        made("fp8.scaling=mxfp8")


def test_another_mesh_is_the_same_run_though_reasons_differ():
    one, two = (made("optim.name=adamw", *WIDE, *MOE, *mesh, ranks=2) for mesh in (("mesh.expert=2",), ("mesh.tensor=2",)))
    assert one.kernels != two.kernels
    assert one.identity == two.identity
    low = made(*LOW, *WIDE, *MOE, 'fp8.high=["k_proj"]')
    assert low.fp8 is not None
    high = tuple(kept.model_copy(update={"why": "64 x 256 is below fp8.least"}) for kept in low.fp8.high)
    assert low.model_copy(update={"fp8": low.fp8.model_copy(update={"high": high})}).identity == low.identity
    balanced = ("optim.name=adamw", *MOE, "loss.router_aux=0.01")
    assert made(*balanced, "train.microbatch=4").identity != made(*balanced, "train.microbatch=2").identity


def test_producers_quantise_on_a_gpu_where_nothing_else_reads():
    gpu = ("train.precision=fp8", "fp8.least=[16, 16]")

    def found(*overrides, ranks=None):
        low = made(*gpu, *WIDE, *overrides, site="one-gpu", ranks=ranks).fp8
        assert low is not None
        return low.producers

    assert found() == ("norms", "swiglu")
    assert found("train.recompute=full") == ("norms", "swiglu")
    assert found("mesh.tensor=2", ranks=2) == ("swiglu",)
    assert found('fp8.high=["k_proj"]') == ("swiglu",)
    assert found('fp8.high=["down_proj"]') == ("norms",)
    for without in ("train.recompute=lean", "fp8.weight_gradient=bf16", "fp8.scaling=mxfp8", "kernels=reference"):
        assert found(without) == ()
    assert made(*LOW, *WIDE).fp8.producers == ()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("train.precision=fp8",), "multiplies on tensor cores, and laptop has none; set fp8.emulate = true for its numbers"),
        (
            ("train.precision=fp8", "fp8.emulate=true"),
            "would quantise nothing .self_attn.q_proj: 192 x 192 is below fp8.least 1024 x 1024.*lower fp8.least",
        ),
        ((*LOW, 'fp8.high=["k_prj"]'), "fp8.high 'k_prj' is the end of no matrix's name; a layer has self_attn.q_proj"),
        ((*LOW, "fp8.amax=delayed"), "fp8.amax \"delayed\" is for tensorwise scales, and fp8.scaling is 'rowwise'"),
        ((*LOW, "train.compile=true"), "is not run with train.compile.*set train.compile = false"),
        (
            (*LOW, "fp8.scaling=tensorwise", "fp8.amax=delayed", "optim.name=adamw", "engine.name=deepspeed"),
            'not done with engine.name "deepspeed"',
        ),
        ((*LOW, "fp8.gradient=e5m2"), "rowwise products take e4m3 alone; leave fp8.gradient out"),
        ((*LOW, "fp8.scaling=nvfp4", "fp8.scales=fp32"), "nvfp4 has the scales of its format; leave fp8.scales out"),
        (("kernels.linear=fp8_rowwise",), 'computes other numbers, not the same ones faster; set train.precision = "fp8"'),
    ],
)
def test_what_cannot_be_is_refused_with_the_way_out(overrides, message):
    with pytest.raises(PlanError, match=message):
        made(*overrides)


def test_a_schedule_with_products_of_its_own_is_refused():
    with pytest.raises(PlanError, match='"zbv" computes weight gradients apart.*set mesh.schedule = "1f1b" or "interleaved"'):
        made(*LOW, "mesh.pipeline=2", "mesh.schedule=zbv", "train.microbatch=2", ranks=2)
