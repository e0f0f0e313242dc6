"""What a layer does not keep for its backward, and how that is made again."""

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts


class _Maker:
    """Makes dropped tensors again in the backward, once for all who saved one of them."""

    def __init__(self, make: Callable[[], Sequence[Tensor]]) -> None:
        self.make, self.savers, self.left = make, 0, 0
        self.made: Sequence[Tensor] | None = None

    def tensors(self) -> Sequence[Tensor]:
        if self.made is None:
            with torch.no_grad():
                self.made = self.make()
            self.left = self.savers
        made, self.left = self.made, self.left - 1
        if self.left == 0:
            self.made = None
        return made


class Remade(torch.autograd.graph.saved_tensors_hooks):
    """Within it, what autograd saves is dropped where `drop` has said how to make it again.

    Tensors are recognised by their storage, which lives until the context ends, so that no later tensor can take its address.
    """

    def __init__(self) -> None:
        super().__init__(self._pack, self._unpack)
        self._makers: dict[int, tuple[Tensor, int, _Maker]] = {}

    def drop(self, tensors: Sequence[Tensor], make: Callable[[], Sequence[Tensor]]) -> None:
        """Replace saved copies of `tensors` by what `make` returns: functions of tensors that are kept anyway, of equal layout."""
        maker = _Maker(make)
        for index, tensor in enumerate(tensors):
            if tensor.numel():  # empty ones all have the same address
                self._makers[tensor.untyped_storage().data_ptr()] = tensor, index, maker

    def __enter__(self) -> Self:  # torch's own returns nothing
        super().__enter__()
        return self

    def __exit__(self, *failure: Any) -> None:
        super().__exit__(*failure)
        self._makers.clear()

    def _pack(self, saved: Tensor) -> Any:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in self._makers:
            return saved
        whole, index, maker = self._makers[storage.data_ptr()]
        maker.savers += 1
        return maker, index, saved.shape, saved.stride(), saved.storage_offset() - whole.storage_offset()

    @staticmethod
    def _unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        maker, index, shape, stride, offset = packed
        made = maker.tensors()[index]
        return made.as_strided(shape, stride, made.storage_offset() + offset)


def keep_products() -> Any:
    """Selective recomputation: the products with weights and torch's fused attention are kept, everything else is computed again."""
    aten = torch.ops.aten
    names = (
        "mm addmm _grouped_mm _scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu "
        "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention"
    )
    kept = {getattr(aten, name).default for name in names.split() if hasattr(aten, name)}
    kept |= {torch.ops.gigatrain.moe.default, torch.ops.gigatrain.experts.default}  # products first of all

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
