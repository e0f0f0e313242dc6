"""Adapters: matrices of low rank trained beside a decoder's frozen weights: LoRA (arXiv:2106.09685), rsLoRA (arXiv:2312.03732), DoRA (arXiv:2402.09353),
and LoRA over weights of 4 bits (QLoRA, arXiv:2305.14314). Formulas, first values and files are those of peft.

    LoRA    y = x W^T + b + s u B^T        u = dropout(x) A^T, s = alpha / rank, or alpha / sqrt(rank)
    DoRA    y = c (x W^T + s u B^T) + b    c = m / ||W + s B A||, rows' norms, of which no gradient is taken

Legend: x_ni inputs, W_oi the frozen matrix, A_ri, B_or, m_o lengths of rows. What is trained of m is its growth, m - ||W||: it begins at 0, so that rounding
it to bf16 does not round m, and its gradient is m's. Names in memory: A, B and growth of `NAME.weight` are `NAME.lora_A`, `NAME.lora_B`, `NAME.lora_growth`;
everything else keeps its name, and a quantised weight is two tensors, `NAME.codes` and `NAME.scales`.

One function computes product and adapter: u is all that it makes on the way, and both sums (of y, and of x's gradient) are made by the second product itself,
so that four passes over activations are spared, and x is kept once. Its backward has no product for W. Norms of W + s B A come from ||W||, A W^T and A A^T:
no matrix of W's size is made.
"""

import contextlib
import hashlib
import json
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from gigatrain.config import Adapter
from gigatrain.errors import CheckpointError
from gigatrain.kernels.linear import Linear
from gigatrain.models import hf, nf4
from gigatrain.models.decoder import Decoder
from gigatrain.planning.adapting import targeted

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # peft's files
_PREFIX = "base_model.model."  # of peft's names
_LENGTH = "lora_magnitude_vector"


class Seeds:
    """The seeds of this microbatch's masks, one int64 of each matrix, on the device: each reads its own in a place that stays."""

    def __init__(self, adapted: "list[Adapted]") -> None:
        self.adapted, self.tensor = adapted, None

    def take(self, seed: Tensor | None) -> None:
        """Of the forward that begins, from the engine's."""
        if seed is None or not self.adapted or not self.adapted[0].dropout:
            return
        found = seed * (1 << 16) + torch.arange(len(self.adapted), device=seed.device)
        if self.tensor is None:
            self.tensor = found
            for module, one in zip(self.adapted, found.unbind(), strict=True):
                module.seed = one
        else:
            self.tensor.copy_(found)


class Frozen(Linear):
    """A layer's matrix that is not trained, perhaps of 4 bits."""

    def __init__(self, of: Linear, quantise: str, restore: nf4.Restore) -> None:
        nn.Module.__init__(self)
        self.restore = restore
        self.in_features, self.out_features, self.product = of.in_features, of.out_features, of.product
        self.bias, self.narrow = of.bias, quantise == "nf4"
        if self.narrow:
            outputs, inputs, device = of.out_features, of.in_features, of.weight.device
            self.codes = nn.Parameter(torch.empty(outputs, inputs // 2, dtype=torch.uint8, device=device), requires_grad=False)
            # Bits of fp32 numbers, as integers: whoever casts a model's weights leaves them.
            self.scales = nn.Parameter(torch.empty(outputs, inputs // nf4.BLOCK, dtype=torch.int32, device=device), requires_grad=False)
        else:
            self.weight = of.weight

    def _kept(self) -> tuple[Tensor, Tensor | None]:
        return (self.codes, self.scales) if self.narrow else (self.weight, None)

    def forward(self, x_nd: Tensor) -> Tensor:
        if not self.narrow:
            return self.product(x_nd, self.weight, self.bias)
        return self._product(x_nd, self.bias)

    def _product(self, x_nd: Tensor, bias_o: Tensor | None, a: Tensor | None = None, b: Tensor | None = None, s: float = 1.0) -> Tensor:
        """As `_Product`; a compiler gets what it is made of."""
        weight, scales = self._kept()
        if torch.compiler.is_compiling():
            y_no = F.linear(x_nd, weight, bias_o)
            return y_no if a is None or b is None else y_no + s * F.linear(F.linear(x_nd, a), b)
        return _Product.apply(x_nd, weight, scales, bias_o, a, b, s, self.restore)  # type: ignore[return-value]

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight, in `dtype` where it is made of codes."""
        return _dense(*self._kept(), dtype, self.restore)


class Adapted(Frozen):
    """A frozen matrix with an adapter."""

    off = False  # whether it computes as the frozen matrix alone
    seed: Tensor | None = None  # of this microbatch's mask

    def __init__(self, of: Linear, adapter: Adapter, drop: Callable[..., Tensor], restore: nf4.Restore) -> None:
        super().__init__(of, adapter.quantise, restore)
        self.kind, self.scale, self.dropout, self.drop = adapter.kind, adapter.scale, adapter.dropout, drop
        device = next(self.parameters()).device
        self.lora_A = nn.Parameter(torch.empty(adapter.rank, of.in_features, device=device))
        self.lora_B = nn.Parameter(torch.empty(of.out_features, adapter.rank, device=device))
        if adapter.kind == "dora":
            self.lora_growth = nn.Parameter(torch.empty(of.out_features, device=device))

    def forward(self, x_nd: Tensor) -> Tensor:
        if self.off:
            return super().forward(x_nd)
        a, b, s = self.lora_A, self.lora_B, self.scale
        dropped = self._dropped(x_nd) if self.training and self.dropout else None
        if self.kind == "lora":
            if dropped is None:
                return self._product(x_nd, self.bias, a, b, s)
            return super().forward(x_nd) + s * F.linear(F.linear(dropped, a), b)
        share_o = self._share(x_nd.dtype)
        if dropped is None:
            y = self._product(x_nd, None, a, b, s) * share_o
            return y if self.bias is None else y + self.bias
        # As peft: what the frozen matrix makes of all inputs, and what adapter and lengths change of the ones that are left.
        plain = self._product(dropped, None)
        return super().forward(x_nd) + (share_o - 1) * plain + share_o * s * F.linear(F.linear(dropped, a), b)

    def _dropped(self, x_nd: Tensor) -> Tensor:
        assert self.seed is not None, "the engine gives a seed where the adapter has dropout"
        return self.drop(x_nd, torch.zeros_like(x_nd), self.dropout, self.seed)

    def _share(self, dtype: torch.dtype) -> Tensor:
        """c of DoRA, [o] in `dtype`; its gradient is that of the growth alone."""
        with torch.no_grad():
            w = self.dense(dtype)
            length = torch.linalg.vector_norm(w, dim=1, dtype=torch.float32)
            a, b, s = self.lora_A.float(), self.lora_B.float(), self.scale
            across = (self.lora_A.to(w.dtype) @ w.t()).float()
            square = length**2 + 2 * s * (b * across.t()).sum(1) + s**2 * ((b @ (a @ a.t())) * b).sum(1)
            inverse = square.clamp(min=torch.finfo(torch.float32).tiny).rsqrt()
            # Without an adapter the share is 1, whatever a root of a square rounds to.
            inverse = torch.where(square == length**2, 1.0 / length, inverse)
        return ((length + self.lora_growth.float()) * inverse).to(dtype)


def _dense(weight: Tensor, scales: Tensor | None, dtype: torch.dtype, restore: nf4.Restore) -> Tensor:
    return weight if scales is None else restore(weight, scales.view(torch.float32), dtype)


class _Product(torch.autograd.Function):
    """x W^T + b + s (x A^T) B^T, or without an adapter x W^T + b; W has no gradient, and codes of 4 bits are kept instead of it."""

    @staticmethod
    def forward(
        ctx: Any,
        x_nd: Tensor,
        weight: Tensor,
        scales: Tensor | None,
        bias_o: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        s: float,
        restore: nf4.Restore,
    ) -> Tensor:
        y_no = F.linear(x_nd, _dense(weight, scales, x_nd.dtype, restore), bias_o)
        ctx.s, ctx.restore = s, restore
        if a is not None and b is not None:
            u_nr = F.linear(x_nd, a).flatten(0, -2)
            y_no = torch.addmm(y_no.flatten(0, -2), u_nr, b.t(), alpha=s).view(y_no.shape)
            ctx.save_for_backward(x_nd, weight, scales, a, b, u_nr)
        else:
            ctx.save_for_backward(None, weight, scales, None, None, None)
        return y_no

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_no: Tensor) -> Any:
        x, weight, scales, a, b, u_nr = ctx.saved_tensors
        dy = dy_no.flatten(0, -2)
        dx = dy @ _dense(weight, scales, dy.dtype, ctx.restore) if ctx.needs_input_grad[0] else None
        if a is None:
            return None if dx is None else dx.view(*dy_no.shape[:-1], -1), *([None] * 7)
        du_nr = (dy @ b).mul_(ctx.s)
        da = du_nr.t() @ x.flatten(0, -2) if ctx.needs_input_grad[4] else None
        db = (dy.t() @ u_nr).mul_(ctx.s) if ctx.needs_input_grad[5] else None
        dx = None if dx is None else dx.addmm_(du_nr, a).view(x.shape)
        return dx, None, None, None, da, db, None, None


# ---- A decoder with adapters ----


def adapt(model: Decoder, adapter: Adapter, dtype: torch.dtype) -> None:
    """Freeze a decoder, its weights in `dtype`, and give the matrices that `adapter` targets one each. On meta, or with weights that are kept."""
    adapted, restore = [], nf4.restorer(adapter.restore)
    for name, module in list(model.named_modules()):
        if type(module) is not Linear:
            continue
        owner, _, leaf = name.rpartition(".")
        if targeted(name, adapter.targets):
            adapted.append(Adapted(module, adapter, model.ops.dropout_add, restore))
            setattr(model.get_submodule(owner), leaf, adapted[-1])
        elif adapter.quantise != "none":
            setattr(model.get_submodule(owner), leaf, Frozen(module, adapter.quantise, restore))
    model.adapter_seeds = Seeds(adapted)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains(name, adapter))
    if adapter.train_head and model.part.last:
        model.lm_head.weight.requires_grad_()
    settle(model, dtype)


def trains(name: str, adapter: Adapter) -> bool:
    """Whether a parameter is trained; a tied head goes by its embedding's name."""
    if name.startswith("model.embed_tokens."):
        return adapter.train_embeddings
    return ".lora_" in name or (name.startswith("lm_head.") and adapter.train_head)


def settle(model: Decoder, dtype: torch.dtype) -> None:
    """Let frozen weights be kept in `dtype`, whatever the trained ones are kept in."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.requires_grad and parameter.is_floating_point() and parameter.dtype != dtype:
                setattr(module, name, nn.Parameter(parameter.detach().to(dtype), requires_grad=False))
    model._tie()


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within it the model computes as the frozen base alone (a reference model that costs no memory), and draws nothing. Embedding and head must be frozen.

    It takes no seeds: those of a forward before it are in the graph that its backward will read, in the place that stays.
    """
    adapted = [module for module in model.modules() if isinstance(module, Adapted)]
    assert adapted, "there is no adapter to turn off"
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".lora_" not in name), "the base itself is trained"
    before, training = [module.off for module in adapted], model.training
    model.eval()
    for module in adapted:
        module.off = True
    try:
        yield
    finally:
        model.train(training)
        for module, was in zip(adapted, before, strict=True):
            module.off = was


# ---- First values ----


def base_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the base's parameters, whatever they are kept as."""
    found = {}
    for name, module in model.named_modules():
        at = f"{name}." if name else ""
        for leaf, parameter in module.named_parameters(recurse=False):
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 leaves none in place
            if leaf == "codes":
                found[f"{at}weight"] = (shape[0], 2 * shape[1])
            elif leaf != "scales" and not leaf.startswith("lora_"):
                found[f"{at}{leaf}"] = shape
    if getattr(getattr(model, "arch", None), "tied", False) and "model.embed_tokens.weight" in found:
        found.pop("lm_head.weight", None)
    return found


def kept(model: nn.Module, name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What a base's weight is kept as: itself, or its codes and scales."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf == "weight" and isinstance(module, Frozen) and module.narrow:
        codes, scales = nf4.quantised(weight)
        yield f"{owner}.codes", codes
        yield f"{owner}.scales", scales.view(torch.int32)
    else:
        yield name, weight


def base_boxes(model: nn.Module, boxes: Mapping[str, hf.Box], adapter: Adapter, *, trained: bool = True) -> dict[str, hf.Box]:
    """What must be read of each of the base's weights for `boxes` of the parameters that are kept; a weight that is not named is read whole.

    Of a weight of 4 bits whole rows, in which its blocks lie; with them, where `adapter.from` has lengths of rows, the rows whose growth is in its box.
    Without `trained` nothing of what is trained.
    """
    found = {}
    for name, shape in base_shapes(model).items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        narrow = leaf == "weight" and isinstance(module, Frozen) and module.narrow
        parts = [f"{owner}.codes", f"{owner}.scales"] if narrow else [name]
        if trained and adapter.source is not None and adapter.kind == "dora" and leaf == "weight" and isinstance(module, Adapted):
            parts.append(f"{owner}.lora_growth")
        if not trained and trains(name, adapter):
            found[name] = (0,) * len(shape), (0,) * len(shape)
        elif parts == [name] and name in boxes:
            found[name] = boxes[name]
        elif all(part in boxes for part in parts):
            rows = [(start[0], start[0] + size[0]) for start, size in (boxes[part] for part in parts) if 0 not in size]
            low, high = (min(row for row, _ in rows), max(row for _, row in rows)) if rows else (0, 0)
            found[name] = (low, *(0,) * (len(shape) - 1)), (high - low, *shape[1:])
    return found


def first(
    model: nn.Module,
    base: Iterator[tuple[str, Tensor]],
    adapter: Adapter,
    seed: int,
    boxes: Mapping[str, hf.Box] | None = None,
    *,
    trained: bool = True,
) -> Iterator[tuple[str, Tensor]]:
    """The first value of every parameter, or of its box, one at a time: the base's, then the adapters': A uniform within 1 / sqrt(inputs), B and growth 0,
    as peft, or what the folder `adapter.from` has. Drawn on the CPU: the same on every device. Without `trained` only what is frozen.

    base: of each weight what `base_boxes` says, or all; only what is read is quantised.
    """
    boxes = boxes or {}
    read = base_boxes(model, boxes, adapter, trained=trained)
    start = None if adapter.source is None or not trained else Stored(hf.locate(adapter.source), adapter)
    lengths: dict[str, Tensor] = {}
    for name, weight in base:
        assert name not in read or tuple(weight.shape) == read[name][1], (name, weight.shape, read[name])
        owner, _, leaf = name.rpartition(".")
        if start is not None and adapter.kind == "dora" and leaf == "weight" and isinstance(module := model.get_submodule(owner), Adapted):
            lengths[owner] = row_lengths(weight, _dtype(module), narrow=module.narrow)
        for kept_name, tensor in kept(model, name, weight):
            yield kept_name, _cut(tensor, boxes.get(kept_name), read.get(name))
    if not trained:
        return
    found = {name: module for name, module in model.named_modules() if isinstance(module, Adapted)}
    if start is not None:
        start.check(found)
    for name, module in found.items():
        for leaf, whole in _begun(name, module, adapter, seed) if start is None else start.parts(name):
            box = boxes.get(f"{name}.{leaf}")
            if box is not None and 0 in box[1]:
                continue
            part = _cut(whole, box, None)
            if start is not None and leaf == "lora_growth":
                yield f"{name}.{leaf}", part - _cut(lengths[name].cpu(), box, read.get(f"{name}.weight"))
            else:
                yield f"{name}.{leaf}", part


def _cut(tensor: Tensor, box: hf.Box | None, within: hf.Box | None) -> Tensor:
    """A parameter's box (None: all) out of what is at hand, its box `within` (None: all); of both only the rows matter where they have other columns."""
    if box is None:
        return tensor
    starts = (0,) * tensor.ndim if within is None else within[0]
    return tensor[hf.cut_of([at - low for at, low in zip(box[0], starts, strict=False)], box[1])]


def _begun(name: str, module: Adapted, adapter: Adapter, seed: int) -> Iterator[tuple[str, Tensor]]:
    digest = hashlib.sha256(f"{seed}/{name}.lora_A".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    bound = 1 / math.sqrt(module.in_features)
    yield "lora_A", torch.empty(adapter.rank, module.in_features, device="cpu").uniform_(-bound, bound, generator=generator)
    yield "lora_B", torch.zeros(module.out_features, adapter.rank, device="cpu")
    if adapter.kind == "dora":
        yield "lora_growth", torch.zeros(module.out_features, device="cpu")


def _dtype(module: Frozen) -> torch.dtype:
    return torch.float32 if module.narrow else module.weight.dtype


def row_lengths(weight: Tensor, dtype: torch.dtype, *, narrow: bool) -> Tensor:
    """||W|| of each row, fp32, of the weight as it is kept: rounded to `dtype`, or quantised."""
    w = nf4.restored(*nf4.quantised(weight), torch.float32) if narrow else weight.to(dtype)
    return torch.linalg.vector_norm(w, dim=1, dtype=torch.float32)


class Stored:
    """An adapter folder that peft wrote. Raises CheckpointError for one that is not what the recipe says."""

    def __init__(self, folder: Path, adapter: Adapter) -> None:
        self.folder, self.adapter = folder, adapter
        path = self.folder / CONFIG
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(config, dict):
                raise ValueError("it is no table")
        except (OSError, ValueError, RecursionError) as failure:
            raise CheckpointError(f"adapter.from {str(folder)!r}: {path} cannot be read: {str(failure)[:200]}") from None
        theirs = {
            "peft_type": (config.get("peft_type"), "LORA"),
            "use_dora": (bool(config.get("use_dora")), adapter.kind == "dora"),
            "r": (config.get("r"), adapter.rank),
            "lora_alpha": (config.get("lora_alpha"), adapter.alpha),
            "use_rslora": (bool(config.get("use_rslora")), adapter.rslora),
            "bias": (config.get("bias", "none"), "none"),
            "rank_pattern": (config.get("rank_pattern") or {}, {}),
            "alpha_pattern": (config.get("alpha_pattern") or {}, {}),
        }
        if differ := [f"{key} {has!r}, here {wants!r}" for key, (has, wants) in theirs.items() if has != wants]:
            raise CheckpointError(
                f"adapter.from {str(folder)!r} is another adapter than the recipe's: {'; '.join(differ)}; set [adapter] to it"
            )
        try:
            with safe_open(self.folder / WEIGHTS, framework="pt", device="cpu") as file:
                self.names = {name.removeprefix(_PREFIX): name for name in file.keys()}  # noqa: SIM118 - no mapping
        except (OSError, SafetensorError) as failure:
            raise CheckpointError(f"adapter.from: {self.folder / WEIGHTS} cannot be read: {str(failure)[:200]}") from None

    def check(self, modules: Mapping[str, Adapted]) -> None:
        """Whether its matrices are those that are adapted here."""
        parts = ["lora_A.weight", "lora_B.weight", *([_LENGTH] if self.adapter.kind == "dora" else [])]
        wanted = {f"{name}.{part}" for name in modules for part in parts}
        if lacking := sorted(wanted - self.names.keys()):
            raise CheckpointError(
                f"adapter.from: {self.folder} lacks {lacking[0]} ({len(lacking)} of {len(wanted)}); set adapter.targets to its own"
            )
        if more := sorted(self.names.keys() - wanted):
            raise CheckpointError(
                f"adapter.from: {self.folder} holds {more[0]}, for which there is no place here; set adapter.targets to its own"
            )

    def parts(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """What a matrix's adapter is made of, whole; `lora_growth` are the lengths themselves."""
        yield "lora_A", self.tensor(f"{name}.lora_A.weight")
        yield "lora_B", self.tensor(f"{name}.lora_B.weight")
        if self.adapter.kind == "dora":
            yield "lora_growth", self.tensor(f"{name}.{_LENGTH}")

    def tensor(self, name: str) -> Tensor:
        """One of its tensors, fp32."""
        with safe_open(self.folder / WEIGHTS, framework="pt", device="cpu") as file:
            return file.get_tensor(self.names[name]).float()


# ---- The base ----


def files(folder: Path) -> list[str]:
    """Names of a model folder's *.safetensors."""
    if not (names := sorted(path.name for path in folder.glob("*.safetensors") if path.is_file())):
        raise CheckpointError(f"{folder} holds no *.safetensors")
    return names


def files_sha256(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """SHA-256s of files by name, hashed side by side."""
    with ThreadPoolExecutor(min(16, max(1, len(names)))) as pool:
        return dict(zip(names, pool.map(_file_sha256, [folder / name for name in names]), strict=True))


def whole_sha256(each: Mapping[str, str]) -> str:
    """SHA-256 over names and their SHA-256s, sorted."""
    return hashlib.sha256("".join(f"{name} {each[name]}\n" for name in sorted(each)).encode()).hexdigest()


_known: dict[tuple[str, int, int], str] = {}
_lock = threading.Lock()


def _file_sha256(path: Path) -> str:
    """Of one file, once a process and state of it."""
    stat = path.stat()
    key = str(path.resolve()), stat.st_size, stat.st_mtime_ns
    with _lock:
        if key in _known:
            return _known[key]
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    with _lock:
        _known[key] = found
    return found
