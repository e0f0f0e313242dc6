"""Peak memory: published peaks, closed forms, and this project's own plan."""

import pytest

from gigatrain import load
from gigatrain.architectures import Architecture, resolve
from gigatrain.config import Engine, Mesh, Optim
from gigatrain.planning import cost, expect
from gigatrain.planning.estimate import operations, residency, rows
from gigatrain.planning.estimate.workload import Layout, Shape, States, Workload
from gigatrain.planning.plan import plan

LLAMA_8B = Shape(
    layers=32, hidden=4096, heads=32, kv_heads=8, head_dim=128, value_dim=128, intermediate=14336, gated=True, vocab=128256, tied=False,
)  # fmt: skip
_B200 = {
    "gpu": "B200-SXM-180GB", "n_gpus": 8, "framework": "Megatron-LM 0.14", "precision": "bf16", "attention_impl": "TE fused", "glu": True,
    "tied_embeddings": False, "pos_emb": "rope", "zero_stage": 1, "micro_batch": 1, "grad_accum": 4, "act_ckpt": "none", "peak_mem_unit": "GiB",
    "peak_mem_kind": "max_memory_allocated", "head_dim": 128,
}  # fmt: skip
_70B = _B200 | {
    "model": "llama3-70b truncated to 12 layers",
    "layers": 12,
    "hidden": 8192,
    "heads": 64,
    "kv_heads": 8,
    "ffn": 28672,
    "vocab": 128256,
}
_405B = _B200 | {
    "model": "llama3-405b truncated to 4 layers",
    "layers": 4,
    "hidden": 16384,
    "heads": 128,
    "kv_heads": 16,
    "ffn": 53248,
    "vocab": 128256,
}
_V3 = _B200 | {
    "model": "deepseekv3 truncated to 4 layers", "layers": 4, "hidden": 7168, "heads": 128, "kv_heads": 128, "ffn": 18432, "vocab": 129280,
    "moe_experts": 256, "moe_topk": 8, "moe_ffn": 2048, "moe_shared_ffn": 2048,
    "mla": {"q_lora_rank": 1536, "kv_lora_rank": 512, "qk_head_dim": 128, "qk_pos_emb_head_dim": 64, "v_head_dim": 128},
}  # fmt: skip
_STAS = {
    "model": "Llama-3.1-8B", "layers": 32, "hidden": 4096, "heads": 32, "kv_heads": 8, "ffn": 14336, "glu": True, "vocab": 128256, "pos_emb": "rope",
    "tied_embeddings": False, "gpu": "H200-SXM-141GB", "n_gpus": 8, "framework": "DeepSpeed 0.19.2 + HF + Liger", "precision": "bf16", "zero_stage": 3,
    "sharding": "ZeRO-3 + CPU AdamW offload", "micro_batch": 1, "grad_accum": 1, "act_ckpt": "full", "peak_mem_unit": "GiB",
    "peak_mem_kind": "max_memory_reserved worst rank", "attention_impl": "FA3",
}  # fmt: skip
# MooreThreads/SimuMax docs/FULL_RESULTS.md and stas00/ml-engineering, as measured.jsonl has them.
PEAKS = (
    (_70B | {"tp": 1, "pp": 2, "seq_len": 4096}, 66.55),
    (_70B | {"tp": 8, "pp": 1, "seq_len": 4096}, 28.29),
    (_70B | {"tp": 2, "cp": 4, "seq_len": 131072}, 112.67),
    (_405B | {"tp": 1, "cp": 8, "seq_len": 32768}, 139.22),
    (_V3 | {"tp": 1, "pp": 1, "ep": 8, "seq_len": 4096}, 104.3),
    (_V3 | {"tp": 1, "pp": 2, "ep": 4, "seq_len": 4096}, 114.0),
    (_STAS | {"seq_len": 8192}, 16.3),
    (_STAS | {"seq_len": 262144}, 124.5),
    (
        _STAS
        | {
            "seq_len": 8192,
            "framework": "DeepSpeed 0.19.2 + HF",
            "sharding": "ZeRO-2",
            "zero_stage": 2,
            "act_ckpt": "none",
            "peak_mem_kind": None,
        },
        99.0,
    ),
)


@pytest.mark.parametrize(("row", "gib"), PEAKS)
def test_published_peaks_within_four_per_cent(row, gib):
    workload = rows.parse(row).workload
    found = residency.memory(workload, operations.works(workload), {})
    peak = max(residency.seen(each, row["peak_mem_kind"] or "") for each in found)
    assert peak / 2**30 == pytest.approx(gib, rel=0.04)


def test_states_are_eighteen_bytes_or_six_and_twelve_over_data():
    """Megatron's own figure (megatron/training/theoretical_memory_usage.py)."""
    count = 8_030_261_248
    for layout, each in ((Layout(zero=0), 18.0), (Layout(shard=8, zero=0), 18.0), (Layout(shard=8, zero=1), 6 + 12 / 8)):
        workload = Workload(LLAMA_8B, layout, 4096, 1, 1, stack="megatron", states=States())
        (found,) = residency.memory(workload, operations.works(workload), {})
        assert found["weights"] + found["gradients"] + found["optimizer"] == each * count


def test_the_first_stage_waits_longest():
    workload = Workload(LLAMA_8B, Layout(pipeline=4, zero=0), 4096, 1, 8, stack="megatron")
    kept = [each["activations"] for each in residency.memory(workload, operations.works(workload), {})]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] / kept[2] == pytest.approx(2.0, rel=0.01)
    few = Workload(LLAMA_8B, Layout(pipeline=4, zero=0), 4096, 1, 2, stack="megatron")
    assert residency.memory(few, operations.works(few), {})[0]["activations"] == pytest.approx(kept[0] / 2, rel=0.01)


@pytest.mark.parametrize("recompute", ["none", "lean", "full"])
@pytest.mark.parametrize("ranks", [1, 8])
def test_our_own_plan_says_the_same(recompute, ranks):
    architecture = Architecture.model_validate(resolve("llama-3.1-8b"), strict=False)
    kernels = dict.fromkeys(("rms_norm", "swiglu", "linear_cross_entropy", "rope", "moe", "router"), "fused") | {"attention": "flash"}
    planned = cost.memory(
        architecture, device="cuda", precision="bf16", microbatch=1, sequence=8192, recompute=recompute, accumulation=2, optim=Optim(lr=1e-4),
        kernels=kernels, documents=False, mesh=Mesh(shard=ranks), engine=Engine(),
    )  # fmt: skip
    states = States(weights=0, gradients=4, master=4, moments=8) if ranks > 1 else States()
    layout = Layout(shard=ranks, zero=3 if ranks > 1 else 0)
    workload = Workload(LLAMA_8B, layout, 8192, 1, 2, stack="gigatrain_native", recompute=recompute, chunked_loss=True, states=states)
    (found,) = residency.memory(workload, operations.works(workload), {})
    assert found["weights"] + found["gradients"] + found["optimizer"] == pytest.approx(
        planned.weights + planned.gradients + planned.optimizer, rel=1e-3
    )
    assert found["activations"] + found["workspace"] == pytest.approx(
        planned.activations + planned.workspace, rel=0.05 if recompute != "full" else 0.25
    )
    assert residency.seen(found, "max_memory_allocated") == pytest.approx(planned.total, rel=0.08)


@pytest.mark.parametrize(
    ("architecture", "ranks", "overrides"),
    [
        ("llama-3.1-70b", 64, ("mesh.tensor=8", "train.recompute=lean")),
        ("llama-3.1-70b", 64, ("mesh.tensor=8", "mesh.pipeline=4", "train.recompute=lean")),
        ("qwen3-30b-a3b", 64, ("mesh.expert=8", "train.recompute=lean")),
    ],
)
def test_plans_of_recipes_say_the_same(architecture, ranks, overrides):
    wanted = (
        "optim.name=adamw",
        f"model.architecture={architecture}",
        "train.microbatch=1",
        "train.batch=256",
        "train.sequence=4096",
        *overrides,
    )
    made = plan(load.recipe("quickstart", wanted), load.site("dgx-h100"), ranks)
    workload = expect.workload_of(made)
    found = max(residency.memory(workload, operations.works(workload), {}), key=lambda each: sum(each.values()))
    states = made.memory.weights + made.memory.gradients + made.memory.optimizer
    assert found["weights"] + found["gradients"] + found["optimizer"] == pytest.approx(states, rel=0.01)
    assert found["activations"] == pytest.approx(made.memory.activations, rel=0.03)
    assert residency.seen(found, "max_memory_allocated") == pytest.approx(made.memory.total, rel=0.04)


@pytest.mark.parametrize(("architecture", "mesh"), [("llama-3.1-70b", "mesh.tensor=1"), ("qwen3-30b-a3b", "mesh.expert=8")])
def test_a_pipeline_sums_gradients_whole_until_its_last_backward(architecture, mesh):
    """Torch's stages hold FSDP's reductions back: of all that a rank holds, its own experts, as wide as they are reduced."""
    sizes = ("optim.name=adamw", "train.microbatch=1", "train.batch=256", "train.sequence=4096", "train.recompute=full")
    wanted = (*sizes, f"model.architecture={architecture}", "mesh.pipeline=4", mesh)
    wide, narrow = (
        plan(load.recipe("quickstart", (*wanted, f"engine.reduce={reduce}")), load.site("dgx-h100"), 64, fits=False)
        for reduce in ("fp32", "bf16")
    )
    assert isinstance(wide.architecture, Architecture)
    held = sum(cost.held_parameters(wide.architecture, wide.mesh, 4096)[:2])
    assert held < wide.parameters / (3 if mesh == "mesh.tensor=1" else 8)
    assert wide.memory.workspace - narrow.memory.workspace == 2 * held
    assert narrow.memory.workspace > (2 + 2) * held
    first = [residency.memory(one, operations.works(one), {})[0]["workspace"] for one in map(expect.workload_of, (wide, narrow))]
    assert first[0] - first[1] == pytest.approx(2 * held, rel=0.01)


@pytest.mark.parametrize("offload", [False, True])
def test_deepspeeds_bytes_are_by_stage(offload):
    """Weights whole below 3; fp32 sums whole in 1, with a backward's own in bf16 (BF16_Optimizer), and cut in 2 and 3; buckets of 2^27 elements."""
    wanted = ("optim.name=adamw", "model.architecture=llama-3.1-8b", "train.microbatch=1", "train.batch=64", "train.sequence=4096")
    wanted += ("train.recompute=lean", "engine.name=deepspeed", f"engine.offload={str(offload).lower()}")
    site, totals = load.site("dgx-h100"), []
    for stage in (1, 2, 3):
        made = plan(load.recipe("quickstart", (*wanted, f"engine.zero={stage}")), site, 8, fits=False)
        count = made.parameters
        own = {1: count, 2: count / 8, 3: count / 8}[stage]
        assert made.memory.weights == pytest.approx(0 if offload and stage == 3 else 2 * (own if stage == 3 else count), rel=1e-6)
        assert made.memory.gradients == pytest.approx(0 if offload and stage > 1 else (6 if stage == 1 else 4) * own, rel=1e-6)
        assert made.memory.optimizer == pytest.approx(0 if offload else 12 * count / 8, rel=1e-6)
        workload = expect.workload_of(made)
        (found,) = residency.memory(workload, operations.works(workload), {})
        states = made.memory.weights + made.memory.gradients + made.memory.optimizer
        assert found["weights"] + found["gradients"] + found["optimizer"] == pytest.approx(states, rel=1e-3)
        beyond = residency.ZERO3_BYTES if stage == 3 else 0  # measured, and no part of a plan's bound
        assert residency.seen(found, "max_memory_allocated") - beyond == pytest.approx(made.memory.total, rel=0.1)
        totals.append(made.memory.total)
    assert totals[0] > totals[1]
    if not offload:
        assert totals[1] > totals[2]
