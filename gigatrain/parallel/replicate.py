"""Copies of whole weights (DDP): the flat gradient sums are added over the ranks once a step, bucket by bucket behind the last microbatch's backward.

Sums are fp32 and travel as they are; nothing is copied into buckets first, since a bucket is a stretch of the flat buffer.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from gigatrain.parallel.mesh import Mesh

BUCKET_BYTES = 1 << 25  # as large as torch's DDP has it, 25 MB: latency is hidden from there on


class Copies:
    """Sums flat gradient buffers over `replicate`."""

    def __init__(self, mesh: Mesh, buffers: Sequence[tuple[Tensor, Mapping[str, Tensor]]], bucket_bytes: int = BUCKET_BYTES) -> None:
        self.group = mesh.group("replicate")
        self.buckets: list[Tensor] = []
        self.bucket_of: dict[str, int] = {}
        for buffer, views in buffers:
            start = 0
            for name, view in views.items():
                end = view.storage_offset() + view.numel() - buffer.storage_offset()
                self.bucket_of[name] = len(self.buckets)
                if (end - start) * buffer.element_size() >= bucket_bytes:
                    self.buckets.append(buffer[start:end])
                    start = end
            if start < buffer.numel():
                self.buckets.append(buffer[start:])
        self._waiting: list[set[str]] = []
        self._works: list[Any] = []
        self.begin()

    def begin(self) -> None:
        """Before the last microbatch's backward."""
        self._waiting = [set() for _ in self.buckets]
        for name, bucket in self.bucket_of.items():
            self._waiting[bucket].add(name)
        self._works = []

    def ready(self, name: str) -> None:
        """A parameter's sum is complete on this rank; a bucket whose last one it was starts on its way."""
        waiting = self._waiting[self.bucket_of[name]]
        waiting.discard(name)
        if not waiting:
            self._start(self.bucket_of[name])

    def _start(self, bucket: int) -> None:
        self._waiting[bucket] = {"started"}
        self._works.append(distributed.all_reduce(self.buckets[bucket], group=self.group, async_op=True))

    @torch.no_grad()
    def finish(self) -> None:
        """Start what no gradient completed, in the same order on every rank, and let the stream wait for all of it."""
        for bucket, waiting in enumerate(self._waiting):
            if waiting != {"started"}:
                self._start(bucket)
        for work in self._works:
            work.wait()
