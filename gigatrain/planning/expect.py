"""Plan x Site -> what to expect of the run: seconds, bytes, watts, goodput, days and euros, each with its interval, or why it cannot be had."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from gigatrain.architectures import Architecture
from gigatrain.errors import PlanError
from gigatrain.foreign import Foreign
from gigatrain.planning import adapting, budget, cost, hardware
from gigatrain.planning.estimate import energy
from gigatrain.planning.estimate.cluster import Cluster, Level
from gigatrain.planning.estimate.estimate import estimate
from gigatrain.planning.estimate.failures import Failures
from gigatrain.planning.estimate.goodput import Case, Goodput, case_of, of_case
from gigatrain.planning.estimate.recovery import Spares
from gigatrain.planning.estimate.saving import counted_hours
from gigatrain.planning.estimate.work import Estimate
from gigatrain.planning.estimate.workload import Layout, Precision, Shape, Stack, States, Workload
from gigatrain.planning.expected import Expected, Range
from gigatrain.site import Site

if TYPE_CHECKING:
    from gigatrain.planning.plan import Plan


def shape_of(architecture: Architecture | Foreign) -> Shape:
    """The numbers of an estimate. Raises PlanError for a model of transformers' own code, whose operations nobody has listed."""
    if isinstance(architecture, Foreign):
        raise PlanError(
            f"{architecture.class_name} runs by transformers' own code, whose operations no estimate knows; its memory is in the plan"
        )
    a = architecture
    sparse = sum(a.sparse_of(layer) for layer in range(a.layers))
    return Shape(
        layers=a.layers,
        hidden=a.hidden,
        heads=a.heads,
        kv_heads=a.kv_heads,
        head_dim=a.head_dim,
        value_dim=a.value_dim,
        intermediate=a.intermediate,
        gated=a.gated,
        vocab=a.vocab,
        tied=a.tied,
        biases=a.qkv_bias or a.mlp_bias,
        qk_norm=a.qk_norm != "none",
        experts=a.experts,
        experts_per_token=a.experts_per_token or 0,
        expert_width=a.expert_width if a.experts else 0,
        shared_width=a.shared_width,
        sparse_layers=sparse,
        q_rank=a.q_rank,
        kv_rank=a.kv_rank,
        rotary_dim=a.rotary_dim,
        windows=tuple(a.window_of(layer) for layer in range(a.layers)) if a.window else (),
    )


def workload_of(plan: Plan) -> Workload:
    """A plan in the terms of an estimate."""
    mesh, engine, fused = plan.mesh, plan.engine, {fusion.name for fusion in plan.fusions if fusion.on}
    deepspeed = engine.name == "deepspeed"
    zero = engine.zero if deepspeed else 3 if (mesh.shard or 1) * mesh.context > 1 else 0
    stack: Stack = "gigatrain_deepspeed" if deepspeed else "gigatrain_native"
    kernels = {choice.op: choice.kernel for choice in plan.kernels}
    return Workload(
        shape=shape_of(plan.architecture),
        layout=Layout(
            replicate=mesh.replicate,
            shard=mesh.shard or 1,
            context=mesh.context,
            tensor=mesh.tensor,
            pipeline=mesh.pipeline,
            expert=mesh.expert,
            schedule=mesh.schedule,
            stages=mesh.stages or 1,
            exchange=mesh.exchange,
            zero=zero,
            reshard=engine.reshard and mesh.pipeline == 1,
            dispatch=mesh.dispatch,
        ),
        sequence=plan.sequence,
        microbatch=plan.microbatch,
        accumulation=plan.accumulation,
        precision=_precision(plan),
        states=_states(plan, zero),
        recompute=plan.recompute,
        stack=stack,
        compiled=plan.compile,
        graphed="graph" in fused,
        offload=engine.offload,
        chunked_loss=kernels.get("linear_cross_entropy") in ("chunked", "fused"),
        optimizer=plan.optim.name,
        frozen=plan.adapter is not None,
        adapter_rank=plan.adapter.rank if plan.adapter is not None else 0,
        adapter_parameters=adapting.trained(plan.decoder, plan.adapter) if plan.adapter is not None else 0,
        lean=tuple(sorted(fused | {op for op, kernel in kernels.items() if kernel not in ("reference", "foreach", "sdpa", "chunked")})),
    )


def _precision(plan: Plan) -> Precision:
    if plan.fp8 is None:
        return "fp32" if plan.precision == "fp32" else "bf16"
    if plan.fp8.scaling in ("mxfp8", "nvfp4"):
        return plan.fp8.scaling
    if plan.fp8.scaling == "tensorwise":
        return "fp8_delayed" if plan.fp8.amax == "delayed" else "fp8_tensorwise"
    return "fp8_rowwise" if plan.fp8.scaling == "rowwise" else "fp8_blockwise"


def _states(plan: Plan, zero: int) -> States:
    """Bytes per parameter as planning/cost.py counts them. Sharded weights (FSDP2) are the fp32 masters themselves, and gathered in what computes."""
    size = 4.0 if plan.precision == "fp32" else 2.0
    master = {"fp32": 4.0, "bf16+16": 2.0, "bf16+8": 1.0}[plan.optim.master] if size == 2.0 else 0.0
    moments = {"fp32": 8.0, "bf16": 4.0, "int8": 2.0}[plan.optim.moments]
    stored = size
    if zero == 3 and plan.engine.name == "native" and plan.optim.master == "fp32":
        stored, master = 4.0, 0.0
    if plan.engine.name == "deepspeed" and size == 4.0:
        master = 4.0  # its partition of the weights is a copy
    if plan.adapter is not None:  # frozen weights are no masters; of 4 bits they are as wide as their mean
        frozen = adapting.frozen_bytes(plan.decoder, plan.adapter, int(size))
        stored = frozen / plan.decoder.parameters()
        master = 4.0 if size == 2.0 and plan.optim.master == "fp32" else master
    return States(
        weights=stored,
        gradients=4.0,
        master=master,
        moments=moments,
        reduced={"fp32": 4.0, "bf16": 2.0}[plan.engine.reduce],
        gathered=stored if plan.adapter is not None else size,
    )


STEPPING = (
    "redone",
    "corruption",
    "reduced",
)  # of what is lost, that which draws a step's watts: steps run twice, thrown away, or on fewer nodes


def cluster_of(site: Site, ranks: int) -> Cluster:
    """The machines of a run of `ranks` on a site, every number of it the site's, else its accelerator's.

    Raises PlanError where the accelerator is unknown, or what joins more ranks than one node has.
    """
    if site.device != "cuda" or site.accelerator is None:
        said = "runs on CPUs" if site.device == "cpu" else "does not say what its accelerators are"
        raise PlanError(f"{site.name} {said}, so that seconds and watts of a step are unknown; name a site with an accelerator by --site")
    chip = hardware.chip(site.accelerator)
    assumed: list[str] = []

    def known(path: str, own: float | None, table: float | None) -> float | None:
        if own is None and table is not None:
            assumed.append(f"{path} = {table:g}, the {chip.name}'s")
        return own if own is not None else table

    network = site.network
    inner = known("network.scale_up_accelerators", network.scale_up_accelerators.value, chip.scale_up_accelerators.value)
    per_node = int(site.node.accelerators.value or inner or 0)
    if not per_node:
        raise PlanError(f"{site.name} does not say how many accelerators a node has (node.accelerators); nothing between them can be timed")
    levels: list[Level] = []
    devices, joined = chip.devices, int(inner or per_node)
    if ranks == 1:
        levels.append(Level("scale_up", devices, 1.0))  # which joins nobody: no transfer is ever timed by it
    else:
        fast = known("network.scale_up_gbyte_s", network.scale_up_gbyte_s.value, chip.scale_up_gbyte_s.value)
        if fast is None:
            raise PlanError(
                f"{site.name} does not say how fast its accelerators are joined (network.scale_up_gbyte_s); no transfer can be timed"
            )
        levels.append(Level("scale_up", joined * devices, fast / devices))
    if ranks > joined * devices:
        nic = known("network.nic_gbit_s", network.nic_gbit_s.value, chip.nic_gbit_s.value)
        if nic is None:
            raise PlanError(
                f"{site.name} does not say how fast its nodes are joined (network.nic_gbit_s); no transfer between them can be timed"
            )
        kind = hardware.network_kind(network.name)
        group = int(network.group_nodes.value or 0) * per_node * devices
        if group > joined * devices and ranks > group:
            levels.append(Level(f"rail{kind}", group, nic / 8 / devices))
        levels.append(Level(f"{'spine' if len(levels) > 1 else 'rail'}{kind}", ranks, nic / 8 / devices))
    memory = hardware.visible_bytes(site)
    cap, sold = site.power.device_watts.value, chip.watts.value
    return Cluster(
        chip=chip.id,
        accelerators=-(-ranks // devices),
        per_node=per_node,
        levels=tuple(levels),
        memory_bytes=memory,
        cap_watts=cap if cap is not None and sold is not None and cap < sold else None,
        site=site.name,
        assumed=tuple(assumed),
    )


@dataclass(frozen=True, slots=True)
class Prospect:
    """What `expect` came to and what it is made of: for `--explain`, pictures and tests. None where `expected.unknown` says why."""

    expected: Expected
    workload: Workload | None = None
    cluster: Cluster | None = None
    estimate: Estimate | None = None
    draw: energy.Draw | None = None
    goodput: Goodput | None = None
    case: Case | None = None


def expect(plan: Plan, site: Site, constants: Mapping[str, float] | None = None) -> Expected:
    """What a plan expects of its run on its site; what cannot be had is None, and `unknown` says why. Raises nothing for it: a run needs no forecast."""
    return prospect(plan, site, constants).expected


def prospect(plan: Plan, site: Site, constants: Mapping[str, float] | None = None, *, explain: bool = False) -> Prospect:
    """The same with the records behind it; `explain`: with the goodput's sensitivity table."""
    from gigatrain.planning.estimate.constants import VALUES

    try:
        workload, cluster = workload_of(plan), cluster_of(site, plan.ranks)
        found = estimate(workload, cluster, VALUES if constants is None else constants)
    except PlanError as failure:
        return Prospect(Expected(unknown={"step_s": str(failure)}))
    drawn = energy.draw(found, workload, cluster, plan.watts)
    case, assumed = _case(plan, site, cluster, found, workload)
    kept = of_case(case, assumed, explain=explain)
    best = of_case(replace(case, saving=replace(case.saving, far_interval_s=0.0)))
    expected = _expected(plan, found, drawn, kept, best.every_steps)
    if (known := _failures(site)) is not None:
        expected = expected.model_copy(update={"failure_hours": site.failure_hours.value, "failure_source": known.source})
    return Prospect(expected, workload, cluster, found, drawn, kept, case)


def _case(plan: Plan, site: Site, cluster: Cluster, found: Estimate, workload: Workload) -> tuple[Case, tuple[str, ...]]:
    """The run as the recipe saves; a checkpoint has every parameter once."""
    copies = plan.mesh.replicate
    whole = cost.checkpoint_bytes(plan.architecture, plan.compute, plan.optim, masters=not workload.states.master, adapter=plan.adapter)
    days = plan.steps * found.step_s / 86_400
    every, write, nodes = plan.checkpoint.every, site.storage.write_gbyte_s.value, budget.whole(site)
    left = None if nodes is None else nodes - -(-cluster.accelerators // cluster.per_node)
    spares = None if left is None or left <= 0 else Spares(left, idle_share=0.0)  # other users' nodes, of which the scheduler gives one
    case, assumed = case_of(
        cluster.accelerators,
        cluster.per_node,
        found.step_s,
        float(whole),
        write_gbyte_s=write,
        failures=_failures(site),
        replicas=copies,
        every_steps=None if every == "auto" else every,
        days=days,
        spares=spares,
    )
    keeps = plan.checkpoint
    if keeps.near is None:
        return case, assumed
    if keeps.near_copies < 1 or cluster.accelerators <= cluster.per_node:
        return case, (*assumed, "the near tier has no copy on another node, so that it is not counted on")
    interval_s = 0.0 if keeps.near_every == "auto" else keeps.near_every * found.step_s
    return replace(case, saving=replace(case.saving, near=True, near_interval_s=interval_s)), assumed


def _failures(site: Site) -> Failures | None:
    hours = site.failure_hours
    return counted_hours(hours.value, f"{site.name}: {hours.source}")


def _expected(plan: Plan, found: Estimate, drawn: energy.Draw, kept: Goodput, best: int) -> Expected:
    step = Range(low=found.low_s, mid=found.step_s, high=found.high_s)
    rate = Range(low=found.tokens / found.high_s, mid=found.tokens / found.step_s, high=found.tokens / found.low_s)
    goodput = Range(low=kept.low, mid=kept.share, high=kept.high)
    seconds = plan.steps * found.step_s / kept.share if kept.share > 0 else math.inf
    unknown = dict(drawn.unknown)
    days = bill = None
    if math.isfinite(seconds):
        days = Range(
            low=plan.steps * step.low / kept.high / 86_400, mid=seconds / 86_400, high=plan.steps * step.high / max(kept.low, 1e-6) / 86_400
        )
        stepping = kept.share + sum(kept.lost.get(name, 0.0) for name in STEPPING)
        bill = energy.bill(drawn, plan.watts, seconds, min(1.0, stepping))
        unknown |= bill.unknown
    else:
        unknown["days"] = "the run fails more often than it saves: no step of it is kept; save more often (checkpoint.every)"
    facility = drawn.watts.get("facility")
    share = Range(low=days.low / days.mid, mid=1.0, high=days.high / days.mid) if days is not None else None
    chip = hardware.chip(plan.watts.chip) if plan.watts.chip else None
    dense = chip.bf16.value / chip.devices if chip is not None and chip.bf16.value else None
    return Expected(
        step_s=step,
        tokens_per_s=rate,
        tokens_per_s_per_rank=_over(rate, found.ranks),
        mfu=found.model_flops / found.step_s / found.ranks / (dense * 1e12) if dense else None,
        phases={name: seconds for name, seconds in found.phases.items() if seconds},
        busy=found.busy,
        # By planning/cost.py, whose weights, gradients and states are exact for our engines; the interval is residency.py's of the same.
        memory_bytes=Range(
            low=plan.memory.total * found.memory_low / found.memory_bytes,
            mid=plan.memory.total,
            high=plan.memory.total * found.memory_high / found.memory_bytes,
        ),
        watts=drawn.watts,
        peak_watts=drawn.peak,
        ramp_watts=drawn.ramp_watts,
        tokens_per_s_mw=None
        if facility is None
        else Range(
            low=rate.low * goodput.low / facility.high * 1e6,
            mid=rate.mid * goodput.mid / facility.mid * 1e6,
            high=rate.high * goodput.high / facility.low * 1e6,
        ),
        goodput=goodput,
        lost={name: share for name, share in kept.lost.items() if share > 0},
        checkpoint_every=best,
        near_every=kept.near_every_steps,
        days=days,
        mwh=_wider(bill.mwh, share) if bill is not None else None,
        eur=_wider(bill.eur, share) if bill is not None else None,
        tco2=_wider(bill.tco2, share) if bill is not None else None,
        limits=found.limits,
        outside=found.outside,
        assumed=tuple(dict.fromkeys((*found.assumed, *kept.assumed))),
        unknown=unknown,
    )


def _over(one: Range, count: float) -> Range:
    return Range(low=one.low / count, mid=one.mid / count, high=one.high / count)


def _wider(one: Range | None, share: Range | None) -> Range | None:
    """A bill whose length is uncertain too: both errors are independent, so that their logarithms' squares add up."""
    if one is None or share is None or one.mid <= 0:
        return one
    low = math.exp(-math.hypot(math.log(one.mid / one.low), math.log(share.mid / share.low)))
    high = math.exp(math.hypot(math.log(one.high / one.mid), math.log(share.high / share.mid)))
    return Range(low=one.mid * low, mid=one.mid, high=one.mid * high)
