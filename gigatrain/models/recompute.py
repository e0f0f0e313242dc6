"""What a layer does not keep for its backward, and how that is made again."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts


class _Maker:
    """Makes a dropped tensor again in the backward, once for all who saved it."""

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self.make, self.savers, self.left = make, 0, 0
        self.made: Tensor | None = None

    def tensor(self) -> Tensor:
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
        self._makers: dict[int, tuple[Tensor, _Maker]] = {}

    def drop(self, tensor: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """`tensor`, whose saved copies `make` replaces: a function of tensors that are kept anyway, of equal result and layout."""
        self._makers[tensor.untyped_storage().data_ptr()] = tensor, _Maker(make)
        return tensor

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
        whole, maker = self._makers[storage.data_ptr()]
        maker.savers += 1
        return maker, saved.shape, saved.stride(), saved.storage_offset() - whole.storage_offset()

    @staticmethod
    def _unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        maker, shape, stride, offset = packed
        made = maker.tensor()
        return made.as_strided(shape, stride, made.storage_offset() + offset)


def keep_products() -> Any:
    """Selective recomputation: the products with weights and torch's fused attention are kept, everything else is computed again."""
    aten = torch.ops.aten
    names = (
        "mm addmm _scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu "
        "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention"
    )
    kept = {getattr(aten, name).default for name in names.split() if hasattr(aten, name)}

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
