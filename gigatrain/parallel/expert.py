"""Expert parallelism: ranks along `expert` hold different experts of every layer, and tokens travel to them and back (arXiv:2006.16668, arXiv:2101.03961).

    alltoall:      rows of slots, sorted by expert -> ranks of their experts;  results -> back;  weighted sum at home
    hierarchical:  one row per token and node that has experts for it, with its weights -> that node's rank of the same place;  there the slots of this
                   node -> ranks of their experts within the node;  results -> back, weighted sum of the node;  one row back;  sum at home
    gather:        all tokens of all ranks -> every rank;  weighted sums of its own experts for all of them, in fp32;  summed and cut back to their homes

Legend: as in kernels/moe.py; P ranks (suffix p, or r) along `expert` with l = E / P experts each (expert e is on rank e // (E / P)), which for
`hierarchical` are N nodes (suffix o) of L ranks; s rows of tokens that visit a node. Nothing is dropped, and no token waits for a capacity.

In bf16, per token, layer and forward, with choices spread evenly: `alltoall` moves 4 d k (P - 1) / P bytes between ranks; `gather` 6 d (P - 1), which is
1.5 P / k times as much; `hierarchical` moves 4 d + 8 k between nodes for each other node that the token visits, of which there are
(N - 1) (1 - (1 - 1 / N)^k), instead of `alltoall`'s 4 d k (N - 1) / N, and rounds the sum of each node once more. A backward moves as much.

Sizes of what ranks exchange depend on the routing, and torch.distributed takes them from the host: `alltoall` and `hierarchical` read them once per layer and
forward (again where recomputation repeats it), the only host read within a step. `gather` reads nothing, but needs equally many tokens on every rank.
What is done to rows between two exchanges are operations of the plan's choice, `expert_sort` and `experts`, which take their counts on the device.

The gradient of an expert is whole on its rank, from the tokens of all ranks along `expert`, and is summed over the other data axes. Each rank along
`tensor` and `context` sends its own tokens to its own group: experts are whole there, and their gradients partial like a norm's.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn

from gigatrain.kernels import moe
from gigatrain.kernels.ops import Ops
from gigatrain.parallel.mesh import Mesh
from gigatrain.parallel.places import Places, cut_parameter

Form = Literal["alltoall", "hierarchical", "gather"]


@dataclass(frozen=True)
class Peers:
    """Ranks that exchange rows; `group` None: this one alone."""

    group: distributed.ProcessGroup | None
    count: int
    index: int


def _received(x: Tensor, send: Sequence[int] | None, receive: Sequence[int] | None, peers: Peers) -> Tensor:
    if peers.group is None:
        return x
    rows = x.shape[0] if receive is None else sum(receive)
    out = x.new_empty(rows, *x.shape[1:])
    distributed.all_to_all_single(
        out,
        x.contiguous(),
        None if receive is None else list(receive),
        None if send is None else list(send),
        group=peers.group,
    )
    return out


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, send: Sequence[int], receive: Sequence[int], peers: Peers) -> Tensor:
        ctx.way = receive, send, peers
        return _received(x, send, receive, peers)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _received(grad, *ctx.way), None, None, None


def exchange(x: Tensor, send: Sequence[int], receive: Sequence[int], peers: Peers) -> Tensor:
    """The first `send[0]` rows go to the first rank, and so on; what comes stands rank by rank, `receive[r]` rows from rank r."""
    return x if peers.group is None else _Exchange.apply(x, send, receive, peers)  # type: ignore[return-value]


def _scattered(x_pnd: Tensor, peers: Peers) -> Tensor:
    out = x_pnd.new_empty(x_pnd.shape[1:])
    distributed.reduce_scatter_tensor(out, x_pnd.contiguous().flatten(0, 1), group=peers.group)
    return out


def _gathered(x_nd: Tensor, peers: Peers) -> Tensor:
    out = x_nd.new_empty(peers.count, *x_nd.shape)
    distributed.all_gather_into_tensor(out.flatten(0, 1), x_nd.contiguous(), group=peers.group)
    return out


class _Gather(torch.autograd.Function):
    """Every rank's tokens, [p, n, d]; the gradients of all ranks are summed in at least fp32."""

    @staticmethod
    def forward(ctx: Any, x_nd: Tensor, peers: Peers) -> Tensor:
        ctx.peers = peers
        return _gathered(x_nd, peers)

    @staticmethod
    def backward(ctx: Any, grad_pnd: Tensor) -> Any:
        return _scattered(grad_pnd.to(torch.promote_types(grad_pnd.dtype, torch.float32)), ctx.peers).to(grad_pnd.dtype), None


class _Scatter(torch.autograd.Function):
    """This rank's tokens of the sum over the ranks of [p, n, d], rounded to `dtype`, in which the gradient travels back."""

    @staticmethod
    def forward(ctx: Any, x_pnd: Tensor, dtype: torch.dtype, peers: Peers) -> Tensor:
        ctx.peers, ctx.dtype = peers, x_pnd.dtype
        return _scattered(x_pnd, peers).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad_nd: Tensor) -> Any:
        return _gathered(grad_nd, ctx.peers).to(ctx.dtype), None, None


def _on_host(counts: Sequence[Tensor], rows: Sequence[int]) -> list[list[int]]:
    """The counts as numbers, by one read; without values (a dry run), `rows` of each, shared out evenly."""
    if counts[0].is_meta or isinstance(counts[0], torch._subclasses.FakeTensor):
        return [[(i + 1) * n // len(c) - i * n // len(c) for i in range(len(c))] for c, n in zip(counts, rows, strict=True)]
    flat: list[int] = torch.cat(list(counts)).tolist()
    ends = [sum(len(c) for c in counts[: i + 1]) for i in range(len(counts))]
    return [flat[end - len(c) : end] for c, end in zip(counts, ends, strict=True)]


def _visited(ops: Ops, x_md: Tensor, arrived_rl: Tensor, gate_up_lfd: Tensor, down_ldi: Tensor, rest: Mapping[str, Any]) -> Tensor:
    """What this rank's experts make of rows that stand rank by rank and, within each, expert by expert; in the same order."""
    ranks, local = arrived_rl.shape
    keys_m = torch.arange(local, device=x_md.device).repeat(ranks).repeat_interleave(arrived_rl.flatten(), output_size=x_md.shape[0])
    order_m, counts_l = ops.expert_sort(keys_m, local)
    y_md = ops.experts(moe.gather(x_md, order_m, 1), counts_l, gate_up_lfd, down_ldi, **rest)
    return moe.spread(y_md, order_m, x_md.shape[0])


def _alltoall(
    ops: Ops,
    peers: Peers,
    x_nd: Tensor,
    weights_nk: Tensor,
    chosen_nk: Tensor,
    gate_up_lfd: Tensor,
    down_ldi: Tensor,
    **rest: Any,
) -> Tensor:
    order_m, counts_e = ops.expert_sort(chosen_nk, peers.count * gate_up_lfd.shape[0])
    counts_rl = counts_e.view(peers.count, -1)
    arrived_rl = _received(counts_rl, None, None, peers)
    send, receive = _on_host((counts_rl.sum(1), arrived_rl.sum(1)), (chosen_nk.numel(),) * 2)
    x_md = exchange(moe.gather(x_nd, order_m, chosen_nk.shape[-1]), send, receive, peers)
    y_md = exchange(_visited(ops, x_md, arrived_rl, gate_up_lfd, down_ldi, rest), receive, send, peers)
    return moe.combine(y_md, order_m, weights_nk)


def _hierarchical(
    ops: Ops,
    nodes: Peers,
    inside: Peers,
    x_nd: Tensor,
    weights_nk: Tensor,
    chosen_nk: Tensor,
    gate_up_lfd: Tensor,
    down_ldi: Tensor,
    **rest: Any,
) -> Tensor:
    shape, visits, tokens = chosen_nk.shape[:-1], chosen_nk.shape[-1], chosen_nk.shape[:-1].numel()
    local = gate_up_lfd.shape[0]
    here = inside.count * local  # experts of a node
    # A row for every node that a token visits: slot n N + node.
    visited_no = torch.zeros(*shape, nodes.count, dtype=torch.bool, device=x_nd.device).scatter_(-1, chosen_nk // here, True)
    node_o = torch.arange(nodes.count, device=x_nd.device)
    order_s, rows_o = ops.expert_sort(node_o.where(visited_no, nodes.count), nodes.count)
    slots_oe = ops.expert_sort(chosen_nk, nodes.count * here)[1].view(nodes.count, here)
    arrived_o = _received(torch.cat((rows_o[:, None], slots_oe), 1), None, None, nodes)
    slots_rl = arrived_o[:, 1:].sum(0).view(inside.count, local)
    arrived_rl = _received(slots_rl, None, None, inside)
    rows = tokens * min(visits, nodes.count)
    send, receive, send_in, receive_in = _on_host(
        (rows_o, arrived_o[:, 0], slots_rl.sum(1), arrived_rl.sum(1)), (rows, rows, tokens * visits, tokens * visits)
    )
    order_s = order_s[: sum(send)]
    x_sd = exchange(moe.gather(x_nd, order_s, nodes.count), send, receive, nodes)
    # Weights, and experts as numbers of the weights' dtype, which holds them exactly: one message.
    both = moe.gather(torch.cat((weights_nk, chosen_nk.to(weights_nk.dtype)), -1), order_s, nodes.count)
    weights_sk, chosen_sk = exchange(both, send, receive, nodes).chunk(2, 1)
    keys_sk = chosen_sk.detach().long() - nodes.index * here
    order_m = ops.expert_sort(keys_sk.where((keys_sk >= 0) & (keys_sk < here), here), here)[0][: sum(send_in)]
    x_md = exchange(moe.gather(x_sd, order_m, visits), send_in, receive_in, inside)
    y_md = exchange(_visited(ops, x_md, arrived_rl, gate_up_lfd, down_ldi, rest), receive_in, send_in, inside)
    y_sd = exchange(moe.combine(y_md, order_m, weights_sk), receive, send, nodes)
    return moe.combine(y_sd, order_s, weights_nk.new_ones(*shape, nodes.count))


def _gather(
    ops: Ops,
    peers: Peers,
    x_nd: Tensor,
    weights_nk: Tensor,
    chosen_nk: Tensor,
    gate_up_lfd: Tensor,
    down_ldi: Tensor,
    **rest: Any,
) -> Tensor:
    local, visits = gate_up_lfd.shape[0], chosen_nk.shape[-1]
    x_pnd: Tensor = _Gather.apply(x_nd, peers)  # type: ignore[assignment]
    weights_pnk: Tensor = _Gather.apply(weights_nk, peers)  # type: ignore[assignment]
    keys_pnk = _gathered(chosen_nk, peers) - peers.index * local
    order_m, counts_l = ops.expert_sort(keys_pnk.where((keys_pnk >= 0) & (keys_pnk < local), local), local)
    # As many rows as there can be at most; those behind the last that there is are undefined, also in the backward, and are masked on both sides.
    order_m = order_m[: keys_pnk.shape[:-1].numel() * min(visits, local)]
    exists_m1 = (torch.arange(order_m.shape[0], device=x_nd.device) < counts_l.sum())[:, None]
    x_md = torch.where(exists_m1, moe.gather(x_pnd, order_m, visits), 0)
    y_md = torch.where(exists_m1, ops.experts(x_md, counts_l, gate_up_lfd, down_ldi, **rest), 0)
    y_pnd = moe.combine(y_md, order_m, weights_pnk, weights_pnk.dtype)
    return _Scatter.apply(y_pnd, x_nd.dtype, peers)  # type: ignore[return-value]


def dispatched(ops: Ops, mesh: Mesh, form: Form, ranks_per_node: int) -> Ops:
    """The operations with `moe` replaced by one whose experts are spread over the mesh's `expert` axis; `ops` itself where that has one rank.

    Makes process groups, so that all ranks along `expert` call it alike. `ranks_per_node` (LOCAL_WORLD_SIZE) matters to `hierarchical` alone.
    """
    if mesh.size("expert") == 1:
        return ops
    if form == "hierarchical":
        run: Callable[..., Tensor] = partial(_hierarchical, ops, *_levels(mesh, ranks_per_node))
    else:
        peers = Peers(mesh.group("expert"), mesh.size("expert"), mesh.index("expert"))
        run = partial({"alltoall": _alltoall, "gather": _gather}[form], ops, peers)
    return replace(ops, moe=run)


def _levels(mesh: Mesh, ranks_per_node: int) -> tuple[Peers, Peers]:
    """Of the ranks along `expert`: those of the same place in other nodes, and those of the same node."""
    ranks = mesh.ranks("expert")
    inner = math.gcd(len(ranks), sum(rank // ranks_per_node == mesh.rank // ranks_per_node for rank in ranks))
    nodes = [ranks[at : at + inner] for at in range(0, len(ranks), inner)]
    assert all(len({rank // ranks_per_node for rank in node}) == 1 for node in nodes), "refused by the plan"
    at, place = divmod(mesh.index("expert"), inner)
    return _peers([node[place] for node in nodes], at), _peers(nodes[at], place)


def _peers(ranks: list[int], index: int) -> Peers:
    if len(ranks) == 1:
        return Peers(None, 1, 0)
    group = distributed.new_group(ranks, use_local_synchronization=True)
    assert isinstance(group, distributed.ProcessGroup)
    return Peers(group, len(ranks), index)


def cut(model: nn.Module, names: Iterable[str], mesh: Mesh, places: Places) -> None:
    """Leave this rank's experts of each parameter in `names`, those of experts [E, ...], and say so in `places`."""
    count, index = mesh.size("expert"), mesh.index("expert")
    if count == 1:
        return
    for name in names:
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        experts = getattr(module, leaf).shape[0]
        assert experts % count == 0, "refused by the plan"
        cut_parameter(module, leaf, 0, index * (experts // count), experts // count)
        places[name] = places[name].cut(0, index * (experts // count), experts // count)
