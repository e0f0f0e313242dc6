"""Any causal language model of transformers behind what the engines use of `Decoder`.

    logits l = scale * (h w^T + bias)        l = c * tanh(l / c) if softcap        loss: kernels/linear_cross_entropy.py

The model's own forward runs up to its head, whose input h is caught; head and loss are then one operation, so that logits are never all in memory. What
the model does after its head is measured when it is built (`_head`), and where it is not of this form the model's own logits are used. `verify` checks
all of it on the weights at hand.

Legend: b batch, t tokens, d hidden channels, v vocabulary. Parameter names are transformers' own. The code is transformers' installed code alone: nothing
is run that comes with a model.
"""

import contextlib
import importlib.util
import inspect
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils.checkpoint import checkpoint

from gigatrain import floors, foreign
from gigatrain.errors import PlanError, RecipeError
from gigatrain.foreign import Head
from gigatrain.kernels import cross_entropy
from gigatrain.kernels.ops import REFERENCE, Ops
from gigatrain.models.decoder import Kind, Recompute
from gigatrain.models.recompute import keep_products


class _Caught(nn.Module):
    """Stands where the head does for the length of a forward, and keeps what the head would have been given."""

    def __init__(self, head: nn.Module, answer: Tensor | None = None) -> None:
        super().__init__()
        object.__setattr__(self, "head", head)  # not a child
        self.answer, self.hidden, self.calls = answer, cast(Any, None), 0

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "head"), name)  # models ask for head.weight.dtype

    def forward(self, hidden_btd: Tensor) -> Tensor:
        self.hidden, self.calls = hidden_btd, self.calls + 1
        return hidden_btd.new_zeros(1, 1, 1).expand(*hidden_btd.shape[:-1], 1) if self.answer is None else self.answer


@contextlib.contextmanager
def _caught(model: nn.Module, name: str, answer: Tensor | None = None) -> Iterator[_Caught]:
    """Within it, a `_Caught` stands at the head's place."""
    parent, leaf = owner_of(model, name)
    head = cast(nn.Module, parent._modules[leaf])
    parent._modules[leaf] = caught = _Caught(head, answer)
    try:
        yield caught
    finally:
        parent._modules[leaf] = head


class _Followed(Tensor):
    """A tensor with values among fake ones: what is computed of it is computed."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with unset_fake_temporarily():
            return super().__torch_function__(func, types, args, kwargs or {})


class Auto(nn.Module):
    """A transformers model: parameters on meta until `to_empty` and a fill by `fresh` or `tensors`; buffers have their values from the start.

    Raises RecipeError for a config that transformers cannot build or that we refuse (foreign.py), PlanError for a model whose shape we cannot train.
    """

    def __init__(
        self, config: Mapping[str, Any], ops: Ops = REFERENCE, *, recompute: Recompute = "none", dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        if recompute == "lean":
            raise PlanError('train.recompute "lean" is for our own decoders; set "full" or "selective"')
        self.ops, self.dtype = ops, dtype
        self.model = build(config, dtype)
        self.config = self.model.config
        if dtype != torch.float32 and (names := wide(self.model)):
            raise PlanError(f'model.from: {self.config.model_type} keeps {names[0]} in fp32; set train.precision = "fp32"')
        self._lists = layer_lists(self.model)
        self._kinds = _kinds(self.model, self.layers)
        _refuse_shared(self.model, self.layers)
        self.shapes = {name: tuple(parameter.shape) for name, parameter in self.model.named_parameters()}
        self._constants = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        self.head = _head(self.model, self._lists)
        self._head_at = _name_of(self.model, self._head_module) if self.head.separate else ""
        if self.head.separate:
            self._head_module.forward = self._headed
        self._takes_positions = "position_ids" in _parameters_of(self.model.forward)
        if recompute != "none":
            for layer in self.layers:
                layer.forward = _recomputed(layer.forward, selective=recompute == "selective")

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """`to`, `to_empty` and the like untie what is tied, lose the buffers' values or round them."""
        super()._apply(fn, recurse)
        self.model.tie_weights()
        for name, kept in self._constants.items():
            owner, leaf = owner_of(self.model, name)
            owner._buffers[leaf] = kept.to(cast(Tensor, owner._buffers[leaf]).device)
        return self

    def _tie(self) -> None:
        self.model.tie_weights()

    @property
    def layers(self) -> list[nn.Module]:
        """The repeated blocks, in order; each may be compiled or sharded."""
        return [layer for _, held in self._lists for layer in held]

    def place(self, device: torch.device) -> None:
        """Moves buffers to where the model computes, if its shards are kept elsewhere (offload)."""
        for name, kept in self._constants.items():
            owner, leaf = owner_of(self.model, name)
            owner._buffers[leaf] = kept.to(device)

    def persistent(self) -> dict[str, Tensor]:
        """The buffers that are saved with the weights (such as the biases of DeepSeek's router): never trained, filled in place by a load."""
        kept = self.model.state_dict(keep_vars=True)
        return {name: buffer for name, buffer in self.model.named_buffers() if name in kept}

    def named_parameters(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
        """As torch's, but the names are transformers', without the `model.` that this module would add."""
        return self.model.named_parameters(prefix, recurse, remove_duplicate)

    def keep(self, name: str, value: Tensor) -> None:
        """Gives a buffer its value, which later moves to other devices keep."""
        owner, leaf = owner_of(self.model, name)
        buffer = cast(Tensor, owner._buffers[leaf])
        self._constants[name] = value.to("cpu", buffer.dtype, copy=True)
        if not buffer.is_meta:
            buffer.copy_(self._constants[name])

    def kind_of(self, name: str) -> Kind:
        """What a parameter is, as models/decoder.py's; `matrix` are two-dimensional weights of the layers' linear maps (Muon's share)."""
        return self._kinds[name][0]

    def decays(self, name: str, embeddings: bool = False) -> bool:
        """Whether weight decay applies: to matrices, convolutions and stacks of experts; to embeddings and head if `embeddings`; to nothing else."""
        kind, weight = self._kinds[name]
        return embeddings if kind in ("embed", "head") else weight

    def forward(
        self, tokens_bt: Tensor, positions_bt: Tensor | None = None, documents_bt: Tensor | None = None, *, logits: bool = False
    ) -> Tensor:
        """What the head is given: hidden_btd after the last norm; or, with `logits`, what the model's own forward makes of it.

        Positions are handed on only together with documents: they tell transformers where a document begins, and without any every row is one.
        """
        if logits:
            return self._run(tokens_bt, positions_bt, documents_bt).logits
        assert self.head.separate, "without a separate head only `loss` and `logits` are meant"
        with _caught(self.model, self._head_at) as caught:
            self._run(tokens_bt, positions_bt, documents_bt)
        return caught.hidden

    @property
    def _head_module(self) -> Any:
        return self.model.get_output_embeddings()

    def _run(self, tokens_bt: Tensor, positions_bt: Tensor | None, documents_bt: Tensor | None) -> Any:
        if documents_bt is None:
            return self.model(input_ids=tokens_bt, use_cache=False, return_dict=True)
        assert positions_bt is not None
        assert self._takes_positions, "the plan refuses documents for models that cannot keep them apart"
        return self.model(input_ids=tokens_bt, position_ids=positions_bt, use_cache=False, return_dict=True)

    def logits(self, tokens_bt: Tensor, positions_bt: Tensor | None = None, documents_bt: Tensor | None = None) -> Tensor:
        """logits_btv by the model's own forward."""
        return self(tokens_bt, positions_bt, documents_bt, logits=True)

    def loss(
        self,
        tokens_bt: Tensor,
        labels_bt: Tensor,
        positions_bt: Tensor | None = None,
        documents_bt: Tensor | None = None,
        *,
        z_loss: float = 0.0,
        label_smoothing: float = 0.0,
        seed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`(loss_sum, ce_sum)` over the labels that are not -100, which are already shifted; `seed` is not read, as there is no dropout."""
        terms: dict[str, Any] = {"z_loss": z_loss, "label_smoothing": label_smoothing}
        if not self.head.separate:
            logits_btv = self.forward(tokens_bt, positions_bt, documents_bt, logits=True)
            return cast(Any, cross_entropy.reference(logits_btv.flatten(0, -2), labels_bt.flatten(), **terms))
        hidden_btd = self.forward(tokens_bt, positions_bt, documents_bt)  # not by a call: its hooks would let go of the head's weights
        return self.loss_of(hidden_btd, labels_bt, **terms)

    def logprobs(
        self,
        tokens_bt: Tensor,
        labels_bt: Tensor,
        positions_bt: Tensor | None = None,
        documents_bt: Tensor | None = None,
        *,
        seed: Tensor | None = None,
    ) -> Tensor:
        """Log-probabilities [b, t] of the labels, which are already shifted, in fp32 with their gradient; 0 where a label is -100. `seed` is not read."""
        if not self.head.separate:
            logits_btv = self.forward(tokens_bt, positions_bt, documents_bt, logits=True)
            losses_n = cast(Any, cross_entropy.reference(logits_btv.flatten(0, -2), labels_bt.flatten(), reduction="none"))[0]
        else:
            hidden_btd = self.forward(tokens_bt, positions_bt, documents_bt)
            losses_n = self._head_module(hidden_btd, labels_bt, reduction="none")[0]
        return -losses_n.view(labels_bt.shape)

    def loss_of(self, hidden_btd: Tensor, labels_bt: Tensor, *, z_loss: float = 0.0, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """The head and the loss of hidden states; as `loss`. A call of the head's own module, whose hooks gather its weights where they are sharded."""
        return self._head_module(hidden_btd, labels_bt, z_loss=z_loss, label_smoothing=label_smoothing)

    def _headed(
        self,
        hidden_btd: Tensor,
        labels_bt: Tensor | None = None,
        *,
        z_loss: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "sum",
    ) -> Any:
        """The head's forward: logits as ever, and the loss where labels are given.

        A bias is the weight of a channel that is 1; 7 more of 0 keep the products' width a multiple of 8.
        """
        head = self._head_module
        if labels_bt is None:
            return nn.functional.linear(hidden_btd, head.weight, head.bias)
        hidden_nd, weight_vd = hidden_btd.flatten(0, 1).to(head.weight.dtype), head.weight
        if head.bias is not None:
            extra = hidden_nd.new_zeros(1, 8)
            extra[:, 0] = 1.0
            hidden_nd = torch.cat([hidden_nd, extra.expand(len(hidden_nd), 8)], 1)
            weight_vd = torch.cat([weight_vd, head.bias[:, None] * extra], 1)
        return self.ops.linear_cross_entropy(
            hidden_nd,
            weight_vd,
            labels_bt.flatten(),
            softcap=self.head.softcap,
            scale=self.head.scale,
            z_loss=z_loss,
            label_smoothing=label_smoothing,
            reduction=reduction,
        )

    @torch.no_grad()
    def verify(self, *, documents: bool, device: torch.device) -> None:
        """Checks on the weights at hand, in a few small forwards, that what is trained is what is meant; all ranks of a mesh call it alike.

        Nothing is random. A token does not see those behind it, so that padding at a row's end is seen by none. The loss is the cross entropy of the model's
        own logits. With `documents`, one does not see those before it in its row. Raises PlanError.
        """
        vocab, tokens, name = self._head_vocab, 24, self.config.model_type
        generator = torch.Generator().manual_seed(0)
        first = torch.randint(0, vocab, (2, tokens), generator=generator).to(device)
        half = tokens // 2
        other = torch.cat([first[:, :half], (first[:, half:] + 1) % vocab], 1)

        def differ(left: Tensor, right: Tensor) -> bool:
            """Beyond rounding, which sums of experts' shares take in another order."""
            return not bool(((left - right).abs().max() <= 32 * torch.finfo(left.dtype).eps * left.abs().max()).item())

        def seen(tokens_bt: Tensor, *where: Tensor) -> Tensor:
            return self(tokens_bt, *where) if self.head.separate else self.logits(tokens_bt, *where)

        if differ(seen(first), seen(first)):
            raise PlanError(f"model.from: this {name} draws random numbers in its forward, which no seed of the run decides; report it")
        if differ(seen(first)[:, :half], seen(other)[:, :half]):
            raise PlanError(
                f"model.from: in this {name} tokens see those behind them, so it would learn to copy its labels; if it has is_decoder, set it"
            )
        labels = first.roll(-1, 1)
        ours, logits = self.loss(first, labels)[1], self.logits(first)
        theirs = nn.functional.cross_entropy(
            logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32)), labels.flatten(), reduction="sum"
        )
        if not bool(((ours - theirs).abs() <= max(1e-5, 4 * torch.finfo(logits.dtype).eps) * theirs).item()):
            raise PlanError(
                f"model.from: the loss of this {name} is not the cross entropy of its logits ({ours.item()}, {theirs.item()}); report it"
            )
        if documents:
            positions = torch.arange(tokens, device=device)
            positions = torch.where(positions < half, positions, positions - half)[None].expand(2, -1)
            numbers = (torch.arange(tokens, device=device) >= half).int()[None].expand(2, -1)
            changed = torch.cat([(first[:, :half] + 1) % vocab, first[:, half:]], 1)
            left, right = (seen(x, positions, numbers)[:, half:] for x in (first, changed))
            if differ(left, right):
                raise PlanError(f'model.from: this {name} does not keep the documents of a row apart; set data.packing = "document"')

    @property
    def _head_vocab(self) -> int:
        return self.model.get_input_embeddings().weight.shape[0]


def build(config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """The model on meta with fp32 parameters, and buffers as `from_pretrained` in `dtype` makes them; nothing in it draws random numbers."""
    foreign.refuse(config)
    floors.versions()
    os.environ.setdefault("USE_HUB_KERNELS", "0")  # read when transformers is imported: kernels are code of others, downloaded
    import transformers

    if importlib.util.find_spec("kernels") and os.environ["USE_HUB_KERNELS"].upper() not in ("0", "NO", "OFF", "FALSE"):
        raise RecipeError("USE_HUB_KERNELS is set, with which transformers downloads and runs code of others; unset it")
    kind = config["model_type"]
    try:
        described = transformers.CONFIG_MAPPING[kind]
    except KeyError:
        raise RecipeError(
            f"model.from: transformers {transformers.__version__} has no model_type {kind!r}; a newer one may: pip install -U transformers"
        ) from None
    try:
        read = described.from_dict(plain(config) | {"use_cache": False})
    except Exception as failure:  # each config class checks in its own way
        raise RecipeError(f"model.from: transformers refuses this config.json of {kind!r}: {failure}") from None
    try:
        for part in (read, *(getattr(read, name) for name in read.sub_configs)):
            silence(part)
        with _weights_on_meta():
            model: Any = transformers.AutoModelForCausalLM.from_config(read, dtype=dtype, trust_remote_code=False)
    except Exception as failure:
        raise RecipeError(
            f"model.from: transformers cannot build a causal language model from this config.json of {kind!r}: {failure}"
        ) from None
    for module in model.modules():
        silence(module)
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_meta:
                raise PlanError(f"model.from: {type(module).__name__} of {kind} keeps the tensor {name} where a change of device loses it")
    initialize(model, model)  # of weights on meta nothing; of tables what `from_pretrained` makes of them outside of `dtype`
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and _wide(model, name):
            owner, leaf = owner_of(model, name)
            owner._buffers[leaf] = buffer.float()
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    model.train()
    return model


def plain(value: Any) -> Any:
    """JSON as transformers means it: what no number of JSON says is a table there, such as {"__float__": "Infinity"}."""
    if isinstance(value, Mapping):
        return float(value["__float__"]) if set(value) == {"__float__"} else {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list) else value


def silence(part: Any) -> None:
    """Sets to 0 what makes a config or a module draw random numbers."""
    for name, value in list(getattr(part, "__dict__", {}).items()):
        if isinstance(value, float) and name.endswith(foreign.RANDOM):
            setattr(part, name, 0.0)
    if isinstance(part, nn.modules.dropout._DropoutNd):
        part.p = 0.0


@torch.no_grad()
def initialize(module: nn.Module, model: Any) -> None:
    """The model's own initialisation of a module and all below it, children first."""
    for child in module.children():
        initialize(child, child if hasattr(child, "_init_weights") else model)
    model._init_weights(module)


def _wide(model: Any, name: str) -> bool:
    """Whether transformers keeps a tensor in fp32 whatever the rest is."""
    return any(re.search(rf"(^|\.){pattern}(\.|$)", name) for pattern in model._keep_in_fp32_modules_strict or ())


def wide(model: Any) -> list[str]:
    """Parameters that transformers keeps in fp32, which we cannot in a run in bf16."""
    return [name for name, _ in model.named_parameters() if _wide(model, name)]


@contextlib.contextmanager
def _weights_on_meta() -> Iterator[None]:
    """Within it, every parameter goes to meta as it is registered, before a byte of it is written; buffers are made as ever, with their values."""
    register = nn.Module.register_parameter

    def registered(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        register(module, name, param)

    nn.Module.register_parameter = registered  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _parameters_of(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def owner_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    parent, _, leaf = name.rpartition(".")
    return model.get_submodule(parent), leaf


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def layer_lists(model: Any) -> list[tuple[str, nn.ModuleList]]:
    """The lists of repeated blocks, by name: those that are longest and in no other; most models have one."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)]
    outer = [(name, held) for name, held in lists if not any(name.startswith(f"{other}.") for other, _ in lists)]
    longest = max((len(held) for _, held in outer), default=0)
    weights = sum(p.numel() for _, held in outer if len(held) == longest for p in held.parameters())
    if not weights:
        raise PlanError(f"model.from: {type(model).__name__} has no list of repeated layers, by which it would be sharded and recomputed")
    return [(name, held) for name, held in outer if len(held) == longest]


def _refuse_shared(model: Any, layers: list[nn.Module]) -> None:
    """A weight that two layers share, or a layer and what is outside, cannot be sharded with each."""
    inside = {id(module) for layer in layers for module in layer.modules()}
    rest = {id(p) for module in model.modules() if id(module) not in inside for p in module.parameters(recurse=False)}
    owners = Counter(rest)
    for layer in layers:
        owners.update({id(p) for p in layer.parameters()})
    if shared := [name for name, p in model.named_parameters() if owners[id(p)] > 1]:
        raise PlanError(f"model.from: layers of {type(model).__name__} share {shared[0]}, and weights are kept layer by layer here")


def _kinds(model: Any, layers: list[nn.Module]) -> dict[str, tuple[Kind, bool]]:
    """Of every parameter its kind, and whether it is a weight: of two dimensions or more, of a linear map, a convolution or a stack of experts."""
    inside = {id(p) for layer in layers for p in layer.parameters()}
    head = model.get_output_embeddings()
    found: dict[str, tuple[Kind, bool]] = {}
    for name, parameter in model.named_parameters():
        owner, leaf = owner_of(model, name)
        title = type(owner).__name__
        linear = isinstance(owner, nn.Linear) or title == "Conv1D"
        many = parameter.dim() >= 2 and id(parameter) in inside
        kind: Kind = "scalar"
        if isinstance(owner, nn.Embedding):
            kind = "embed"
        elif head is not None and parameter is getattr(head, "weight", None):
            kind = "head"
        elif leaf.endswith("bias"):
            kind = "bias"
        elif parameter.dim() <= 1 and re.search(r"norm|^ln|_ln", f"{title}.{name.split('.')[-2]}", re.IGNORECASE):
            kind = "norm"
        elif many and parameter.dim() == 2 and re.search("router|topk", title, re.IGNORECASE):
            kind = "router"
        elif many and parameter.dim() == 3 and "expert" in title.lower():
            kind = "expert"
        elif parameter.dim() == 2 and (linear or (many and leaf == "weight")):
            kind = "matrix"
        found[name] = kind, kind in ("matrix", "expert", "router") or (many and parameter.dim() >= 3)
    return found


@contextlib.contextmanager
def emptied(lists: list[tuple[str, nn.ModuleList]]) -> Iterator[None]:
    """Within it, the model has no layers."""
    kept = [held._modules for _, held in lists]
    for _, held in lists:
        held._modules = {}
    try:
        yield
    finally:
        for (_, held), modules in zip(lists, kept, strict=True):
            held._modules = modules


@torch.no_grad()
def _head(model: Any, lists: list[tuple[str, nn.ModuleList]]) -> Head:
    """What happens behind the head, measured: the model runs without values, its head answers with numbers, and they are followed to the logits.

    Without layers, where the model can: some of them cannot be run without values.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return Head(separate=False, why=f"its head is a {type(head).__name__}")
    try:
        with emptied(lists):
            return _measured(model, head)
    except Exception:  # whatever a model does that has no layers
        try:
            return _measured(model, head)
        except Exception as failure:  # or no values: then its own logits are taken
            return Head(
                separate=False, why=f"it does not run without values: {type(failure).__name__}: {str(failure).splitlines()[0][:120]}"
            )


def _measured(model: Any, head: nn.Linear) -> Head:
    tokens, vocab = 8, head.weight.shape[0]
    ends = torch.tensor([0.0, 1.0, 2.0**-20, 1e9], dtype=torch.float64)
    asked = torch.cat([ends, torch.linspace(-300.0, 300.0, tokens * vocab - 4, dtype=torch.float64)])
    name, answers = _name_of(model, head), []
    for answer in (asked.view(1, tokens, vocab).as_subclass(_Followed), None):
        with _caught(model, name, answer) as caught, FakeTensorMode(allow_non_fake_inputs=True):
            weights = {where: torch.empty(parameter.shape) for where, parameter in model.named_parameters()}
            inputs = {"input_ids": torch.zeros(1, tokens, dtype=torch.int64), "use_cache": False, "return_dict": True}
            answers.append(torch.func.functional_call(model, weights, kwargs=inputs).logits)
        if caught.calls != 1 or caught.hidden.shape[:-1] != (1, tokens):
            return Head(separate=False, why=f"its head is called {caught.calls} times, not once with every token")
    if answers[0].shape != (1, tokens, vocab) or not isinstance(answers[0], _Followed):
        return Head(separate=False, why=f"its logits are {list(answers[0].shape)} of a head's {[1, tokens, vocab]}")
    found = answers[0].as_subclass(Tensor)
    single = found.dtype == torch.float32
    found = found.flatten().double()
    scale, softcap = found[1].item(), None
    if abs(found[3].item()) < 1e6:  # of 1e9 asked
        scale, softcap = float(f"{found[2].item() * 2.0**20:.12g}"), found[3].item()
    if not scale or softcap == 0.0:
        return Head(separate=False, why="its logits do not follow from its head")
    expected = scale * asked if softcap is None else softcap * torch.tanh(scale * asked / softcap)
    if not torch.allclose(found, expected, rtol=3e-7 if single else 1e-11, atol=1e-5 if single else 1e-9):
        return Head(separate=False, why="its logits are no scaled and capped product")
    return Head(separate=True, scale=scale, softcap=softcap, bias=head.bias is not None)


def _recomputed(forward: Callable[..., Any], *, selective: bool) -> Callable[..., Any]:
    """A layer's forward that keeps its inputs (`selective`: and its products) alone; within the module's hooks, so that sharded weights are gathered once."""
    options: dict[str, Any] = {"context_fn": keep_products} if selective else {}

    def run(*inputs: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs, **named)
        return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False, **options, **named)

    return run
