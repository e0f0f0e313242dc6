"""Every constant of the cost model: name, value, unit, and where it is from. A value is the fit's where fitted.json has one, else its prior.

A prior is what somebody published or what arithmetic gives; `spread` is how far the fit may move it for the price of one residual of its own size: in
units of the natural logarithm, or of log(x / (1 - x)) for a share. A spread of 0 fixes the constant. A constant that no measurement touches stays at its prior.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from gigatrain.planning.estimate.collectives import COLLECTIVES

FITTED = Path(__file__).with_name("fitted.json")
_MLE = "stas00/ml-engineering compute/accelerator/README.md at 744d01e1: MAMF"
_AZURE = "Azure/AI-benchmarking-guide, Azure_Results"
_FLASH = "Dao-AILab/flash-attention README and benchmark pictures"
_SIMUMAX = "MooreThreads/SimuMax configs/system at 4dcaae51"
_ARITHMETIC = "prior: arithmetic of the kernel"


@dataclass(frozen=True, slots=True)
class Constant:
    """`unit` share: between 0 and 1. `source` is of the prior; whether the value is fitted is `value != prior`."""

    value: float
    prior: float
    spread: float
    unit: str
    source: str


_FOUND: list[tuple[str, float, float, str, str]] = []


def _add(unit: str, source: str, spread: float, **named: float) -> None:
    """Adds constants of one unit and source; `__` in a keyword stands for the dot of a name."""
    _FOUND.extend((name.replace("__", "."), float(prior), spread, unit, source) for name, prior in named.items())


# Products: share of the sold dense rate that a large product holds in a run, under power and beside its neighbours. It is below what a benchmark of one
# product alone reaches (MAMF, hardware.py), which caps it.
_add(
    "share",
    f"{_MLE}: 0.87 of the peak; {_AZURE}: 0.81 at 8192^3; {_SIMUMAX}: 0.70 to 0.76 of PCIe ones; 0.85 of MAMF as on Hopper",
    0.06,
    gemm__sm_80__bf16__peak_share=0.74,
)
_add("share", f"{_MLE}: 0.80 of the peak; a run at 700 W holds less", 0.20, gemm__sm_90__bf16__peak_share=0.70)
_add("share", f"{_MLE}: 0.71 of the peak; {_AZURE}: 1290 of 1979 at 8192^3", 0.20, gemm__sm_90__fp8__peak_share=0.61)
_add(
    "share",
    f"{_MLE}: 0.78 of the peak; as a run on Hopper holds 0.84 of its MAMF",
    0.10,
    gemm__sm_100__bf16__peak_share=0.64,
)
_add("share", f"{_MLE}: 0.76 of the peak", 0.30, gemm__sm_100__fp8__peak_share=0.64)
_add(
    "share",
    "prior: cuBLAS 12.9 holds 6.8 of 10 PFLOP/s on GB200 (NVIDIA, recalled), and a run 0.85 of that",
    0.30,
    gemm__sm_100__fp4__peak_share=0.58,
)
_add(
    "share",
    f"{_MLE}: 0.51 and 0.60 of the peak, MI300X and MI325X",
    0.30,
    gemm__gfx942__bf16__peak_share=0.46,
    gemm__gfx942__fp8__peak_share=0.42,
)
_add("share", f"{_MLE}: 0.63 of the peak of 2500", 0.30, gemm__gfx950__bf16__peak_share=0.55, gemm__gfx950__fp8__peak_share=0.50)
_add("share", "prior: as gfx950, of fp4", 0.0, gemm__gfx950__fp4__peak_share=0.40)
_add(
    "share",
    "prior: LUMI's published runs hold a third of a device's 191.5 TFLOP/s, all of their work included",
    0.30,
    gemm__gfx90a__bf16__peak_share=0.45,
)
_add("share", "prior: TF32 is half of the bf16 rate, and reaches less of it", 0.0, gemm__fp32__peak_share=0.60)
# Shapes: the depth (bytes of k) at which a tile's prologue and epilogue are as long as its main loop. From the sizes 1k to 16k in Azure's tables.
_add("bytes", f"{_AZURE}: FP16 1k to 8k", 0.3, gemm__sm_80__depth=220)
_add("bytes", f"{_AZURE}: FP8 1k to 16k", 0.0, gemm__sm_90__depth=300)
_add("bytes", f"{_SIMUMAX}: shapes of b200_bf16_ceperm.json", 0.1, gemm__sm_100__depth=600)
_add("bytes", "prior: as sm_90", 0.0, gemm__gfx942__depth=400, gemm__gfx950__depth=500, gemm__gfx90a__depth=300)
_add(
    "share",
    "prior: how much of a last, part-filled wave of tiles is lost; the rest is won back by other tiles and stream-K",
    0.0,
    gemm__wave_loss=0.6,
)
# Grouped products over one product of the same tiles.
_add("share", f"{_SIMUMAX}: 0.52 to 0.71 grouped against 0.70 to 0.76", 0.4, grouped__sm_80__of_gemm=0.85)
_add("share", "prior: as sm_80; groups of one launch share the wave", 0.4, grouped__sm_90__of_gemm=0.80)
_add("share", f"{_SIMUMAX}: b200", 0.4, grouped__sm_100__of_gemm=0.75)
_add("share", "prior: as sm_80", 0.0, grouped__gfx942__of_gemm=0.75, grouped__gfx950__of_gemm=0.75, grouped__gfx90a__of_gemm=0.7)
_add("s", "prior: a cuBLASLt launch from C++, without Python in between", 0.0, grouped__launch_s=4e-6)
# Attention: share of the sold dense bf16 rate at head_dim 128 and long sequences, forward; backward over forward; and what head_dim 64 keeps.
_add("share", f"{_FLASH}: FlashAttention-2 on A100, 200 to 230 of 312", 0.2, attention__sm_80__flash2=0.62)
_add("share", f"{_FLASH}: FlashAttention (the first, and Triton's) on A100, 100 to 140 of 312", 0.2, attention__sm_80__flash1=0.40)
_add("share", f"{_FLASH}: FlashAttention-2 on H100, 350 to 400 of 989; {_AZURE}: 328", 0.2, attention__sm_90__flash2=0.37)
_add("share", f"{_FLASH}: FlashAttention-3 and cuDNN 9 on H100, 640 to 740 of 989 at 16k tokens", 0.2, attention__sm_90__fused=0.65)
_add("share", "prior: cuDNN 9 on B200, 1100 to 1350 of 2250 (arXiv 2603.05451, recalled)", 0.15, attention__sm_100__fused=0.52)
_add("share", "prior: FlashAttention-4 on B200, up to 1600 of 2250 (arXiv 2603.05451, recalled)", 0.15, attention__sm_100__flash4=0.66)
_add(
    "1",
    "prior: Blackwell Ultra has twice the exponentials a clock (NVIDIA, GB300), of which softmax is bound in part",
    0.1,
    attention__ultra_gain=1.25,
)
_add("share", "prior: composable-kernel and aiter attention, 400 to 550 of 1307", 0.25, attention__gfx942__fused=0.36)
_add("share", "prior: as gfx942 by its peak", 0.25, attention__gfx950__fused=0.42)
_add("share", "prior: composable-kernel attention on a device of 191.5 TFLOP/s", 0.25, attention__gfx90a__fused=0.35)
_add("share", f"{_FLASH}: backward at 0.8 to 0.9 of the forward's rate, FLOPs counted 2.5 times", 0.3, attention__backward_share=0.80)
_add("share", f"{_FLASH}: head_dim 64 over 128", 0.3, attention__narrow_share=0.82)
_add("tokens", f"{_FLASH}: 1k over 16k tokens", 0.4, attention__ramp=350)
_add("share", "prior: cuDNN and TE with fp8 attention gain a third of the rate's doubling", 0.0, attention__fp8_gain=0.25)
# Memory: share of the sold bandwidth that one pass over a large tensor reaches, and the time of any kernel from its first block to its last, beyond that.
_add("share", f"{_AZURE}: 1.61 to 1.75 of 2.0 TB/s", 0.3, memory__sm_80__share=0.80)
_add("share", f"{_AZURE}: 2.9 to 3.18 of 3.35 TB/s", 0.3, memory__sm_90__share=0.80)
_add("share", "prior: 6.5 to 7 of 8 TB/s", 0.3, memory__sm_100__share=0.75)
_add("share", "prior: 4.0 to 4.3 of 5.3 TB/s in BabelStream", 0.3, memory__gfx942__share=0.70)
_add("share", "prior: as gfx942", 0.3, memory__gfx950__share=0.70, memory__gfx90a__share=0.70)
_add("share", f"{_SIMUMAX}: permutation at 0.19 of HBM on A100; later kernels gather whole rows", 0.0, memory__permute_share=0.45)
_add(
    "share",
    "prior: a cast that writes along rows and columns transposes through shared memory; Transformer Engine's reach half to two thirds",
    0.4,
    memory__quantise_share=0.50,
)
_add("s", _ARITHMETIC + ": ramp, drain and the scheduler's gap between dependent kernels, 1.5 to 4 us", 0.2, kernel__latency_s=3e-6)
# Optimizer: multi-tensor passes over fp32 state, of the sold bandwidth; and its update on the host where it is offloaded.
_add("share", "prior: apex and TE multi-tensor Adam", 0.3, optimizer__share=0.70)
_add(
    "GB/s",
    "prior: ZeRO-Offload (arXiv 2101.06840, recalled): 10 B parameters in 2.6 s of a host with DDR4, by 8 ranks; DDR5 half as fast again",
    0.4,
    offload__host_gbyte_s=20,
)
_add("GB/s", "PCIe 5 x16: 64 sold, 50 to 55 reached, pinned", 0.0, offload__link_gbyte_s=50)
# fp8 recipes: rate of products by blocks, over scaling by tensor: a promotion of sums every 128 of k.
_add("share", "prior: DeepGEMM and cuBLAS 12.9 by blocks, 1200 to 1350 where cuBLAS by tensor has 1400", 0.3, gemm__blockwise_share=0.88)
_add(
    "share",
    "prior: block-scaled tensor cores run at the rate of fp8, whose scale factors must be read and swizzled",
    0.3,
    gemm__mx_share=0.93,
)
# Power: compute-bound kernels slow as ((watts - idle) / (reference - idle)) ** (1 / exponent), voltage falling with the clock.
_add(
    "1",
    f"{_MLE}: B200 to GB200, H100 to GH200 by their watts; NVIDIA's power profiles: 15 % energy for 3 % of a step",
    0.15,
    power__exponent=3.0,
)
_add("share", "prior: draw that stays at any clock: leakage, HBM, links", 0.0, power__idle_share=0.25)
# Releases: planning.md 1d, the same configuration in later NeMo containers, 54 groups: 5.9 % in the median, of two releases about a year apart.
_add("1", "planning.md 1d: 5.9 % between releases, of a step of which kernels are most", 0.5, software__gain_year=0.06)
# Experts: the host reads how many tokens each expert has before it launches what follows; until that is launched the device waits.
_add("s", "prior: one copy to the host, and launches of two dozen kernels behind it", 0.5, moe__sync_s=300e-6)
# Scale: the slowest of many ranks. Per doubling of the nodes that wait for each other.
_add(
    "1",
    "prior: spread of identical nodes 2.7 % at most (7 vendors' 8xB200, MLPerf v5.1), the slowest of many",
    0.7,
    scale__wait_share=0.004,
)

# Software stacks. What a stack does by habit: how much of an axis's transfers it runs beside compute, where there is enough of it; the host's time per kernel;
# what its fusion leaves of the passes over memory; a constant of a step. Eras of one stack are names of their own (stacks.py chooses).
_AXES = ("tensor", "context", "expert", "shard", "replicate", "pipeline")
_STACKS: dict[str, tuple[str, float, float, float, tuple[float, float, float, float, float, float]]] = {
    # passes_share: torch's eager operations move 1.25 times what is counted (casts, fp32 norms), kernels of Transformer Engine and apex less
    # name: source, launch_s, passes_share, step_s, overlap of tensor, context, expert, shard, replicate, pipeline
    "gigatrain_native": (
        "prior: as torchtitan, with Triton kernels; nothing was measured on a GPU yet",
        12e-6,
        1.0,
        4e-3,
        (0.05, 0.7, 0.1, 0.85, 0.7, 0.5),
    ),
    "gigatrain_deepspeed": (
        "prior: DeepSpeed below gigatrain's models and kernels; not measured yet",
        18e-6,
        1.0,
        15e-3,
        (0.05, 0.5, 0.1, 0.6, 0.5, 0.3),
    ),
    "megatron": (
        "prior: Transformer Engine, --overlap-grad-reduce, --overlap-param-gather, --tp-comm-overlap",
        12e-6,
        1.0,
        8e-3,
        (0.6, 0.8, 0.15, 0.7, 0.7, 0.6),
    ),
    "megatron_plain": (
        "prior: Megatron-LM without the overlap flags, as it is started by hand",
        12e-6,
        1.2,
        10e-3,
        (0.05, 0.6, 0.05, 0.05, 0.05, 0.3),
    ),
    "megatron_2021": (
        "prior: before 2023, apex kernels; one sum of input gradients beside weight gradients; 20 us for each of twice the counted kernels",
        45e-6,
        1.0,
        2e-3,
        (0.25, 0.05, 0.05, 0.05, 0.05, 0.05),
    ),
    "torchtitan": ("prior: FSDP2 prefetch, compiled layers, no async TP by default", 14e-6, 1.25, 5e-3, (0.1, 0.6, 0.05, 0.85, 0.7, 0.5)),
    "llm_foundry": (
        "planning.md 3: eager FSDP fits 230 to 350 us per layer forward, of 14 counted kernels; autocast copies, LayerNorm in fp32",
        20e-6,
        1.25,
        15e-3,
        (0.05, 0.05, 0.05, 0.85, 0.7, 0.05),
    ),
    "nanotron": (
        "prior: eager Python modules, blocking collectives; planning.md 1c: at 2,000 tokens a GPU three times slower than Megatron",
        30e-6,
        1.25,
        30e-3,
        (0.05, 0.05, 0.05, 0.1, 0.1, 0.05),
    ),
    "deepspeed": ("prior: ZeRO's hooks in Python for every module", 20e-6, 1.25, 20e-3, (0.05, 0.3, 0.05, 0.6, 0.5, 0.1)),
    "generic": ("prior: between the named stacks", 14e-6, 1.25, 10e-3, (0.1, 0.4, 0.05, 0.6, 0.5, 0.3)),
}
_MICROBATCH = (
    "prior: Python of the schedule, the loader and the loss, once a microbatch, of two dozen small operations beside the counted kernels"
)
# What measurements speak of; the rest stays as said.
_FREE = {
    "megatron": ("passes_share", "tensor", "expert", "shard", "pipeline"),
    "megatron_2021": ("launch_s", "checkpoint_s", "microbatch_s", "tensor"),
    "llm_foundry": ("passes_share", "shard"),
    "deepspeed": ("passes_share", "shard"),
    "torchtitan": ("launch_s", "passes_share", "shard"),
}


def _free(name: str, of: str, spread: float) -> float:
    return spread if of in _FREE.get(name, ()) else 0.0


_CHECKPOINT = (
    "prior: Megatron's CheckpointFunction, once a layer: 16 reads and writes of generator states with that of attention's dropout, each behind a switch of "
    "device, and an autograd engine within the engine: 48 us without the switches on a host of 2026 (measured), some 16 x 8 us more with them, up to twice "
    "on one of 2020: 0.2 to 0.35 ms"
)
for _name, (_source, _launch, _passes, _step, _overlap) in _STACKS.items():
    _add("s", _source, _free(_name, "launch_s", 0.5), **{f"stack.{_name}.launch_s": _launch})
    _add("1", _source, _free(_name, "passes_share", 0.3), **{f"stack.{_name}.passes_share": _passes})
    _add("s", _source, _free(_name, "step_s", 0.5), **{f"stack.{_name}.step_s": _step})
    _across = 0.6 if _name == "megatron" else _overlap[2]
    _add(
        "share",
        "prior: Megatron's recipes run 1F1B with the all-to-all beside it where it leaves the node",
        _free(_name, "expert_across", 0.6),
        **{f"stack.{_name}.overlap.expert_across": _across},
    )
    _add(
        "s",
        _MICROBATCH,
        _free(_name, "microbatch_s", 0.5),
        **{f"stack.{_name}.microbatch_s": 1.5e-3 if _name != "megatron_2021" else 3e-3},
    )
    for _axis, _share in zip(_AXES, _overlap, strict=True):
        _add("share", _source, _free(_name, _axis, 0.6), **{f"stack.{_name}.overlap.{_axis}": _share})
# Of the other stacks it is in what their launches were fitted to.
_add("s", _CHECKPOINT, _free("megatron_2021", "checkpoint_s", 0.5), stack__megatron_2021__checkpoint_s=0.3e-3)
_add("share", "prior: where a run is said to overlap an axis", 0.0, overlap__told_share=0.75)
_add("share", "prior: torch.compile fuses a layer's passes, and launches about half as many kernels", 0.0, compiled__launch_share=0.5)
# What a transfer beside compute takes of it: Calculon has 15 % by NVLink and 2 % between nodes; Echo models it by pairs of kernels.
_add(
    "share",
    "calculon-ai/calculon systems: 15 % of an A100's SMs by NVLink, 2 % by InfiniBand",
    0.0,
    slowdown__tensor=0.12,
    slowdown__shard=0.08,
)
_add("share", "prior: as a shard's", 0.0, slowdown__replicate=0.08, slowdown__context=0.08, slowdown__expert=0.15, slowdown__pipeline=0.03)


# Links, by collectives.py's measurements. Nccl-tests fix them well; a fit may move only the rates that training sees beside its own compute.
_FREE_LINKS = (
    "link.nvlink4.alltoall_share",
    "link.nvl72.alltoall_share",
)
for _name, (_value, _spread, _unit, _source) in COLLECTIVES.items():
    _add(
        "share" if _name.endswith("share") and 0 < _value < 1 else _unit,
        _source,
        _spread * 2 if _name in _FREE_LINKS else 0.0,
        **{_name: _value},
    )


def _table() -> dict[str, Constant]:
    fitted: dict[str, float] = json.loads(FITTED.read_text(encoding="utf-8")) if FITTED.exists() else {}
    table = {name: Constant(fitted.get(name, prior), prior, spread, unit, source) for name, prior, spread, unit, source in _FOUND}
    assert len(table) == len(_FOUND), "a constant is named twice"
    assert set(fitted) <= set(table), f"fitted.json names what no constant is called: {sorted(set(fitted) - set(table))}"
    return table


TABLE: dict[str, Constant] = _table()
VALUES: Mapping[str, float] = MappingProxyType({name: constant.value for name, constant in TABLE.items()})
PRIORS: Mapping[str, float] = MappingProxyType({name: constant.prior for name, constant in TABLE.items()})
