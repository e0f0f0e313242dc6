"""The process and its device, made ready for a plan: switches, generator states, and the fused kernels judged before the run trusts them."""

import os
from collections.abc import Callable

import torch

from gigatrain.engines import low
from gigatrain.errors import RunError
from gigatrain.foreign import Foreign
from gigatrain.kernels import launch, widened
from gigatrain.models.decoder import verify as verified
from gigatrain.planning.kernels import NARROW
from gigatrain.planning.plan import Plan


def prepare(plan: Plan) -> None:
    """Set the process-wide switches of the run; RunError where torch or the device cannot do what the plan says."""
    if plan.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    torch.manual_seed(plan.seed)  # nothing of ours draws from it, but a checkpoint keeps it: two runs are equal in all that they keep
    if plan.compile:
        torch.use_deterministic_algorithms(plan.deterministic)
    else:  # the same switch without Inductor, which that call imports in 2 s to tell it too
        torch.set_deterministic_debug_mode("error" if plan.deterministic else "default")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] (every kernel writes all of its outputs: NaNs first cost a pass)
    if plan.device == "cpu":
        return
    if not torch.cuda.is_available():
        raise RunError(
            f"the plan is for site {plan.site!r} with a CUDA device, but torch {torch.__version__} finds none; "
            "install a CUDA build of torch, or choose --site laptop"
        )
    if plan.compute == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise RunError(f"{torch.cuda.get_device_name()} has no bf16 arithmetic; --set train.precision=fp32")
    if plan.fp8 is not None and (why := low.refused(plan.fp8, torch.device("cuda", torch.cuda.current_device()))):
        raise RunError(
            f'train.precision "fp8" with fp8.scaling {plan.fp8.scaling!r}: {why}; choose another, or set fp8.emulate = true for its numbers'
        )


def handicap(plan: Plan) -> str | None:
    """What makes every step slow on this processor; None: nothing that is known.

    An EPYC with AVX2 alone, torch 2.13, two cores otherwise idle: the quickstart's step of 2,048 tokens takes 3.3 s in bf16 and 0.54 s in fp32; of torch's own
    products, without kernels/widened.py, 11.3 and 3.1 s.
    """
    if plan.device == "cuda" or plan.compute != "bf16" or not widened.needed():
        return None
    return "this processor has no bf16 products (AVX-512, AMX); those of fp32 in their place take several times as long as a run in fp32"


def verify(plan: Plan, device: torch.device, say: Callable[[str], None]) -> None:
    """Compile the run's fused kernels, and judge each on this device against fp64 before the run trusts it."""
    launch.cache_on_this_node()
    if isinstance(plan.architecture, Foreign):
        return  # the engine compares such a model with itself
    kernels = {choice.op: choice.kernel for choice in plan.kernels if choice.kernel not in NARROW.get(choice.op, ())}
    if plan.fp8 is not None:
        low.verify(plan, device)
    shared = plan.mesh.tensor * (plan.mesh.context if plan.mesh.exchange == "ulysses" else 1)
    worst = verified(
        plan.architecture,
        kernels,
        device,
        torch.bfloat16 if plan.compute == "bf16" else torch.float32,
        sequence=plan.sequence,
        packed=plan.documents,
        ranks=shared,
    )
    if worst:
        found = ", ".join(f"{op} {multiple:.2f}" for op, multiple in sorted(worst.items()))
        say(f"  verified fused kernels on {torch.cuda.get_device_name(device)}, error over what is allowed: {found}")


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Of torch's generators on the host and, where it is a GPU, on the device: uint8, on the host."""
    states = {"cpu": torch.get_rng_state()}
    return states | {"cuda": torch.cuda.get_rng_state()} if device.type == "cuda" else states


def set_random_state(states: dict[str, torch.Tensor]) -> None:
    """Back to what `random_state` gave."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
