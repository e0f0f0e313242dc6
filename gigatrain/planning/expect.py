"""Plan x Site -> what to expect of the run: seconds, bytes, watts, goodput, days and euros, each with its interval, or why it cannot be had."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gigatrain.architectures import Architecture
from gigatrain.errors import PlanError
from gigatrain.foreign import Foreign
from gigatrain.planning import hardware
from gigatrain.planning.estimate.cluster import Cluster, Level
from gigatrain.planning.estimate.workload import Layout, Precision, Shape, Stack, States, Workload
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
    return States(
        weights=stored,
        gradients=4.0,
        master=master,
        moments=moments,
        reduced={"fp32": 4.0, "bf16": 2.0}[plan.engine.reduce],
        gathered=size,
    )


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
    if ranks > 1:
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
        group = int(network.group_nodes.value or 0) * per_node * devices
        if group > joined * devices and ranks > group:
            levels.append(Level("rail", group, nic / 8 / devices))
        levels.append(Level("spine" if len(levels) > 1 else "rail", ranks, nic / 8 / devices))
    memory, _ = hardware.memory_bytes(site)
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
