"""Layers with the same input as one product, by their place in memory alone: parameters keep their names, shapes and owners.

Whoever lays out the weights (engines/native.py) puts those of a set end to end. The decoder then reads the stretch as one matrix (kernels/linear.py's
`several`), while init, loading, checkpoints, export, weight decay and Muon go on to know the matrices one by one, as views. A cut (parallel/tensor.py)
comes before: each rank joins its own heads. Key heads that several ranks share are not parameters of this rank alone, and stay apart.
"""

from collections.abc import Iterator

from torch import Tensor, nn

from gigatrain.kernels.linear import Joined, Linear

# By the name of their owner; those that come later are the ones kept for the backward while the first are only passed through.
SETS = {"self_attn": ("q_proj", "k_proj", "v_proj"), "mlp": ("gate_proj", "up_proj")}


def sets(model: nn.Module) -> Iterator[tuple[str, ...]]:
    """Names of the layers that can be one product, set by set in the order of their rows."""
    for name, module in model.named_modules():
        leaves = SETS.get(name.rpartition(".")[2], ())
        if leaves and all(type(getattr(module, leaf, None)) is Linear for leaf in leaves):
            yield tuple(f"{name}.{leaf}" for leaf in leaves)


def spanning(views: list[Tensor]) -> Tensor:
    """One matrix over matrices that lie end to end in one buffer."""
    first, rows = views[0], sum(view.shape[0] for view in views)
    at = first.storage_offset()
    for view in views:
        assert view.is_contiguous()
        assert view.storage_offset() == at, "parameters of one kind lie in the order of their names"
        at += view.numel()
    return first.as_strided((rows, first.shape[1]), first.stride())


def join(model: nn.Module, names: tuple[str, ...], whole_od: Tensor) -> None:
    """Let the layers of a set be one product of `whole_od`, which their weights are views of."""
    owner, _, last = names[-1].rpartition(".")
    first = model.get_submodule(names[0])
    assert isinstance(first, Linear)
    # Attention keeps its values, but not what queries and keys were before their rotation, unless a norm keeps that.
    apart = (len(names) - 1,) if last == "v_proj" and not hasattr(model.get_submodule(owner), "q_norm") else ()
    first.joined = Joined(
        whole_od.data, first.product, apart
    )  # data: other weights of the buffer may change while this one is kept for a backward
