"""Operations of a step: FLOPs and parameters are the architectures' own, activations and transfers those of the closed forms."""

import math
from dataclasses import replace

import pytest

from gigatrain.architectures import Architecture, resolve
from gigatrain.planning.estimate import operations
from gigatrain.planning.estimate.pieces import Local
from gigatrain.planning.estimate.work import Op, Transfer
from gigatrain.planning.estimate.workload import Layout, Shape, States, Workload

NAMED = ("llama-3.1-8b", "llama-3.1-405b", "gemma-2-2b", "qwen3-30b-a3b", "deepseek-v3", "gpt-oss-120b", "apertus-8b")
GPT3 = Shape(
    layers=96, hidden=12288, heads=96, kv_heads=96, head_dim=128, value_dim=128, intermediate=49152, gated=False, vocab=51200, tied=True,
    learned_positions=True, biases=True, layer_norm=True,
)  # fmt: skip


def shape_of(name):
    a = architecture(name)
    return Shape(
        layers=a.layers, hidden=a.hidden, heads=a.heads, kv_heads=a.kv_heads, head_dim=a.head_dim, value_dim=a.value_dim, intermediate=a.intermediate,
        gated=a.gated, vocab=a.vocab, tied=a.tied, qk_norm=a.qk_norm != "none", experts=a.experts, experts_per_token=a.experts_per_token or 0,
        expert_width=a.expert_width if a.experts else 0, shared_width=a.shared_width, sparse_layers=a.sparse_layers, q_rank=a.q_rank, kv_rank=a.kv_rank,
        rotary_dim=a.rotary_dim, windows=tuple(a.window_of(i) for i in range(a.layers)),
    )  # fmt: skip


def architecture(name):
    return Architecture.model_validate(resolve(name), strict=False)


def items(works, *, recompute=False):
    return [item for work in works for stage in work.stages for block in stage
            for item in block.forward + block.backward + (block.recompute if recompute else ())]  # fmt: skip


def products(found):
    """FLOPs of matrix products as a model needs them: flash attention's backward makes its scores again, which is not counted."""
    return sum(
        i.flops / (1.25 if i.kind == "attention" and i.passes == "backward" else 1)
        for i in found
        if isinstance(i, Op) and i.kind != "memory"
    )


def volume(found, *names):
    return sum(item.bytes for item in found if isinstance(item, Transfer) and item.name in names)


@pytest.mark.parametrize("name", NAMED)
def test_flops_are_the_architectures(name):
    workload = Workload(shape_of(name), Layout(), 4096, 2, 3)
    expected = architecture(name).flops_per_token(4096) * workload.tokens
    assert operations.model_flops(workload) == pytest.approx(expected, rel=1e-9)
    assert 3 * products(items(operations.works(workload))) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("llama-3.1-8b", Layout()),
        ("llama-3.1-405b", Layout(tensor=8, pipeline=9, stages=7, schedule="interleaved", shard=2)),
        ("qwen3-30b-a3b", Layout(shard=8, expert=8, pipeline=4, tensor=2)),
        ("deepseek-v3", Layout(shard=64, expert=64, pipeline=8)),
    ],
)
def test_ranks_share_the_products_and_the_parameters(name, layout):
    workload = Workload(shape_of(name), layout, 4096, 1, 8, stack="megatron")
    works = operations.works(workload)
    each = operations.model_flops(workload) / layout.data / 8 / layout.tensor
    repeated = sum(i.flops for i in items(works) if isinstance(i, Op) and i.name == "latent_down") * (1 - 1 / layout.tensor)
    assert products(items(works)) == pytest.approx(each + repeated, rel=2e-3)
    blocks = [block for work in works for stage in work.stages for block in stage]
    experts = sum(block.expert_parameters for block in blocks)
    total = (sum(block.parameters for block in blocks) - experts) * layout.tensor + experts * layout.expert
    assert total == pytest.approx(architecture(name).parameters(), rel=1e-3)


def test_parameters_of_gpt_3():
    works = operations.works(
        Workload(GPT3, Layout(tensor=4, pipeline=8, stages=12, schedule="interleaved", shard=16, zero=1), 2048, 1, 128, stack="megatron")
    )
    assert 4 * sum(b.parameters for work in works for stage in work.stages for b in stage) == pytest.approx(
        175.3e9 + 51200 * 12288, rel=5e-3
    )
    assert [work.numbers for work in works][:2] == [tuple(range(0, 96, 8)), tuple(range(1, 96, 8))]
    assert len({id(b) for work in works for stage in work.stages for b in stage}) == 3, "layers that are alike are one object"


@pytest.mark.parametrize(("parallel", "unsplit"), [(False, 10), (True, 10 / 8)])
def test_kept_bytes_of_a_gpt_layer_are_korthikanti_s(parallel, unsplit):
    """s b h (10 + 24 / t + 5 a s / (h t)), and with sequence parallelism s b h (34 + 5 a s / h) / t (arXiv:2205.05198, equations 2 and 4)."""
    s, h, t = 2048, 12288, 8
    workload = Workload(
        GPT3, Layout(tensor=t, sequence_parallel=parallel, zero=0), s, 1, 1, precision="fp16", attention="unfused", stack="megatron"
    )
    block = operations.work(workload).stages[0][1]
    assert block.saved_bytes == pytest.approx(s * h * (unsplit + 24 / t + 5 * 96 * s / (h * t)), rel=1e-6)
    core = operations.work(replace(workload, recompute="attention")).stages[0][1]
    assert core.saved_bytes == pytest.approx(s * h * (unsplit + 24 / t), rel=1e-6)
    full = operations.work(replace(workload, recompute="full")).stages[0][1]
    assert full.saved_bytes == s * h * 2 / (t if parallel else 1)


def test_tensor_ranks_move_four_all_reduces_or_gathers_and_scatters_a_layer():
    shape, whole = shape_of("llama-3.1-8b"), 4096 * 4096 * 2
    shared = operations.work(Workload(shape, Layout(tensor=4), 4096, 1, 1, stack="torchtitan")).stages[0][1]
    assert (
        volume(shared.forward + shared.backward, "sequence_gather")
        == volume(shared.forward + shared.backward, "sequence_scatter")
        == 4 * whole
    )
    megatron = operations.work(Workload(shape, Layout(tensor=4), 4096, 1, 1, stack="megatron", recompute="full")).stages[0][1]
    assert volume(megatron.backward, "regather") == 2 * whole
    assert volume(megatron.recompute, "sequence_gather", "sequence_scatter") == 4 * whole
    summed = operations.work(Workload(shape, Layout(tensor=4, sequence_parallel=False), 4096, 1, 1)).stages[0][1]
    assert volume(summed.forward + summed.backward, "tensor_sum") == 4 * whole


def test_context_and_expert_ranks_move_what_the_closed_forms_say():
    ring = operations.work(Workload(shape_of("llama-3.1-8b"), Layout(context=4), 8192, 1, 1)).stages[0][1]
    assert volume(ring.forward, "kv") == 2 * 8192 * 1024 * 2 * 3 / 4  # 2 s kv_dim (c - 1) / c
    assert volume(ring.backward, "kv_backward") == 2 * volume(ring.forward, "kv")
    sparse = operations.work(Workload(shape_of("qwen3-30b-a3b"), Layout(shard=8, expert=8), 4096, 1, 1)).stages[0][1]
    assert volume(sparse.forward, "dispatch") == volume(sparse.backward, "combine") == 8 * 4096 * 2048 * 2
    assert [i.groups for i in sparse.forward if isinstance(i, Op) and i.kind == "grouped"] == [16, 16]
    assert {i.m for i in sparse.forward if isinstance(i, Op) and i.kind == "grouped"} == {4096 * 8 // 16}


def test_sharded_ranks_move_three_passes_a_microbatch_and_zero_1_two_a_step():
    shape = shape_of("llama-3.1-8b")
    count = 8_030_261_248
    full = Workload(shape, Layout(shard=8), 4096, 1, 2, states=States(weights=0, gathered=2, reduced=4))
    found = items(operations.works(full))
    ends = 2 * 128256 * 4096 + 4096  # which torch's FSDP leaves gathered from forward to backward
    assert volume(found, "gather") == 2 * (2 * count - ends)
    assert volume(items(operations.works(replace(full, stack="deepspeed"))), "gather") == 2 * 2 * count
    assert volume(found, "scatter") == 4 * count
    assert volume(items(operations.works(replace(full, layout=Layout(shard=8, reshard=False)))), "gather") == 2 * count
    hybrid = operations.works(replace(full, layout=Layout(shard=8, replicate=4)))
    assert volume(items(hybrid), "replicate") == 4 * count / 8
    step = operations.work(replace(full, layout=Layout(shard=8, zero=1), states=States())).step
    assert volume(step, "gradients") == 4 * count
    assert volume(step, "weights") == 2 * count
    adam = next(item for item in step if item.name == "adamw")
    assert isinstance(adam, Op)
    assert adam.bytes == (4 + 2 * 12 + 2) * count / 8
    piped = operations.work(replace(full, layout=Layout(shard=8, pipeline=2, reshard=False)))
    assert not volume(items([piped]), "gather", "scatter")
    assert volume(piped.step, "weights", "gradients") > 0


def test_low_precision_quantises_and_frozen_weights_have_no_gradients():
    shape = shape_of("llama-3.1-8b")
    fp8 = operations.work(Workload(shape, Layout(), 4096, 1, 1, precision="fp8_tensorwise", stack="torchtitan"))
    bits = {item.name: item.bits for item in fp8.stages[0][1].forward if isinstance(item, Op)}
    assert bits["qkv"] == bits["down"] == 8
    assert bits["attention"] == 16
    assert {item.bits for item in fp8.stages[0][-1].forward if isinstance(item, Op)} == {16}, "the head stays as it was"
    assert sum(item.name == "quantise" for item in fp8.stages[0][1].forward) == 8
    lora = operations.work(Workload(shape, Layout(), 4096, 1, 1, frozen=True, adapter_rank=16))
    thin = [item for item in lora.stages[0][1].backward if isinstance(item, Op) and item.passes == "wgrad"]
    assert thin
    assert all(item.name.endswith(("_lora_a", "_lora_b")) for item in thin)
    assert operations.model_flops(replace(Workload(shape, Layout(), 4096, 1, 1), frozen=True)) < operations.model_flops(
        Workload(shape, Layout(), 4096, 1, 1)
    )


def test_stages_are_cut_as_each_stack_does():
    shape = shape_of("llama-3.1-405b")
    padded = operations.cut(Workload(shape, Layout(pipeline=8, stages=4, schedule="interleaved"), 8192, 1, 8, stack="megatron"))
    assert [len(stage) for stage in padded] == [3, *[4] * 30, 3]  # embedding and head are a layer each
    ours = operations.cut(Workload(shape, Layout(pipeline=8), 8192, 1, 8, stack="gigatrain_native"))
    assert sum(len(stage) for stage in ours) == 126
    assert len(ours[-1]) <= len(ours[0])


def test_windows_and_documents_shorten_attention():
    shape = shape_of("gpt-oss-120b")
    work = operations.work(Workload(shape, Layout(), 8192, 1, 1))
    flops = [sum(i.flops for i in block.forward if isinstance(i, Op) and i.kind == "attention") for block in work.stages[0][1:3]]
    assert flops[0] < flops[1] / 20
    packed = operations.work(Workload(shape, Layout(), 8192, 1, 1, documents=1024)).stages[0][2]
    assert math.isclose(
        sum(i.flops for i in packed.forward if isinstance(i, Op) and i.kind == "attention"), flops[1] * 1025 / 8193, rel_tol=1e-9
    )


def test_torchtitan_keeps_every_other_product_and_attention():
    workload = Workload(shape_of("llama-3.1-8b"), Layout(), 8192, 1, 1, stack="torchtitan", recompute="selective")
    block = operations.work(workload).stages[0][1]
    stream, queries, values, output, gate, down = 4096, 4096, 1024, 4096, 14336, 4096
    assert block.saved_bytes == 8192 * (2 * (stream + queries + values + output + gate + down) + 4 * 32)
    again = sum(item.flops for item in block.recompute if isinstance(item, Op))
    assert again == 2 * 8192 * 4096 * (1024 + 4096 + 14336)


@pytest.mark.parametrize(("stack", "tensor"), [("gigatrain_native", 1), ("gigatrain_native", 4), ("megatron", 4)])
def test_our_tensor_ranks_sum_the_gradients_of_their_experts(stack, tensor):
    workload = Workload(shape_of("qwen3-30b-a3b"), Layout(shard=16, tensor=tensor, expert=4), 4096, 1, 1, stack=stack)
    (work,) = operations.works(workload)
    experts = sum(block.expert_parameters for stage in work.stages for block in stage)
    owned = 4.0 * experts / Local(workload).expert_shards
    assert volume(work.step, "experts_sum") == pytest.approx(owned if stack == "gigatrain_native" and tensor > 1 else 0.0)


@pytest.mark.parametrize(
    ("stack", "zero", "kind"),
    [
        ("gigatrain_deepspeed", 1, "all_reduce"),
        ("deepspeed", 2, "all_reduce"),
        ("deepspeed", 3, "reduce_scatter"),
        ("megatron", 1, "reduce_scatter"),
    ],
)
def test_deepspeed_sums_whole_buckets(stack, zero, kind):
    workload = Workload(shape_of("llama-3.1-8b"), Layout(shard=16, zero=zero), 4096, 1, 1, stack=stack)
    (work,) = operations.works(workload)
    sent = {i.collective for i in [*work.step, *items([work])] if isinstance(i, Transfer) and i.name in ("gradients", "scatter")}
    assert sent == {kind}
