"""Other libraries' kernels behind the signatures of our operations: measured, never copied.

An adapter's `make` imports its package and returns the function to call, which takes what the operation's `reference` takes and returns what it returns.
What a peer cannot do it refuses with KernelError; what it does differently its note says.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gigatrain.errors import KernelError

# What installs each: the distribution whose version a row carries.
PACKAGES = {
    "liger": "liger-kernel",
    "cut-cross-entropy": "cut-cross-entropy",
    "flashoptim": "flashoptim",
    "quack": "quack-kernels",
    "transformers": "transformers",
}
# What --peers can name: plain torch, torch.compile of it, other functions of torch, the packages, and the matrix products alone.
PEERS = ("torch", "compile", "native", *PACKAGES, "products")


@dataclass(frozen=True)
class Adapter:
    """One peer's version of one operation.

    `overwrites`: it writes over its inputs or its gradients, and gets copies of its own that are refreshed before every timing. `checked`: it computes what
    the operation computes, so that its error says something.
    """

    peer: str
    op: str
    make: Callable[[], Callable[..., Any]]
    note: str = ""
    gpu: bool = True
    overwrites: bool = False
    checked: bool = True

    @property
    def package(self) -> str:
        """The distribution that it comes from."""
        return PACKAGES.get(self.peer, "torch")


def _refuse(peer: str, scale: float = 1.0, **wanted: Any) -> None:
    """Raise KernelError for a scale, or for the first other argument that asks for something."""
    if scale != 1.0:
        raise KernelError(f"{peer} has no scale")
    for name, value in wanted.items():
        if isinstance(value, Tensor) or value:
            raise KernelError(f"{peer} has no {name}")


_LOSS_IN_BF16 = "its loss is in the logits' dtype"
_IN_FORWARD = "its forward makes the gradients: compare full"


# ---- Norms ----


def _native_rms_norm() -> Callable[..., Any]:
    def rms_norm(x: Tensor, w: Tensor, eps: float, style: str) -> Tensor:
        return F.rms_norm(x, w.shape, 1.0 + w if style == "gemma" else w, eps)

    return rms_norm


_LIGER_STYLES = {"llama": (0.0, "llama"), "gemma": (1.0, "gemma")}


def _liger_style(style: str) -> tuple[float, str]:
    if style not in _LIGER_STYLES:
        raise KernelError(f"liger has no norm of style {style}")
    return _LIGER_STYLES[style]


def _liger_rms_norm() -> Callable[..., Any]:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    def rms_norm(x: Tensor, w: Tensor, eps: float, style: str) -> Any:
        return LigerRMSNormFunction.apply(x, w, eps, *_liger_style(style))

    return rms_norm


def _liger_add_rms_norm() -> Callable[..., Any]:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    def add_rms_norm(x: Tensor, residual: Tensor, w: Tensor, eps: float, style: str, scale: float = 1.0) -> tuple[Any, Any]:
        _refuse("liger", scale)
        y, h = LigerFusedAddRMSNormFunction.apply(x, residual, w, eps, *_liger_style(style), True)  # type: ignore[misc]
        return h, y

    return add_rms_norm


def _quack_rms_norm() -> Callable[..., Any]:
    from quack.rmsnorm import rmsnorm  # pyright: ignore[reportMissingImports]

    def rms_norm(x: Tensor, w: Tensor, eps: float, style: str) -> Any:
        return rmsnorm(x, w, eps=eps, weight_offset=1.0 if style == "gemma" else 0.0)

    return rms_norm


def _quack_add_rms_norm() -> Callable[..., Any]:
    from quack.rmsnorm import rmsnorm  # pyright: ignore[reportMissingImports]

    def add_rms_norm(x: Tensor, residual: Tensor, w: Tensor, eps: float, style: str, scale: float = 1.0) -> tuple[Any, Any]:
        _refuse("quack", scale)
        y, h = rmsnorm(x, w, residual=residual, eps=eps, prenorm=True, weight_offset=1.0 if style == "gemma" else 0.0)
        return h, y

    return add_rms_norm


# ---- Positions ----


def _liger_rope() -> Callable[..., Any]:
    from liger_kernel.ops.rope import LigerRopeFunction

    def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> tuple[Tensor, Tensor]:
        if interleaved:
            raise KernelError("liger turns halves, not interleaved channels")
        # As a decoder of transformers holds them: [batch, heads, tokens, channels], a transposed view of the projections.
        turned: Any = LigerRopeFunction.apply(q.transpose(1, 2), k.transpose(1, 2), cos, sin, None, 1, 2 * cos.shape[-1])
        return turned[0].transpose(1, 2), turned[1].transpose(1, 2)

    return rope


def _liger_qk_norm_rope() -> Callable[..., Any]:
    norm, turn = _liger_rms_norm(), _liger_rope()

    def qk_norm_rope(
        q: Tensor,
        k: Tensor,
        qw: Tensor,
        kw: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        eps: float,
        style: str,
        interleaved: bool = False,
    ) -> tuple[Tensor, Tensor]:
        normed = norm(q, qw, eps, style), norm(k, kw, eps, style)
        return normed if cos is None else turn(*normed, cos, sin, interleaved)

    return qk_norm_rope


# ---- Activations ----


def _liger_function(module: str, name: str) -> Callable[..., Any]:
    import importlib

    return getattr(importlib.import_module(f"liger_kernel.ops.{module}"), name).apply


def _native_dropout_add() -> Callable[..., Any]:
    def dropout_add(x: Tensor, residual: Tensor, p: float, *_: Any) -> Tensor:
        return residual + F.dropout(x, p)

    return dropout_add


# ---- Mixtures of experts ----


def _plain_experts(peer: str, **wanted: Any) -> None:
    activation = wanted.pop("activation", "swiglu")
    _refuse(peer, **wanted)
    if activation != "swiglu":
        raise KernelError(f"{peer} has no {activation}")


def _liger_moe() -> Callable[..., Any]:
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    def moe(x: Tensor, weights: Tensor, chosen: Tensor, gate_up: Tensor, down: Tensor, **wanted: Any) -> Any:
        _plain_experts("liger", **wanted)
        return LigerFusedMoEFunction.apply(x, gate_up, down, chosen.to(torch.int32), weights)

    return moe


def _transformers_moe() -> Callable[..., Any]:
    from types import SimpleNamespace

    from transformers.integrations.moe import grouped_mm_experts_forward

    def gated(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    def moe(x: Tensor, weights: Tensor, chosen: Tensor, gate_up: Tensor, down: Tensor, **wanted: Any) -> Tensor:
        _plain_experts("transformers", **wanted)
        numbers = {"num_experts": gate_up.shape[0], "gate_up_proj": gate_up, "down_proj": down, "_apply_gate": gated, "has_gate": True}
        absent = dict.fromkeys(("has_bias", "is_transposed", "has_post_expert_norm", "_is_expert_parallel"), False)
        module: Any = SimpleNamespace(**numbers, **absent)
        return grouped_mm_experts_forward(module, x, chosen, weights.to(x.dtype))

    return moe


# ---- Losses ----


def _native_cross_entropy() -> Callable[..., Any]:
    def cross_entropy(
        logits: Tensor,
        labels: Tensor,
        *,
        reduction: str = "sum",
        label_smoothing: float = 0.0,
        ignore: int = -100,
        scale: float = 1.0,
        **wanted: Any,
    ) -> tuple[Tensor, Tensor]:
        _refuse("F.cross_entropy", scale, **wanted)
        loss = F.cross_entropy(logits, labels, reduction=reduction, label_smoothing=label_smoothing, ignore_index=ignore)
        return loss, loss.detach()

    return cross_entropy


def _liger_cross_entropy() -> Callable[..., Any]:
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    def cross_entropy(
        logits: Tensor,
        labels: Tensor,
        *,
        softcap: float | None = None,
        z_loss: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "sum",
        ignore: int = -100,
        scale: float = 1.0,
        **wanted: Any,
    ) -> tuple[Tensor, Tensor]:
        _refuse("liger", scale, **wanted)
        found: Any = LigerCrossEntropyFunction.apply(logits, labels, None, ignore, z_loss, label_smoothing, reduction, softcap)
        return found[0], found[0].detach()

    return cross_entropy


def _quack_cross_entropy() -> Callable[..., Any]:
    from quack.cross_entropy import cross_entropy as call  # pyright: ignore[reportMissingImports]

    def cross_entropy(
        logits: Tensor, labels: Tensor, *, reduction: str = "sum", ignore: int = -100, scale: float = 1.0, **wanted: Any
    ) -> Any:
        _refuse("quack", scale, **wanted)
        loss = call(logits, labels, ignore_index=ignore, reduction=reduction)
        return loss, loss.detach()

    return cross_entropy


def _native_linear_cross_entropy() -> Callable[..., Any]:
    if not hasattr(F, "linear_cross_entropy"):
        raise KernelError(f"torch {torch.__version__} has no F.linear_cross_entropy; 2.13 has")
    options = torch.nn.LinearCrossEntropyOptions()

    def linear_cross_entropy(
        h: Tensor,
        w: Tensor,
        labels: Tensor,
        *,
        ignore: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "sum",
        scale: float = 1.0,
        **wanted: Any,
    ) -> tuple[Tensor, Tensor]:
        _refuse("F.linear_cross_entropy", scale, **wanted)
        loss = F.linear_cross_entropy(
            h, w, labels, reduction=reduction, ignore_index=ignore, label_smoothing=label_smoothing, options=options
        )
        return loss, loss.detach()

    return linear_cross_entropy


def _liger_linear_cross_entropy() -> Callable[..., Any]:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    def linear_cross_entropy(
        h: Tensor,
        w: Tensor,
        labels: Tensor,
        *,
        softcap: float | None = None,
        z_loss: float = 0.0,
        ignore: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "sum",
        scale: float = 1.0,
        **wanted: Any,
    ) -> tuple[Tensor, Tensor]:
        _refuse("liger", scale, **wanted)
        found: Any = LigerFusedLinearCrossEntropyFunction.apply(
            h, w, labels, None, None, ignore, z_loss, label_smoothing, reduction, softcap
        )
        return found[0], found[0].detach()

    return linear_cross_entropy


def _cut_linear_cross_entropy() -> Callable[..., Any]:
    from cut_cross_entropy import linear_cross_entropy as call

    def linear_cross_entropy(
        h: Tensor,
        w: Tensor,
        labels: Tensor,
        *,
        softcap: float | None = None,
        ignore: int = -100,
        reduction: str = "sum",
        scale: float = 1.0,
        **wanted: Any,
    ) -> tuple[Tensor, Tensor]:
        _refuse("cut-cross-entropy", scale, **wanted)
        loss = call(h, w, labels, ignore_index=ignore, softcap=softcap, reduction=reduction)
        return loss, loss.detach()

    return linear_cross_entropy


def _quack_linear_cross_entropy() -> Callable[..., Any]:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy  # pyright: ignore[reportMissingImports]

    def linear_cross_entropy(
        h: Tensor, w: Tensor, labels: Tensor, *, ignore: int = -100, reduction: str = "sum", scale: float = 1.0, **wanted: Any
    ) -> tuple[Tensor, Tensor]:
        _refuse("quack", scale, **wanted)
        loss = chunked_linear_cross_entropy(h, w, labels, ignore_index=ignore, reduction=reduction)
        return loss, loss.detach()

    return linear_cross_entropy


def _products() -> Callable[..., Any]:
    """The three products of head and gradients, and nothing between them: what no loss can be faster than."""
    return lambda h, w, *_, **__: F.linear(h, w)


# ---- Optimizers ----


def _native_adamw() -> Callable[..., Any]:
    from torch.optim.adamw import adamw as update

    def adamw(state: Any, grad: Tensor, lr: Tensor, scale: Tensor, skip: Tensor, rates: Any) -> None:
        if state.weight.dtype != torch.float32 or state.exp_avg.dtype != torch.float32:
            raise KernelError("torch's AdamW keeps fp32 weights and moments")
        beta1, beta2 = rates.betas
        update(
            [state.weight],
            [grad.float()],
            [state.exp_avg],
            [state.exp_avg_sq],
            [],
            [state.updates],
            fused=True,
            grad_scale=scale.reciprocal(),
            found_inf=skip,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=lr,
            weight_decay=rates.weight_decay,
            eps=rates.eps,
            maximize=False,
        )
        if state.copy is not None:
            state.copy.copy_(state.weight)

    return adamw


def _native_grad_norm() -> Callable[..., Any]:
    def grad_norm(grads: Sequence[Tensor], clip: float | None = None, loss: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        norm = torch.nn.utils.get_total_norm(list(grads)).float()
        finite = torch.isfinite(norm) if loss is None else torch.isfinite(norm) & torch.isfinite(loss)
        return norm, torch.ones_like(norm) if clip is None else clip / norm.clamp(min=clip), (~finite).float()

    return grad_norm


def _flash_adamw() -> Callable[..., Any]:
    from flashoptim import FlashAdamW

    made: dict[int, Any] = {}  # an optimizer per weight that is given

    def adamw(state: Any, grad: Tensor, lr: Tensor, scale: Tensor, skip: Tensor, rates: Any) -> None:
        if (optimizer := made.get(state.weight.data_ptr())) is None:
            if state.copy is not None or grad.dtype != state.weight.dtype or rates.stochastic:
                raise KernelError(
                    "flashoptim has no copy in bf16, no gradient in another dtype than the weight's and no stochastic rounding"
                )
            if state.exp_avg.dtype not in (torch.int8, state.weight.dtype):
                raise KernelError(f"flashoptim keeps moments in int8 or in the weight's dtype, not in {state.exp_avg.dtype}")
            weight = torch.nn.Parameter(state.weight)
            weight.grad = grad
            made[state.weight.data_ptr()] = optimizer = FlashAdamW(
                [weight],
                lr=1e-3,
                betas=rates.betas,
                eps=rates.eps,
                weight_decay=rates.weight_decay,
                quantize=state.exp_avg.dtype == torch.int8,
                master_weight_bits={None: None, torch.int8: 24, torch.int16: 32}[
                    state.correction.dtype if state.correction is not None else None
                ],
            )
        optimizer.step()

    return adamw


ADAPTERS = (
    Adapter("native", "rms_norm", _native_rms_norm, "F.rms_norm", gpu=False),
    Adapter("liger", "rms_norm", _liger_rms_norm, "writes dx over dy", overwrites=True),
    Adapter("quack", "rms_norm", _quack_rms_norm),
    Adapter("liger", "add_rms_norm", _liger_add_rms_norm, "writes dx over dy", overwrites=True),
    Adapter("quack", "add_rms_norm", _quack_add_rms_norm),
    Adapter("liger", "rope", _liger_rope, "in place", overwrites=True),
    Adapter("liger", "qk_norm_rope", _liger_qk_norm_rope, "its norm, then its rope", overwrites=True),
    Adapter(
        "liger",
        "swiglu",
        functools.partial(_liger_function, "swiglu", "LigerSiLUMulFunction"),
        "writes gradients over gate and up",
        overwrites=True,
    ),
    Adapter(
        "liger",
        "geglu",
        functools.partial(_liger_function, "geglu", "LigerGELUMulFunction"),
        "writes gradients over gate and up",
        overwrites=True,
    ),
    Adapter("liger", "relu2", functools.partial(_liger_function, "relu_squared", "LigerReLUSquaredFunction")),
    Adapter("liger", "moe", _liger_moe, "reads the number of tiles on the host"),
    Adapter(
        "transformers", "moe", _transformers_moe, "grouped_mm, its default; weights in the tokens' dtype, as Qwen3 has them", gpu=False
    ),
    Adapter("native", "dropout_add", _native_dropout_add, "F.dropout and a sum, another mask", gpu=False, checked=False),
    Adapter("native", "cross_entropy", _native_cross_entropy, f"F.cross_entropy; {_LOSS_IN_BF16}", gpu=False),
    Adapter("liger", "cross_entropy", _liger_cross_entropy, f"{_IN_FORWARD}; over the logits; {_LOSS_IN_BF16}", overwrites=True),
    Adapter("quack", "cross_entropy", _quack_cross_entropy),
    Adapter("native", "linear_cross_entropy", _native_linear_cross_entropy, f"F.linear_cross_entropy in chunks; {_IN_FORWARD}", gpu=False),
    Adapter("liger", "linear_cross_entropy", _liger_linear_cross_entropy, f"{_IN_FORWARD}; sums dw in the weight's dtype"),
    Adapter("cut-cross-entropy", "linear_cross_entropy", _cut_linear_cross_entropy, "leaves out gradients of improbable tiles"),
    Adapter("quack", "linear_cross_entropy", _quack_linear_cross_entropy, _IN_FORWARD),
    Adapter(
        "native",
        "adamw",
        _native_adamw,
        "fused=True; writes over the gradient; casts of gradient and copy are passes of their own",
        gpu=False,
        overwrites=True,
        checked=False,  # the gradient afterwards would be taken for a wrong one
    ),
    Adapter("native", "grad_norm", _native_grad_norm, "get_total_norm, which rounds to the gradients' dtype", gpu=False),
    Adapter(
        "flashoptim", "adamw", _flash_adamw, "moments and corrections of its own, rate on the host, no clip factor, no skip", checked=False
    ),
    Adapter("products", "linear_cross_entropy", _products, "the matrix products alone, no loss: a floor", gpu=False, checked=False),
)


def of(op: str) -> tuple[Adapter, ...]:
    """The peers of an operation."""
    return tuple(adapter for adapter in ADAPTERS if adapter.op == op)
