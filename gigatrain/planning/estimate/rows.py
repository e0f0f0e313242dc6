"""Published measurements as workloads: one row, in the schema of measured.jsonl, is a `Case`. Any column but sizes may be missing; what then is taken is said.

parse(row) -> Case            raises Refused with the reason where a row has no meaning here
columns                       gpu, n_gpus, framework, precision, layers, hidden, heads, ffn, vocab, seq_len, tp, pp, cp, dp, ep, vp, micro_batch, global_batch,
                              sharding, act_ckpt, attention_impl, overlap, notes, ...
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gigatrain.planning.estimate.cluster import Cluster
from gigatrain.planning.estimate.machines import Refused, Row, chip_of, cluster_of
from gigatrain.planning.estimate.pieces import WHOLE_EXPERTS
from gigatrain.planning.estimate.workload import (
    PRODUCTS_BITS,
    Attention,
    Layout,
    Precision,
    Recompute,
    Schedule,
    Shape,
    Stack,
    States,
    Workload,
)
from gigatrain.planning.hardware import CHIPS

MEASURED = (
    "step_time_s", "tokens_per_s", "tokens_per_s_per_gpu", "samples_per_s", "model_tflops_per_gpu", "hw_tflops_per_gpu", "mfu_pct", "hfu_pct",
    "node_power_w_mean", "status",
)  # fmt: skip
AXES = ("tensor", "context", "expert", "shard", "replicate", "pipeline")


@dataclass(frozen=True, slots=True)
class Case:
    """A row that was understood. `measured`: the columns of `MEASURED` that it has, and `peak_bytes` with `peak_kind`."""

    id: str
    set: str
    workload: Workload
    cluster: Cluster
    measured: dict[str, Any]
    assumed: tuple[str, ...] = ()


def parse(row: Mapping[str, Any]) -> Case:
    """The row as a workload on a cluster; raises `Refused`."""
    found = Row(row)
    stack = _stack(found)
    chip, name = chip_of(found)
    shape = _shape(found)
    layout, microbatch, accumulation, ranks = _layout(found, stack, shape)
    cluster = cluster_of(found, chip, name, ranks)
    workload = _workload(found, stack, shape, layout, microbatch, accumulation, chip)
    measured = {key: row[key] for key in MEASURED if row.get(key) is not None}
    peak = found.number("peak_mem")
    if peak:
        unit = found.text("peak_mem_unit")
        measured["peak_bytes"] = peak * {"gib": 2**30, "gb": 1e9, "mib": 2**20, "mb": 1e6}.get(unit, 2**30)
        measured["peak_kind"] = found.text("peak_mem_kind")
    return Case(str(row.get("id", "")), str(row.get("set") or ""), workload, cluster, measured, tuple(found.assumed))


# ---- software ----

_STACKS: tuple[tuple[str, Stack, str], ...] = (
    (r"gigatrain.*deepspeed", "gigatrain_deepspeed", ""),
    (r"gigatrain", "gigatrain_native", ""),
    (r"torchtitan", "torchtitan", ""),
    (r"automodel", "torchtitan", "NeMo AutoModel is FSDP2 over transformers"),
    (r"fms|foundation.model.stack", "torchtitan", "IBM's fms-fsdp is FSDP with torch.compile"),
    (r"llm-?foundry|composer|mosaic", "llm_foundry", ""),
    (r"nanotron", "nanotron", ""),
    (r"megatron|nemo|nvidia.*release|primus|dgx|bridge", "megatron", ""),
    (r"deepspeed", "deepspeed", ""),
    (r"lit-?gpt|lightning|fsdp2|torchtune|olmo", "torchtitan", "an FSDP trainer"),
    (r"transformers|hugging|accelerate|\bhf\b|liger|axolotl|trl", "deepspeed", "transformers' modules"),
)


def _stack(row: Row) -> Stack:
    text = row.text("framework")
    for pattern, stack, why in _STACKS:
        if re.search(pattern, text):
            if why:
                row.assumed.append(f"stack {stack}: {why}")
            return stack
    if "mlperf" in row.text("set", "id", "source_repo"):
        row.assumed.append("stack megatron, as most submissions to MLPerf")
        return "megatron"
    row.assumed.append(f"stack generic: nothing is known of {row.row.get('framework')!r}")
    return "generic"


def _version(row: Row) -> str:
    """What is said of the release; and, in words that stacks.py reads, of Megatron's fork on DeepSpeed, of Megatron-LM as others than its makers start it, and
    of an attention later than FlashAttention-2."""
    said = row.row.get("framework_version")
    framework = row.text("framework")
    numbers = re.findall(r"\d+\.\d+(?:\.\d+)?", framework)
    words = [str(said) if said else numbers[0] if numbers else ""]
    if re.search(r"megatron.{0,3}deepspeed", framework):
        words.append("megatron-deepspeed")
    elif re.search(r"megatron-?lm|megatron-core|flagscale", framework) and not re.match(
        r"nvidia|yanring|mlcommons|calculon", row.text("source_repo")
    ):
        words.append("plain")
    if attention := re.search(r"\bfa-?[34]\b|flash.?attention.?[34]\b|cudnn|\bte\b", row.text("attention_impl")):
        words.append(attention[0])
    return " ".join(words).strip()


def _old(row: Row, stack: Stack) -> bool:
    """Megatron before flash attention and sequence parallelism: its forks on DeepSpeed, and what was published before 2023."""
    if stack != "megatron":
        return False
    date = row.text("source_date")
    return "deepspeed" in row.text("framework") or row.text("precision").startswith("fp16") or ("2019" <= date[:4] <= "2022")


def _precision(row: Row, stack: Stack, chip: str) -> Precision:
    text = row.text("precision")
    blackwell = chip in ("b200", "gb200", "b300", "gb300")
    if not text:
        # Submitters of MLPerf since 2023 train in fp8, and their logs do not say so.
        found: Precision = "bf16"
        if "mlperf" in row.text("set", "id", "source_repo") and CHIPS[chip].fp8.value:
            found = "fp8_tensorwise" if blackwell or chip.startswith("mi") else "fp8_delayed"
        row.assumed.append(f"precision {found}: the row names none")
        return found
    if "fp4" in text and not ("fp8" in text and " or " in text):
        return "nvfp4"
    if "fp8" in text or "float8" in text:
        marks: tuple[tuple[str, Precision], ...] = (
            (r"mx|variant 1", "mxfp8"), (r"delayed|[-_ ]ds\b", "fp8_delayed"), (r"row", "fp8_rowwise"), (r"block|sub|[-_ ]sc\b", "fp8_blockwise"),
            (r"current|tensor|[-_ ]cs\b|variant 0", "fp8_tensorwise"),
        )  # fmt: skip
        for pattern, recipe in marks:
            if re.search(pattern, text):
                if "variant" in text:
                    row.assumed.append(f"precision {recipe}: the page lists two recipes without saying which row has which")
                return recipe
        plain: Precision = "fp8_tensorwise" if stack in ("torchtitan", "gigatrain_native") or blackwell else "fp8_delayed"
        row.assumed.append(f"precision {plain}: the row says {row.row['precision']}")
        return plain
    for word in ("bf16", "bfloat16", "fp16", "float16", "half"):
        if word in text:
            return "bf16" if word.startswith("b") else "fp16"
    if "fp32" in text or "tf32" in text or "float32" in text:
        return "fp32"
    raise Refused(f"precision {row.row['precision']!r} is none of fp32, bf16, fp16, fp8 or fp4 recipes")


# ---- model ----


def _shape(row: Row) -> Shape:
    model, layers = row.text("model"), row.whole("layers")
    hidden = row.whole("hidden")
    heads = row.whole("heads", max(1, hidden // 128), "128 channels a head") or 1
    if min(layers, hidden) < 1:
        raise Refused(f"a model of {layers} layers and {hidden} channels")
    kv_heads = row.whole("kv_heads", heads) or heads
    learned = "learned" in row.text("pos_emb") or (
        not row.text("pos_emb") and bool(re.search(r"gpt-?[23]|mpt|opt", model)) and "oss" not in model
    )
    gated = row.flag("glu")
    if gated is None:
        gated = not learned
        row.assumed.append(f"{'a' if gated else 'no'} gate in the feed-forward layers")
    ffn = row.whole("ffn", 4 * hidden if not gated else -(-8 * hidden // 3 // 256) * 256, "4 channels of each hidden one")
    tied = row.flag("tied_embeddings")
    if tied is None:
        tied = learned
    alibi = "alibi" in row.text("pos_emb")
    values: dict[str, Any] = {}
    experts = row.whole("moe_experts", 0)
    if experts > 1:
        if row.whole("moe_topk") > experts:
            raise Refused(f"moe_topk {row.whole('moe_topk')} of {experts} experts")
        sparse = row.number("moe_layers")
        if sparse is None:
            sparse = layers - (0 if "deepseek" not in model else 3 if "v3" in model and "truncated" not in model else 1)
            row.assumed.append(f"{int(sparse)} of {layers} layers have experts")
        values = {
            "experts": experts, "experts_per_token": row.whole("moe_topk"), "expert_width": row.whole("moe_ffn", ffn),
            "shared_width": row.whole("moe_shared_ffn", 0), "sparse_layers": min(layers, int(sparse)),
        }  # fmt: skip
    head_dim = row.whole("head_dim", hidden // heads) or hidden // heads
    value_dim, mla = head_dim, row.row.get("mla")
    if isinstance(mla, Mapping) and mla:

        def latent(*names: str) -> int:
            return int(next((mla[n] for n in names if mla.get(n) is not None), 0))

        turned = latent("qk_rope", "qk_pos_emb_head_dim", "qk_rope_head_dim")
        head_dim = latent("qk_nope", "qk_head_dim", "qk_nope_head_dim") + turned
        value_dim = latent("v", "v_head_dim")
        values |= {"q_rank": latent("q_lora", "q_lora_rank") or None, "kv_rank": latent("kv_lora", "kv_lora_rank"), "rotary_dim": turned}
        kv_heads = heads
    elif mla:
        raise Refused(f"mla is {mla!r}: latent attention without its ranks")
    windows: tuple[int | None, ...] = ()
    if "oss" in model:
        windows = tuple(128 if i % 2 == 0 else None for i in range(layers))
    elif "gemma" in model:
        windows = tuple(
            (4096 if i % 2 == 0 else None) if "2" in model.split("gemma")[1][:2] else (1024 if i % 6 < 5 else None) for i in range(layers)
        )
    text = row.text("notes", "overlap", "model")
    predicted = 1 if re.search(r"\bmtp\b", text) and not re.search(r"no mtp|without mtp|mtp off|mtp disabled", text) else 0
    return Shape(
        layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads, head_dim=head_dim, value_dim=value_dim, intermediate=ffn, gated=gated,
        vocab=row.whole("vocab", 50304, "a GPT-2 vocabulary"), tied=tied, learned_positions=learned and not alibi,
        biases=learned or alibi or "bloom" in model, layer_norm=learned or alibi or "nemotron" in model or "bloom" in model,
        qk_norm="qwen3" in model.replace("-", "").replace(" ", ""), windows=windows, predicted=predicted, **values,
    )  # fmt: skip


# ---- layout ----


def _layout(row: Row, stack: Stack, shape: Shape) -> tuple[Layout, int, int, int]:
    """`(layout, microbatch, accumulation, ranks)`."""
    tensor, pipeline, context = (row.whole(name, 1) or 1 for name in ("tp", "pp", "cp"))
    inner = tensor * pipeline * context
    ranks, data = row.whole("n_gpus", 0), row.whole("dp", 0)
    if not ranks and not data:
        raise Refused("the row has neither n_gpus nor dp")
    if not ranks:
        ranks = data * inner
    if context > 1 and row.whole("seq_len", 0) < 2 * context:
        raise Refused(f"cp {context} ranks share samples of {row.whole('seq_len', 0)} tokens; each needs two stretches of them")
    if ranks % inner:
        raise Refused(f"{ranks} ranks are no multiple of tp {tensor} x pp {pipeline} x cp {context}")
    if data and data * inner != ranks:
        row.assumed.append(f"dp {ranks // inner}, of {ranks} ranks, where the row says {data}")
    data = ranks // inner
    batch, micro, steps = (row.whole(name, 0) for name in ("global_batch", "micro_batch", "grad_accum"))
    if 0 < batch < data:
        raise Refused(f"global_batch {batch} is less than one sample for each of {data} data ranks")
    micro, steps = _batch(row, batch, micro, steps, data)
    sharding = row.text("sharding")
    zero = _zero(row, sharding, stack)
    shard, replicate = data, 1
    if zero == 3:
        group = row.whole("fsdp_group", 0)
        if group and group < data * context and group < ranks:
            shard = max(1, math.gcd(max(1, group // context if group % context == 0 and group > data else group), data))
        elif not group and re.search(r"hsdp|hybrid", sharding):
            shard = math.gcd(data, row.whole("gpus_per_node", 8))
            row.assumed.append(f"{shard} ranks share a copy of the weights")
        replicate = data // shard
    expert = row.whole("ep", 1) or 1
    wide = row.whole("etp", 0)
    if not wide:
        wide = 1
        if shape.experts > 1 and tensor > 1:
            row.assumed.append("experts are not cut by tensor parallelism")
    expert = expert if shape.experts > 1 else 1
    if shape.experts % expert:
        raise Refused(f"ep {expert} does not divide {shape.experts} experts")
    sharing = shard if stack in WHOLE_EXPERTS else data * context * tensor
    if sharing % (expert * wide):
        cut = f" of etp {wide}" if wide > 1 else ""
        why = f"ep {expert}{cut} does not divide the {sharing} ranks that can share experts, of {ranks} ranks with tp {tensor}, pp {pipeline}, cp {context}"
        if stack in WHOLE_EXPERTS or ranks % (expert * wide):
            raise Refused(why)
        # A published row has ep 64 beside pp 8 on 256 ranks: its numbers of ranks and of experts are as printed, and only their cut contradicts itself.
        row.assumed.append(f"taken as printed, though {why}")
    stages = row.whole("vp", 1) or 1
    text = row.text("overlap", "notes", "framework")
    schedule: Schedule = "1f1b"
    if pipeline > 1 and re.search(r"zbv|dualpipe|zero.?bubble", text):
        schedule, stages = "zbv", 2
    elif pipeline > 1 and stages > 1:
        schedule = "interleaved"
    if pipeline == 1:
        stages = 1
    if pipeline * stages > shape.layers + 2:
        raise Refused(f"pp {pipeline} x vp {stages} stages of {shape.layers} layers")
    parallel = row.flag("seq_parallel")
    if parallel is None:
        parallel = not _old(row, stack)
    exchange = "ulysses" if context > 1 and "ulysses" in text + sharding else "ring"
    deep = bool(re.search(r"deepep|hybridep", text)) or (stack == "megatron" and "bridge" in row.text("framework") and expert > 1)
    if deep and not re.search(r"deepep|hybridep", text):
        row.assumed.append("DeepEP's dispatch, as NVIDIA's recipes have")
    layout = Layout(
        replicate=replicate, shard=shard, context=context, tensor=tensor, pipeline=pipeline, expert=expert, expert_tensor=wide, schedule=schedule,
        stages=stages, exchange=exchange, sequence_parallel=parallel, zero=zero, reshard=_reshards(row, sharding, stack, pipeline),
        dispatch="hierarchical" if deep else "alltoall",
    )  # fmt: skip
    return layout, micro, steps, ranks


def _batch(row: Row, batch: int, micro: int, steps: int, data: int) -> tuple[int, int]:
    """`(samples of a microbatch, microbatches of a step)` of one data rank."""
    if not batch and not micro:
        raise Refused("the row has neither global_batch nor micro_batch")
    if not batch:
        if not steps:
            row.assumed.append("one microbatch a step")
        return micro, steps or 1
    if not micro:
        micro = max(1, round(batch / data / steps)) if steps else 1
        row.assumed.append(f"microbatches of {micro}")
    found = batch / (data * micro)
    if found < 1:
        row.assumed.append(f"microbatches of {max(1, batch // data)}, for a batch of {batch} on {data} data ranks")
        return max(1, batch // data), 1
    if found != int(found):
        row.assumed.append(f"{round(found)} microbatches, where {batch} of {data} x {micro} are {found:.2f}")
    return micro, max(1, round(found))


def _zero(row: Row, sharding: str, stack: Stack) -> Any:
    stage = row.number("zero_stage")
    if stage is not None:
        if stage not in (0, 1, 2, 3):
            raise Refused(f"zero_stage {stage:g} is none of 0 to 3")
        return int(stage)
    words: tuple[tuple[str, int], ...] = (
        (r"zero[- ]?3|full_shard|fsdp|hsdp|hybrid|gemini", 3), (r"zero[- ]?2|shard_grad_op", 2), (r"zero[- ]?1|distributed optimizer|dist.?opt", 1),
        (r"ddp|none|zero[- ]?0|no_shard", 0),
    )  # fmt: skip
    for pattern, found in words:
        if re.search(pattern, sharding):
            return found
    found = {"torchtitan": 3, "llm_foundry": 3, "deepspeed": 3, "gigatrain_native": 3, "gigatrain_deepspeed": 3}.get(stack, 1)
    row.assumed.append(f"ZeRO {found}: the row names no sharding")
    return found


def _reshards(row: Row, sharding: str, stack: Stack, pipeline: int) -> bool:
    """Whether weights are dropped after the forward: not behind a pipeline of torchtitan's or ours, nor where the row says so."""
    if re.search(r"no.?reshard|reshard(_after_forward)?[ =:]*(false|never|off)|shard_grad_op", sharding + row.text("notes")):
        return False
    return not (pipeline > 1 and stack in ("torchtitan", "gigatrain_native"))


# ---- the rest of the workload ----


def _workload(row: Row, stack: Stack, shape: Shape, layout: Layout, microbatch: int, accumulation: int, chip: str) -> Workload:
    sequence = row.whole("seq_len")
    if not sequence:
        raise Refused("seq_len is 0")
    precision = _precision(row, stack, chip)
    dtype = {8: "fp8", 4: "fp4"}.get(PRODUCTS_BITS[precision])
    if dtype and CHIPS[chip].tflops(dtype).value is None:
        raise Refused(f"precision {row.row['precision']!r}: no rate of {dtype} products is known of the {CHIPS[chip].name}")
    text = row.text("notes", "overlap", "framework", "model", "sharding", "act_ckpt", "precision")
    frozen = "lora" in text
    if frozen:
        row.assumed.append("LoRA of rank 16 on attention's products")
    recompute, lean = _recompute(row, stack)
    recomputed = 1.0 if recompute == "none" else _recomputed(row, stack, shape, layout)
    if recomputed < 1 and stack == "torchtitan" and recompute == "selective":
        recompute = "full"  # its selective policy with a number: every such layer, whole
    compiled = row.flag("torch_compile")
    if compiled is None:
        compiled = bool(re.search(r"compile|fms|maxtext|jax", row.text("framework", "notes")))
    adam = row.text("optimizer")
    offload = "offload" in row.text("sharding", "optimizer")
    if "activation" in text and "offload" in text and "activation offload" in text:
        row.assumed.append("activations stay on the device")
    return Workload(
        shape=shape, layout=layout, sequence=sequence, microbatch=microbatch, accumulation=accumulation, precision=precision,
        states=_states(row, stack, layout, precision, frozen), recompute=recompute, recomputed=recomputed, attention=_attention(row, stack), stack=stack,
        version=_version(row), compiled=compiled, graphed=bool(re.search(r"cuda.?graph|_cg\b|cudagraph", text)), offload=offload, frozen=frozen,
        adapter_rank=16 if frozen else 0, balanced=not ("dropless" in text and "forced" not in text and shape.experts > 1),
        chunked_loss="liger" in text or "chunked" in text or stack == "gigatrain_native", optimizer="muon" if "muon" in adam else "adamw",
        overlap=_overlap(row), lean=lean,
    )  # fmt: skip


def _attention(row: Row, stack: Stack) -> Attention:
    text = row.text("attention_impl")
    if "unfused" in text or "eager" in text or "math" in text:
        return "unfused"
    if text:
        return "flash"
    if _old(row, stack) and row.text("source_date") < "2023-07" and not re.search(r"\bmi\d", row.text("gpu")):
        row.assumed.append("attention unfused, as Megatron's was until 2023")
        return "unfused"
    return "auto"


def _recompute(row: Row, stack: Stack) -> tuple[Recompute, tuple[str, ...]]:
    text = row.text("act_ckpt")
    if not text and "bridge" in row.text("framework") and re.search(r"deepseek.?v3", row.text("model")):
        row.assumed.append("norms and activations are made again, as in Megatron-Bridge's recipes of DeepSeek-V3")
        return "lean", ()
    if not text:
        row.assumed.append("nothing is made again: the row names no checkpointing")
        return "none", ()
    if re.search(r"^(none|no|false|off|disabled)\b", text):
        return "none", ()
    if re.search(r"core|attention", text) and "full" not in text:
        return "attention", ()
    if re.search(r"norm|act\b|_act|mlp|moe|mla_up", text) and not re.search(r"^full|\bop\b", text):
        return "lean", ("recompute_moe",) if re.search(r"\bmoe\b", text) else ()
    if "selective" in text or re.search(r"\bsac\b|\bop\b", text):
        return ("attention" if stack in ("megatron", "nanotron") else "selective"), ()
    if "lean" in text:
        return "lean", ()
    if not re.search(r"full|true|yes|all|on\b|uniform|layer", text):
        row.assumed.append(f"every layer is made again: {row.row['act_ckpt']!r} is not known")
    return "full", ()


_EVERY = {"other": 2, "2nd": 2, "second": 2, "3rd": 3, "third": 3, "4th": 4, "fourth": 4}


def _recomputed(row: Row, stack: Stack, shape: Shape, layout: Layout) -> float:
    """Share of the layers that checkpointing is of: `20 of 32 layers`, `every 2nd layer`, `50% of layers`, `block, 4 layers` (of each stage, as Megatron
    counts), torchtitan's `selective (option 2)`; `uniform` chunks are all made again."""
    text = row.text("act_ckpt")
    if found := re.search(r"(\d+)\s*(?:of|/|out of)\s*(\d+)\s*layers", text):
        share = int(found[1]) / max(1, int(found[2]))
    elif found := re.search(r"every[\s-]+(other|second|third|fourth|2nd|3rd|4th)\b", text):
        share = 1 / _EVERY[found[1]]
    elif stack == "torchtitan" and (found := re.search(r"selective\W*option\W*([2-9])\b", text)):
        share = 1 / int(found[1])
    elif found := re.search(r"(\d+(?:\.\d+)?)\s*%\s*of\s*(?:the\s*)?layers", text):
        share = float(found[1]) / 100
    elif found := re.search(r"\bblock\b\D{0,20}(\d+)\s*layer", text):
        share = int(found[1]) * layout.pipeline * layout.stages / shape.layers
    else:
        if found := re.search(r"\d+\s*layers?", text) if "uniform" not in text else None:
            row.assumed.append(f"every layer is made again: {found[0]!r} is not said to be of which")
        return 1.0
    if not share > 0:
        raise Refused(f"act_ckpt {row.row['act_ckpt']!r} is of no layer")
    return min(1.0, share)


def _overlap(row: Row) -> tuple[tuple[str, bool], ...]:
    """By axis, what the row says of it."""
    text = row.text("overlap", "notes")
    if re.search(r"all overlap off|no overlap", text):
        return tuple((axis, False) for axis in AXES)
    found: dict[str, bool] = {}
    if re.search(r"gradient_bucket false|gradient bucket false|overlap_grad_reduce[ =:]*(false|off)", text):
        found["shard"] = False
    elif re.search(r"overlap_grad_reduce|dp overlap on|dp_comm_overlap", text):
        found["shard"] = True
    if re.search(r"ep overlap on|1f1b overlap|overlap_moe", text):
        found["expert"] = True
    elif "ep overlap off" in text:
        found["expert"] = False
    if re.search(r"tp overlap off|tp_comm_overlap[ =:]*(false|off)", text):
        found["tensor"] = False
    elif re.search(r"tp overlap|tp_comm_overlap|userbuffers", text):
        found["tensor"] = True
    return tuple(found.items())


def _states(row: Row, stack: Stack, layout: Layout, precision: Precision, frozen: bool) -> States:
    """Bytes per parameter by what a stack keeps.

    Megatron: bf16 weights, fp32 sums of gradients, fp32 master and moments: 18 (megatron/training/theoretical_memory_usage.py), 6 + 12 / data with its
    distributed optimizer; its fp16 keeps gradients in fp16 until the optimizer makes fp32 copies. FSDP of torch: fp32 shards are the master, gathered in bf16,
    reduced in fp32 (llm-foundry's PURE: in bf16). DeepSpeed: 2 + 2 + 12. Narrower gathers of fp8 weights where torchtitan's float8 is tensorwise.
    """
    if precision == "fp32":
        return States(weights=4, gradients=4, master=0, moments=8, reduced=4, gathered=4)
    if re.search(r"(bf16|16)-true", row.text("precision")):  # nothing is kept in fp32 (Lightning's word)
        return States(weights=2, gradients=2, master=0, moments=4, reduced=2, gathered=2)
    if stack in ("torchtitan", "llm_foundry") and layout.zero == 3:
        pure = "pure" in row.text("precision", "sharding") or "fms" in row.text("framework")
        narrow = 1.0 if precision == "fp8_tensorwise" and stack == "torchtitan" else 2.0
        return States(weights=0, gradients=4, master=4, moments=8, reduced=2 if pure else 4, gathered=narrow)
    if stack in ("torchtitan", "llm_foundry"):
        return States(weights=4, gradients=4, master=0, moments=8, reduced=4, gathered=4)
    if stack in ("deepspeed", "gigatrain_deepspeed"):
        return States(weights=2, gradients=2, master=4, moments=8, reduced=2, gathered=2)
    if stack == "megatron" and precision == "fp16":
        return States(weights=2, gradients=2, master=4, moments=8, reduced=2, gathered=2)
    if stack == "megatron" and re.search(
        r"nemo|bridge|nvidia.*release", row.text("framework")
    ):  # NVIDIA's recipes sum and reduce gradients in bf16
        narrow = 1.0 if precision in ("fp8_delayed", "fp8_tensorwise") and layout.zero < 3 and not frozen else 2.0
        return States(weights=2, gradients=2, master=4, moments=8, reduced=2, gathered=narrow)
    gathered = 1.0 if stack == "megatron" and precision in ("fp8_delayed", "fp8_tensorwise") and layout.zero < 3 and not frozen else 2.0
    return States(weights=2, gradients=4, master=4, moments=8, reduced=4, gathered=gathered)
