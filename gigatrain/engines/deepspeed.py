"""The engine on DeepSpeed's ZeRO (arXiv:1910.02054), stages 1 to 3, also with the optimizer in host memory: our decoder, our kernels, our checkpoints.

DeepSpeed gathers weights, reduces gradients, and owns the flat fp32 partition of the master weights that each rank updates. Ours are the loss, the norm,
clipping and the update, so that a run has the numbers of engines/native.py:

    loss = sum over the rank's tokens * ranks / targets of all ranks        DeepSpeed averages over the ranks: times `ranks` is a sum again, exactly for 2^k
    norm = sqrt(sum over ranks of the squares of their partitions)          DeepSpeed's own is never computed, and nothing in a step is read on the host
    p <- AdamW(p, g, clip / max(norm, clip)), or p where a loss or the norm is not finite on any rank        kernels/adamw.py on the flat partition

A partition holds a range of every flattened parameter that it touches, and a checkpoint wants boxes: `state` sums each parameter from its ranges, one at a
time, and a rank keeps those rows on the host that begin in its range. So all ranks call `state` and `restored` together, each moves the model once or
thrice, and a rank holds 1 / ranks of it.

What DeepSpeed 0.19.8 does itself and we do not follow: it broadcasts weights from rank 0 once, at the start; clones the world's process group; in ZeRO-1 and
2 all-reduces buckets where reduce-scatter would do; in bf16 with ZeRO-1 it keeps fp32 gradients of the whole model, and reads one constant from the device
in a step; with `offload` it waits for every partition on its way to the host. Its checkpoints, schedules, loss scaling, timers, launchers and argument
parsing are not used. Host memory is moved by it, but what it builds with a compiler is not: the update is torch's.
"""

import contextlib
import hashlib
import io
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn

from gigatrain import objectives
from gigatrain.config import Objective
from gigatrain.data.loader import Batch, Microbatch
from gigatrain.engines import source
from gigatrain.engines.judge import Judge
from gigatrain.engines.partitions import Parts, parts_of, touched
from gigatrain.engines.sums import beforehand, report
from gigatrain.errors import RunError
from gigatrain.kernels import adamw, ops
from gigatrain.kernels.ops import OPERATIONS, Ops
from gigatrain.models import hf
from gigatrain.models.automodel import Auto
from gigatrain.models.decoder import Decoder
from gigatrain.objectives import figures
from gigatrain.observe.metrics import Update
from gigatrain.observe.trace import OFF
from gigatrain.parallel import context
from gigatrain.parallel.mesh import AXES, DATA, Mesh
from gigatrain.parallel.places import Piece, Place, Replica, State
from gigatrain.planning.plan import Plan

TESTED = "0.19"  # of DeepSpeed: its partitions are read by their attributes, which another minor version may rename


class DeepSpeed:
    """ZeRO over all ranks of the mesh: those of `context` too, since they share the weights and their gradients add up."""

    def __init__(self, plan: Plan, mesh: Mesh, device: torch.device, *, fresh: bool = True) -> None:
        assert mesh.size("tensor", "pipeline", "expert", "replicate") == 1, "the plan refuses what ZeRO lacks"
        assert plan.optim.name == "adamw", "the plan refuses what ZeRO lacks"
        self.plan, self.mesh, self.device, self.trace = plan, mesh, device, OFF
        self.early = True  # what ZeRO does within a backward is its own
        kernels = {choice.op: choice.kernel for choice in plan.kernels}
        self._norm = OPERATIONS["grad_norm"].versions[kernels["grad_norm"]]
        if mesh.count == 1:
            os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # ZeRO-3 reads it in every step, and only starters of many set it
        with _contained(mesh, device):
            library = _library(device)
            _join(library, mesh, device)
            self._engine, self.flat = self._initialize(library, kernels)
            self.model: source.Model = self._engine.module.decoder
            names = {id(parameter): name for name, parameter in self.model.named_parameters()}
            self._parts = parts_of(self._engine.optimizer, names, mesh)
        for flat in self._parts.flats:
            self.flat.keep(flat)
        self._fill(fresh)
        home = self._parts.flats[0].device
        self._nats, self._targets = (torch.zeros((), dtype=torch.float64, device=device) for _ in range(2))
        self._beside = torch.zeros(figures.count(plan.objective), dtype=torch.float64, device=device)
        self.loss = torch.zeros((), device=device)
        self.judge = Judge(plan.numerics.window, plan.numerics.sigma, device)
        self._updates = self.judge.updates
        self._home = home
        self._masks = int.from_bytes(hashlib.sha256(f"{plan.seed}/dropout".encode()).digest()[:5], "little")
        self._terms = source.terms(plan)
        self._taken: State | None = None
        self._known: dict[str, Tensor] = {}  # what the objective was told of the whole step

    def _initialize(self, library: Any, kernels: Mapping[str, str]) -> tuple[Any, "Flat"]:
        """DeepSpeed's engine around a model of undefined weights, whose parameters are flattened and partitioned."""
        plan, mesh = self.plan, self.mesh
        chosen = context.ops(ops.choose(kernels), mesh, plan.mesh.exchange)
        if plan.engine.zero == 3 and plan.adapter is not None:
            chosen = _with_gradient(chosen)
        model = source.blank(plan, chosen, dtype=torch.bfloat16 if plan.compute == "bf16" else torch.float32)
        self._shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters() if parameter.requires_grad}
        dtype = torch.bfloat16 if plan.compute == "bf16" else torch.float32
        config = settings(plan, self.device)
        if isinstance(model, Auto):
            model.place(self.device)
        if plan.engine.zero == 3:
            _partition(library, model, config, self.device, dtype)
        else:
            model.to(dtype).to_empty(device=self.device)
        optim, groups = plan.optim, {"decayed": [], "plain": []}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                groups[source.group_of(plan, model, name)].append(parameter)
        flat = Flat(
            [
                {
                    "params": members,
                    "name": name,
                    "rates": adamw.Rates(optim.betas, optim.eps, optim.weight_decay if name == "decayed" else 0.0),
                }
                for name, members in groups.items()
                if members
            ],
            optim.lr,
            kernels["adamw"],
        )
        if isinstance(model, Decoder):
            model.place(self.device)
        self._corrections = model.corrections() if isinstance(model, Decoder) else {}
        engine, *_ = library.initialize(model=_Training(model, plan.objective), optimizer=flat, config=config, dist_init_required=False)
        zero = engine.optimizer
        assert getattr(zero, "loss_scale", 1.0) == 1.0, "no stage and precision of ours scales the loss"
        _silence_norm(zero)
        if plan.engine.zero == 3:
            for module in model.modules():
                if not isinstance(module, nn.Module) or any(module is part for layer in model.layers for part in layer.modules()):
                    continue
                for parameter in module.parameters(recurse=False):  # the decoder's own code reads them, not their module's forward
                    library.zero.register_external_parameter(engine.module, parameter)
        return engine, flat

    # ---- A step ----

    def forward_backward(self, batch: Batch) -> None:
        """Gradients of the mean loss per target over all ranks, however the step is cut."""
        self._taken = None
        self._nats.zero_()
        self._beside.zero_()
        self.loss.zero_()
        self._targets.fill_(batch.targets)
        work = None
        if (group := self.mesh.group(*DATA)) is not None:
            work = distributed.all_reduce(self._targets, group=group, async_op=True)  # behind the first forward
        share: Tensor | None = None
        self._look_ahead(batch.microbatches)
        for index, part in enumerate(batch.microbatches):
            self.trace.mark("forward")
            self._engine.set_gradient_accumulation_boundary(index == len(batch.microbatches) - 1)
            loss, reported = self._loss(part, **self._terms, seed=self._seed(index))
            if share is None:
                if work is not None:
                    work.wait()
                share = (1.0 / self._targets.clamp(min=1.0)).to(loss.dtype)
            loss = loss * share
            self.trace.mark("backward")
            self._engine.backward(loss * self.mesh.count, scale_wrt_gas=False)
            report(reported, self._nats, self._beside)
            self.loss += loss.detach()

    @torch.no_grad()
    def _look_ahead(self, parts: Iterable[Microbatch]) -> None:
        """What an objective must know of the whole step before its first loss, over all ranks and on the device."""
        known = beforehand(self.plan.objective, parts, lambda part: self._loss(part, asks="ahead"), self.mesh)
        self._known = {} if known is None else {"known": known}

    def _loss(self, part: Microbatch, **terms: Any) -> Any:
        """Without documents every row counts from 0, and one table of positions serves all rows; ranks of `context` begin elsewhere."""
        part = context.cut(part, self.mesh, self.plan.mesh.exchange)
        counts = part.documents is None and self.mesh.size("context") == 1
        return self._engine(
            part.tokens, part.labels, None if counts else part.positions, part.documents, part.given, **self._known, **terms
        )

    def _seed(self, microbatch: int) -> Tensor | None:
        """As the native engine's: a function of the run's seed, the step, the microbatch and who reads it, counted on the device."""
        rank, ranks = self.mesh.data
        return self._masks + ((self._updates * self.plan.turns + microbatch) * ranks + rank) if self.plan.drops else None

    @torch.no_grad()
    def step(self, rate: float) -> Update:
        """One update of every partition, or, where loss or gradient is not finite on any rank, of none: decided on the device."""
        self._taken = None
        self.trace.mark("reduce")
        norm, scale, skip = self._judge()
        self.trace.mark("optimizer")
        self.flat.judge(rate, scale.to(self._home), skip.to(self._home))
        self._engine.step()
        assert self._engine.was_step_applied(), "DeepSpeed refused what it was not asked to judge"
        self.judge.count()
        self.trace.mark("rest")
        return Update(self._nats, self._targets, norm, self.judge.fate, self._beside if len(self._beside) else None)

    def _judge(self) -> tuple[Tensor, Tensor, Tensor]:
        """`(norm, scale, skip)` over all ranks, of which each holds another partition; the sum of the cross entropies travels with the squares."""
        clip = self.plan.optim.clip
        mine = self._norm(self._parts.gradients())[0].to(self.device).double().square()
        own = self._nats
        squares, self._nats, loss, *beside = self.mesh.sum(
            torch.cat([torch.stack([mine, self._nats, self.loss.double()]), self._beside])
        ).unbind()
        if beside:
            self._beside = torch.stack(beside)
        norm = squares.sqrt().float()
        skip = (~(torch.isfinite(norm) & torch.isfinite(loss))).float()
        scale = torch.ones_like(norm) if clip is None else clip / torch.clamp(norm, min=clip)
        return norm, scale, self.judge.verdict(self._nats / self._targets.clamp(min=1.0), norm, skip, own)

    @torch.no_grad()
    def evaluate(self, microbatches: Iterable[Microbatch]) -> Tensor:
        """What the objective reports of held-out microbatches of all ranks, the targets behind its first number; each must have as many, since ZeRO-3
        gathers."""
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        self._beside.zero_()
        self._engine.eval()
        self._look_ahead(microbatches)
        for part in microbatches:
            report(self._loss(part)[1], total[0], self._beside)
            total[1] += objectives.targets(self.plan.objective, part) * float(self.mesh.at["context"] == 0)
        self._engine.train()
        return self.mesh.sum(torch.cat([total, self._beside]))

    @torch.no_grad()
    def logprobs(self, part: Microbatch) -> Tensor:
        """Of a microbatch's labels [b, t], by the weights as they are, fp32."""
        self._engine.eval()
        found = self._loss(part, asks="logprobs")
        self._engine.train()
        return found

    # ---- What a checkpoint keeps ----

    @torch.no_grad()
    def _fill(self, fresh: bool) -> None:
        """Every rank's ranges of the master weights, from the rows that they touch, a parameter at a time; then the weights that compute, rounded.

        What is frozen comes whole below stage 3.
        """
        frozen: dict[str, Any] = {name: parameter for name, parameter in self.model.named_parameters() if not parameter.requires_grad}
        if fresh or frozen:
            boxes = {name: self._rows_of(name) for name in self._shapes}
            if self.plan.adapter is not None and self.plan.engine.zero == 3:
                boxes |= {name: touched(tuple(one.ds_shape), *self._stretch(one)) for name, one in frozen.items()}
            shapes = self._shapes | {name: tuple(tensor.shape) for name, tensor in self._corrections.items()}
            for name, tensor in source.values(self.plan, self.model, shapes, self.device, boxes=boxes, trained=fresh):
                if name in self._corrections:
                    self._corrections[name].copy_(tensor)
                    continue
                flattened = tensor.reshape(-1)
                began = boxes[name][0][0] * math.prod(boxes[name][1][1:]) if name in boxes else 0
                if name in frozen:
                    self._freeze(frozen[name], flattened, began)
                if not fresh:
                    continue
                for share in self._parts.shares.get(name, ()):
                    share.of(self._parts.flats).copy_(flattened[share.start - began : share.start - began + share.count])
        self._parts.publish()

    def _rows_of(self, name: str) -> hf.Box:
        """The box of a parameter's rows that this rank's ranges of it touch."""
        shares = self._parts.shares.get(name, ())
        return touched(self._shapes[name], *((shares[0].start, shares[-1].start + shares[-1].count) if shares else (0, 0)))

    def _stretch(self, parameter: Any) -> tuple[int, int]:
        """Where this rank's elements of a parameter of ZeRO-3 begin and end: equal stretches, the last ones padded."""
        each = parameter.partition_numel()
        start = min(parameter.ds_numel, self.mesh.rank * each)
        return start, min(parameter.ds_numel, start + each)

    def _freeze(self, parameter: Any, flattened: Tensor, began: int) -> None:
        """What this rank holds of a parameter that is in no partition of the optimizer, of its elements from `began` on: all, or in ZeRO-3 its stretch."""
        if not hasattr(parameter, "ds_tensor"):
            parameter.data.copy_(flattened.view(parameter.shape))
            return
        start, stop = self._stretch(parameter)
        parameter.ds_tensor[: stop - start].copy_(flattened[start - began : stop - began])

    @torch.no_grad()
    def state(self) -> State:
        """fp32 master weights; moments and counts: rows of the parameters as copies on the host, until the next step. All ranks call it together."""
        if self._taken is None:
            weights = {name: self._rows(name, self._parts.flats) for name in self._shapes}
            if self.plan.adapter is None:  # else they are the base's
                weights |= {name: self._mark(tensor) for name, tensor in self._corrections.items()}
            optimizer = self.judge.counts(writes=self.mesh.rank == 0)
            for moment in ("exp_avg", "exp_avg_sq"):
                flats = [getattr(self.flat.kept[flat], moment) for flat in self._parts.flats]
                optimizer |= {f"{moment}.{name}": self._rows(name, flats) for name in self._shapes}
            optimizer |= {f"updates.{name}": self._mark(members[0].updates) for name, members in self.flat.by_group(self._parts).items()}
            self._taken = {"weights": weights, "optimizer": optimizer} | self.judge.window(writes=self.mesh.rank == 0)
        return self._taken

    def _rows(self, name: str, flats: list[Tensor]) -> Piece:
        """Those rows of a parameter that begin in this rank's range of it, with what other ranks hold of them."""
        shape, found = self._shapes[name], torch.zeros(math.prod(self._shapes[name]), dtype=torch.int32, device=self.device)
        for share in self._parts.shares.get(name, ()):
            found[share.start : share.start + share.count] = share.of(flats).view(torch.int32).to(self.device)
        place = self._place(name)
        whole = self.mesh.sum(found).view(torch.float32).view(shape)  # bits and zeros: exact, signs of zeros included
        return Piece(place.of(whole).to("cpu", copy=True), place)

    def _place(self, name: str) -> Place:
        shape = self._shapes[name]
        row = math.prod(shape[1:])
        shares = self._parts.shares.get(name, ())
        first, last = (-(-at // row) for at in (shares[0].start, shares[-1].start + shares[-1].count)) if shares else (0, 0)
        return Place(shape, (0,) * len(shape), shape).cut(0, first, last - first)

    def _mark(self, tensor: Tensor) -> Piece:
        return Piece.whole(tensor, writes=self.mesh.rank == 0)

    @torch.no_grad()
    def restored(self) -> None:
        """Bring what a load filled into the partitions, and round the weights from them. All ranks call it together."""
        assert self._taken is not None, "a load fills what `state` gave"
        for name in self._shapes:
            self._return(self._taken["weights"][name], name, self._parts.flats)
            for moment in ("exp_avg", "exp_avg_sq"):
                flats = [getattr(self.flat.kept[flat], moment) for flat in self._parts.flats]
                self._return(self._taken["optimizer"][f"{moment}.{name}"], name, flats)
        for members in self.flat.by_group(self._parts).values():
            for member in members[1:]:
                member.updates.copy_(members[0].updates)
        self._taken = None
        self._parts.publish()
        self.judge.restored()

    def _return(self, piece: Piece, name: str, flats: list[Tensor]) -> None:
        found = torch.zeros(piece.place.shape, dtype=torch.int32, device=self.device)
        piece.place.of(found).copy_(piece.tensor.view(torch.int32))
        whole = self.mesh.sum(found).view(torch.float32).view(-1)
        for share in self._parts.shares.get(name, ()):
            share.of(flats).copy_(whole[share.start : share.start + share.count])

    @property
    def bad(self) -> Tensor:
        return self.judge.bad

    def replicas(self) -> Iterator[Replica]:
        """What several ranks hold: below stage 3 the weights that compute, else only counts."""
        if self.plan.engine.zero != 3:
            yield from (Replica(f"weight of {name}", parameter.detach(), AXES) for name, parameter in self.model.named_parameters())
        yield from (Replica(name, tensor, AXES) for name, tensor in self._corrections.items())
        yield from self.judge.replicas()


class _Training(nn.Module):
    """What DeepSpeed's forward calls: the model with its loss, since the head and the loss are one operation."""

    def __init__(self, decoder: source.Model, objective: Objective) -> None:
        super().__init__()
        self.decoder, self.objective = decoder, objective

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor,
        positions: Tensor | None,
        documents: Tensor | None,
        given: Mapping[str, Tensor] | None = None,
        *,
        asks: Literal["loss", "ahead", "logprobs"] = "loss",
        **terms: Any,
    ) -> Any:
        part = Microbatch(tokens, labels, positions if positions is not None else tokens, documents, given)
        if asks == "logprobs":
            return self.decoder.logprobs(tokens, labels, positions, documents)
        if asks == "ahead":
            return objectives.ahead(self.objective, self.decoder, part)
        loss, reported = objectives.compute(self.objective, self.decoder, part, positions, **terms)
        return loss, reported.detach()


class Flat(torch.optim.Optimizer):
    """AdamW by our kernel on the flat fp32 partitions that DeepSpeed hands over one by one, after `judge` has said how."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, version: str) -> None:
        super().__init__(groups, {"lr": lr})
        self._peak = lr
        self._update, self._foreach = adamw.OPERATIONS["adamw"].versions[version], version == "foreach"
        self.kept: dict[Tensor, adamw.State] = {}

    def keep(self, flat: Tensor) -> None:
        """Make the moments of a partition."""
        zeros = (torch.zeros_like(flat, requires_grad=False) for _ in range(2))
        exp_avg, exp_avg_sq = zeros
        updates = torch.zeros((), device=flat.device)
        seed = torch.zeros((), dtype=torch.int64, device=flat.device)
        self.kept[flat] = adamw.State(flat.detach(), None, None, exp_avg, None, exp_avg_sq, None, updates, seed)

    def by_group(self, parts: Parts) -> dict[str, list[adamw.State]]:
        """The states of each group's partitions."""
        found: dict[str, list[adamw.State]] = {}
        for flat, group in zip(parts.flats, parts.groups, strict=True):
            found.setdefault(self.param_groups[group]["name"], []).append(self.kept[flat])
        return found

    def judge(self, rate: float, scale: Tensor, skip: Tensor) -> None:
        """How the coming steps update: at `rate` times the peak rate, gradients times `scale`, and nothing where `skip` is 1 (0-d, beside them)."""
        self._scale, self._skip = scale, skip
        for group in self.param_groups:
            group["lr"] = self._peak * rate

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update what is in the groups now and has a gradient: one partition, one group or all, as the stage calls it."""
        assert closure is None
        for group in self.param_groups:
            for flat in group["params"]:
                if flat.grad is not None:
                    lr = (
                        group["lr"] if self._foreach else torch.full((), group["lr"], device=flat.device)
                    )  # torch's own takes a number in fp64
                    self._update(self.kept[flat], flat.grad.view(-1), lr, self._scale, self._skip, group["rates"])


# ---- DeepSpeed itself ----


def settings(plan: Plan, device: torch.device) -> dict[str, Any]:
    """DeepSpeed's configuration of a plan: without its clipping, loss scaling, timers and printing."""
    largest = 1 << 27  # elements of a bucket: 0.5 GB of fp32 gradients
    bucket = min(largest, plan.parameters + plan.parameters % 2)
    pinned = {"device": "cpu", "pin_memory": device.type == "cuda"}
    zero: dict[str, Any] = {
        "stage": plan.engine.zero,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "overlap_comm": device.type == "cuda" and plan.engine.zero > 1,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "memory_efficient_linear": False,  # it would replace torch.nn.functional.linear for good
    }
    if plan.engine.offload:
        zero["offload_optimizer"] = pinned
    if plan.engine.zero == 3:
        zero |= {"stage3_prefetch_bucket_size": bucket, "stage3_param_persistence_threshold": 0}
        zero |= {"offload_param": pinned} if plan.engine.offload else {}
    return {
        "train_micro_batch_size_per_gpu": plan.microbatch,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": plan.compute == "bf16", "check_grad_overflow": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": plan.engine.reduce if plan.compute == "bf16" else "fp32",
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # its CPU Adam is compiled at the first use; torch's needs no compiler
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False, "synchronized": False}},  # it would wait for the device at every microbatch
    }


def _silence_norm(zero: Any) -> None:
    """Give DeepSpeed a constant where it would compute a norm of its own, and read it on the host, only to clip and refuse as we do ourselves."""
    one = torch.ones(())
    for name in ("scaled_global_norm", "_get_norm_groups"):
        if hasattr(zero, name):
            setattr(zero, name, (lambda: one) if name == "scaled_global_norm" else (lambda: [one]))
    if type(zero).__name__ == "BF16_Optimizer":
        zero.get_grads_for_norm = lambda for_clipping=False: [] if for_clipping else ([one], {})


def _partition(library: Any, model: nn.Module, config: dict[str, Any], device: torch.device, dtype: torch.dtype) -> None:
    """Give a model on meta storage for ZeRO-3, parameter by parameter, each cut before the next one is made; a layer is gathered as one."""
    library.utils.set_z3_leaf_modules(model, [type(next(iter(model.layers)))])  # type: ignore[arg-type]
    first: Any = None
    for module in model.modules():
        for name, old in list(module.named_parameters(recurse=False)):
            if not old.is_meta:
                continue
            new: Any = nn.Parameter(torch.empty(old.shape, dtype=dtype, device=device), requires_grad=old.requires_grad)
            setattr(module, name, new)
            model._tie()  # type: ignore[operator] (the head follows the embedding)
            if first is None:
                holder = nn.Module()
                holder.register_parameter("first", new)
                library.zero.Init(module=holder, config_dict_or_path=config)
                first = new
            else:
                first.convert_to_zero_parameters(param_list=[new])


def _with_gradient(chosen: Ops) -> Ops:
    """Operations whose embedding has a gradient, though its weights be frozen: ZeRO-3 drops a layer's weights once its inputs have theirs, and where none has
    one, before its backward. Costs the first layer's products for that gradient."""

    def embedding(tokens_bt: Tensor, weight_vd: Tensor) -> Tensor:
        x_btd = chosen.embedding(tokens_bt, weight_vd)
        return x_btd.requires_grad_() if torch.is_grad_enabled() else x_btd

    return replace(chosen, embedding=embedding)


def _join(library: Any, mesh: Mesh, device: torch.device) -> None:
    """Let DeepSpeed speak through this process's own group: one process alone gets one too, which needs no address."""
    if not distributed.is_initialized():
        assert mesh.count == 1
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    library.init_distributed(dist_init_required=False, auto_mpi_discovery=False)
    backend = library.comm.comm.cdb
    for mine, its in (("all_gather_single", "all_gather_function"), ("reduce_scatter_single", "reduce_scatter_function")):
        if hasattr(distributed, mine):  # torch 2.13's names: the old ones warn at every place that calls them
            setattr(backend, its, getattr(distributed, mine))


def _library(device: torch.device) -> Any:
    """The package `deepspeed` for this device, silent but for errors, and without what it would compile."""
    try:
        import deepspeed
    except ImportError as error:
        raise RunError(
            f"engine.name = \"deepspeed\" needs DeepSpeed, which cannot be imported ({error}); pip install 'gigatrain[deepspeed]', or --set engine.name=native"
        ) from error
    if not deepspeed.__version__.startswith(f"{TESTED}."):
        raise RunError(
            f'engine.name = "deepspeed" works with DeepSpeed {TESTED}.x, and {deepspeed.__version__} is installed; '
            f"pip install 'gigatrain[deepspeed]', or --set engine.name=native"
        )
    if device.type == "cpu":
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator as Accelerator
    else:
        from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator as Accelerator
    from deepspeed.accelerator import real_accelerator

    if not isinstance(real_accelerator.ds_accelerator, Accelerator):
        real_accelerator.set_accelerator(Accelerator())
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # 37 s of g++ at the first start, for all-reduces within a node
    deepspeed.utils.logger.setLevel(logging.ERROR)
    for handler in deepspeed.utils.logger.handlers:
        handler.setStream(sys.stderr)  # it would write where a run prints what it found  # type: ignore[attr-defined]
    return deepspeed


@contextlib.contextmanager
def _contained(mesh: Mesh, device: torch.device) -> Iterator[None]:
    """What DeepSpeed reads from the environment is there, and what it does to the environment, to logging and to warnings ends here."""
    before, disabled = dict(os.environ), logging.root.manager.disable
    os.environ |= {
        "DS_ACCELERATOR": device.type,
        "RANK": str(mesh.rank),
        "WORLD_SIZE": str(mesh.count),
        "LOCAL_RANK": before.get("LOCAL_RANK", str(device.index or 0)),
    }
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # it prints how much memory is used
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ |= before
