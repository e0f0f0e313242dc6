"""Pipeline parallelism: stages of layers on different ranks, microbatches in flight between them, by torch's own schedules.

    forward    x_k = stage_k(x_{k-1}; tokens, documents)        backward    g_{k-1} = dx_k/dx_{k-1} . g_k        loss on the last stage

Torch's `Schedule1F1B`, `ScheduleInterleaved1F1B` and `ScheduleZBVZeroBubble` say who computes and sends what when; `_Stage` is torch's `PipelineStage` with
five things of our own:

- One tensor travels between stages, the residual stream x_btd after the sum that a layer leaves to the next one's norm: half the bytes on the way and half
  those kept for the backward, compared with the two addends. `add_rms_norm` rounds the sum before it norms it, so the values are the same.
- Every pipeline rank has every microbatch, so positions, documents, seeds and shapes never travel, microbatches may differ in their number of rows, and
  torch need not infer shapes. What is received has memory from its arrival to its use; torch's stage keeps a buffer for every microbatch of the step.
- A microbatch's gradients are moved into the engine's sums after each of its backward passes, in fp32 if the weights are bf16. Sharded parameters (FSDP2)
  are summed by FSDP in its own `reduce_dtype`, and reduced over the ranks once a step.
- ZBV computes weight gradients apart, to fill the time in which a rank would wait. Torch does so by a walk through autograd's graph, 12 calls of autograd
  for a layer, each of which repeats what was recomputed; torch 2.11 also adds up the gradients of different outputs of one function, which loses those of
  our fused norms (measured: a relative error of 1). Here linear layers leave the products of their weights for later (arXiv:2401.10241), by torch's own
  `dw_builder`; all other gradients come with the first pass.
- Forward passes alone, over any number of microbatches, for validation.

Legend: b rows of a microbatch, t tokens, d hidden channels, p pipeline ranks, n microbatches of a step.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B, ScheduleZBVZeroBubble
from torch.distributed.tensor import DTensor
from torch.nn import functional

from gigatrain.data.loader import Microbatch
from gigatrain.errors import GigatrainError
from gigatrain.kernels.linear import Linear
from gigatrain.parallel.mesh import Mesh
from gigatrain.parallel.shard import local

# (stage module, microbatch, what the stage before it gave or None, seed of its dropout) -> what goes to the next stage, or (loss_sum, ce_sum) of the last
Compute = Callable[[nn.Module, Microbatch, Tensor | None, Tensor | None], Any]
ROUND = 4  # microbatches of validation in flight, as a multiple of p: the pipeline is full for 4p of 5p - 1 turns


@dataclass
class _Step:
    """What the stages of this rank compute, and what came of it."""

    microbatches: Sequence[Microbatch]
    seeds: Sequence[Tensor | None]
    share: Tensor | None
    loss: Tensor
    nats: Tensor
    summed: set[int] = field(default_factory=set)  # sums that this step has written, by identity


class Pipeline:
    """The stages of one rank. All ranks of `pipeline` call the same methods with the same microbatches.

    stages: this rank's, by number in the whole pipeline (planning/layout.py's `held`), of `count`; each may be sharded by FSDP2, best without dropping
    gathered weights after a forward (`reshard_after_forward=False`), since it would gather them again for every microbatch. sums: the gradient sum of each
    parameter of this rank, by name, of its shape here; two names may share one, and a parameter whose product sums its gradient has none. hidden, dtype: of
    what travels. cut: how many ranks share the tokens between layers (tensor parallelism), where the microbatch has all of them.
    """

    def __init__(
        self,
        stages: Mapping[int, nn.Module],
        count: int,
        mesh: Mesh,
        *,
        schedule: str,
        compute: Compute,
        hidden: int,
        dtype: torch.dtype,
        sums: Mapping[str, Tensor],
        cut: int = 1,
    ) -> None:
        self.stages, self.count, self.mesh, self.schedule, self.compute = dict(sorted(stages.items())), count, mesh, schedule, compute
        self.hidden, self.dtype, self.cut = hidden, dtype, cut
        self.group, self.ranks = mesh.group("pipeline"), mesh.size("pipeline")
        self.step: _Step
        # Plain parameters are summed after every pass, sharded ones once a step.
        self._plain = {number: [] for number in self.stages}
        self._sharded: list[tuple[Tensor, Tensor]] = []
        for number, module in self.stages.items():
            for name, parameter in module.named_parameters():
                if name not in sums:
                    continue
                kept = self._sharded if isinstance(parameter, DTensor) else self._plain[number]
                kept.append((parameter, sums[name]))
        self._later: dict[int, list[_Product]] = {number: [] for number in self.stages}
        if schedule == "zbv":
            for number, module in self.stages.items():
                _postpone(module, self._later[number])
        self._schedules: dict[tuple[int, bool], Any] = {}
        self._made_stages: dict[tuple[int, bool], list[_Stage]] = {}

    def run(self, microbatches: Sequence[Microbatch], share: Tensor, seeds: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
        """Gradients of one step into the sums: of `share` times the loss. Returns that loss, and the sum of cross entropies (fp64); zeros but on the last
        stage's rank. `seeds` are those of each microbatch's dropout masks."""
        self._perform(microbatches, seeds, share)
        step = self.step
        with torch.no_grad():
            if self._sharded:
                _add([(local(parameter.grad), total) for parameter, total in self._sharded if parameter.grad is not None], step.summed)
                for parameter, _ in self._sharded:
                    parameter.grad = None
            for _, total in itertools.chain(self._sharded, *self._plain.values()):
                if id(total) not in step.summed:
                    total.zero_()
        return step.loss, step.nats

    @torch.no_grad()
    def evaluate(self, microbatches: Iterable[Microbatch]) -> Tensor:
        """Sum of cross entropies (fp64) of any number of microbatches, without gradients; zero but on the last stage's rank."""
        nats = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        source = iter(microbatches)
        while parts := list(itertools.islice(source, ROUND * self.ranks)):
            while not self._fits(len(parts)):
                parts.append(_blank(parts[-1]))
            self._perform(parts, [None] * len(parts), None)
            nats += self.step.nats
        return nats

    def _fits(self, count: int) -> bool:
        """Whether the schedule takes so many microbatches."""
        return count >= self.ranks if self.schedule == "1f1b" else self.schedule == "zbv" or count % max(1, count // self.ranks) == 0

    def _perform(self, microbatches: Sequence[Microbatch], seeds: Sequence[Tensor | None], share: Tensor | None) -> None:
        device = self.mesh.device
        self.step = _Step(microbatches, seeds, share, torch.zeros((), device=device), torch.zeros((), dtype=torch.float64, device=device))
        key = len(microbatches), share is not None
        if key not in self._schedules:
            self._schedules[key] = self._made(*key)
        # Torch cuts a step's targets into one for each microbatch; ours are with the microbatches. A schedule's first step meets the host once (torch 2.13).
        try:
            self._schedules[key].step(target=torch.empty(len(microbatches)), return_outputs=False)
        except RuntimeError as failure:
            if isinstance(failure.__cause__, GigatrainError):  # torch wraps what a forward or backward raises
                raise failure.__cause__ from failure
            raise
        for stage in self._made_stages[key]:
            stage.fwd_cache.clear()  # what no backward has taken out

    def _made(self, count: int, backward: bool) -> Any:
        stages = self._made_stages[count, backward] = [_Stage(self, number, module, backward) for number, module in self.stages.items()]
        options: dict[str, Any] = {"loss_fn": _given if backward else None, "scale_grads": False}
        if self.schedule == "1f1b":
            return Schedule1F1B(stages[0], count, **options)
        return {"interleaved": ScheduleInterleaved1F1B, "zbv": ScheduleZBVZeroBubble}[self.schedule](stages, count, **options)  # type: ignore[arg-type]

    def shape(self, microbatch: int) -> tuple[int, int, int]:
        """Of what travels: [b, t, d]."""
        rows, tokens = self.step.microbatches[microbatch].tokens.shape
        return rows, tokens // self.cut, self.hidden

    @torch.no_grad()
    def sum_plain(self, number: int) -> None:
        """Move what one backward pass of a stage left in the parameters into the sums."""
        found = [(parameter, total) for parameter, total in self._plain[number] if parameter.grad is not None]
        _add([(parameter.grad, total) for parameter, total in found], self.step.summed)
        for parameter, _ in found:
            parameter.grad = None


class _Stage(PipelineStage):
    """Torch's stage, for one number of microbatches, with or without backward."""

    def __init__(self, pipeline: Pipeline, number: int, module: nn.Module, backward: bool) -> None:
        first, last = number == 0, number == pipeline.count - 1
        carried = torch.empty(0, dtype=pipeline.dtype, device="meta", requires_grad=True)  # memory comes with the microbatch: see `_room`
        super().__init__(
            module,
            number,
            pipeline.count,
            pipeline.mesh.device,
            input_args=() if first else (carried,),
            output_args=(torch.empty((), device="meta"),) if last else (carried,),
            group=pipeline.group,
            dw_builder=self._products if pipeline.schedule == "zbv" and backward else None,
        )
        self.pipeline, self.microbatch = pipeline, 0
        self._runtime_validate = False  # torch 2.13's check with TORCH_DISTRIBUTED_DEBUG=DETAIL: all shapes equal to the first

    # ---- Memory of what is received ----

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> Any:
        self._room(self.args_recv_info[fwd_chunk_id], fwd_chunk_id)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> Any:
        if self.has_backward and not self.is_last:
            self._room(self.grad_recv_info[bwd_chunk_id], bwd_chunk_id)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def _room(self, received: Sequence[Any], microbatch: int) -> None:
        for one in received:
            one.buffer = torch.empty(self.pipeline.shape(microbatch), dtype=self.pipeline.dtype, device=self.device)

    def _leave(self, received: Sequence[Any]) -> None:
        for one in received:
            one.buffer = torch.empty(0, dtype=self.pipeline.dtype, device=self.device)

    # ---- Passes ----

    def forward_one_chunk(self, fwd_chunk_id: int, *_: Any, **__: Any) -> Any:
        self.microbatch = fwd_chunk_id
        received = self.args_recv_info[fwd_chunk_id]
        for one in received:
            one.buffer.requires_grad_(self.has_backward)  # type: ignore[union-attr]
        given = super().forward_one_chunk(fwd_chunk_id, (), None, save_forward_output=False)
        self._leave(received)
        return given

    def forward_maybe_with_nosync(self, *args: Any, **_: Any) -> Tensor:
        step, part = self.pipeline.step, self.pipeline.step.microbatches[self.microbatch]
        given = self.pipeline.compute(self.submod, part, args[0] if args else None, step.seeds[self.microbatch])
        if not self.is_last:
            return given
        loss, nats = given
        step.nats += nats.detach()
        if step.share is None:
            return loss
        loss = loss * step.share
        step.loss += loss.detach()
        return loss

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **named: Any) -> None:
        super().backward_one_chunk(bwd_chunk_id, *args, **named)
        if not self.has_backward:
            return
        self.bwd_cache[bwd_chunk_id] = tuple(None if one is None else one.contiguous() for one in self.bwd_cache[bwd_chunk_id])
        if not self.is_last:
            self._leave(self.grad_recv_info[bwd_chunk_id])
        self.pipeline.sum_plain(self.stage_index)

    def _products(self) -> Callable[[], None]:
        """What a backward pass has left for the pass of the weights."""
        later = self.pipeline._later[self.stage_index]
        products = later.copy()
        later.clear()
        return functools.partial(self._multiply, products)

    @torch.no_grad()
    def _multiply(self, products: list["_Product"]) -> None:
        for one in products:
            found = one.dy.flatten(0, -2).t() @ one.x.flatten(0, -2)
            one.weight.grad = found if one.weight.grad is None else one.weight.grad.add_(found)
        products.clear()
        self.pipeline.sum_plain(self.stage_index)
        if isinstance(self.submod, FSDPModule):
            # Into FSDP's own sums, as its hooks do after a backward: a second product would be added in bf16.
            for state in fully_shard.state(self.submod)._state_ctx.all_states:  # type: ignore[attr-defined]
                for group in _groups(state):
                    group.post_backward()

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        if self.has_backward:
            return super().perform_reduce_grad(grad_scale_factor)
        for module in self.submod.modules():  # what is gathered now would be stale after the next update
            if isinstance(module, FSDPModule):
                module.reshard()

    # ---- Forward passes alone, where torch's V passes gradients between two stages of a rank without a look ----

    def get_local_bwd_output(self, mb_index: int) -> Any:
        return super().get_local_bwd_output(mb_index) if self.has_backward else ()

    def set_local_bwd_input(self, next_stage_bwd_outputs: Any, mb_index: int) -> None:
        if self.has_backward:
            super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)

    # ---- torch 2.11: all shapes must be equal to the first, and a V's first greeting goes from its lowest rank to itself, which gloo cannot ----

    def _validate_fwd_input(self, *_: Any) -> None:
        pass

    def _validate_fwd_outputs(self, *_: Any) -> None:
        pass

    def _get_init_p2p_neighbors_ops(self) -> list[distributed.P2POp]:
        return [one for one in super()._get_init_p2p_neighbors_ops() if one.group_peer != self.group_rank]


def _given(loss: Tensor, _: Tensor) -> Tensor:
    return loss


def _groups(state: Any) -> list[Any]:
    """A module's groups of sharded parameters: several since torch 2.12."""
    groups = getattr(state, "_fsdp_param_groups", None)
    return [state._fsdp_param_group] * (state._fsdp_param_group is not None) if groups is None else groups


def _add(found: Sequence[tuple[Tensor | None, Tensor]], summed: set[int]) -> None:
    """Each gradient to its sum, whatever their dtypes; the first of a step replaces what was there."""
    new, more = [], []
    for grad, total in found:
        (more if id(total) in summed else new).append((total, grad))
        summed.add(id(total))
    for act, pairs in ((torch._foreach_copy_, new), (torch._foreach_add_, more)):
        if pairs:
            act([total for total, _ in pairs], [grad for _, grad in pairs])


def _blank(part: Microbatch) -> Microbatch:
    """One row of a microbatch, without labels."""
    documents = None if part.documents is None else part.documents[:1]
    given = None if part.given is None else {name: one[:1] for name, one in part.given.items()}
    return Microbatch(part.tokens[:1], torch.full_like(part.labels[:1], -100), part.positions[:1], documents, given)


# ---- Weight gradients apart from the others ----


@dataclass(frozen=True)
class _Product:
    """A weight's gradient that is still to be computed: dy^T x."""

    weight: Tensor
    x: Tensor
    dy: Tensor


class _Linear(torch.autograd.Function):
    """y = x W^T + bias, whose backward leaves W's gradient in `later`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, later: list[_Product]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.biased, ctx.later = weight, bias is not None, later
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        ctx.later.append(_Product(ctx.weight, x, dy))
        return dy @ ctx.weight, None, dy.flatten(0, -2).sum(0) if ctx.biased else None, None


def _postpone(module: nn.Module, later: list[_Product]) -> None:
    """Let the linear layers of a stage leave their weights' gradients in `later`; a layer with a forward of its own keeps it."""

    def forward(linear: nn.Linear, x: Tensor) -> Tensor:
        return _Linear.apply(x, linear.weight, linear.bias, later)  # type: ignore[return-value]

    for linear in module.modules():
        if isinstance(linear, nn.Linear) and type(linear).forward in (nn.Linear.forward, Linear.forward):
            linear.forward = functools.partial(forward, linear)  # type: ignore[method-assign]
