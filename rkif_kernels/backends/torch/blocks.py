"""Iteration over lists of tensors in blocks, with scratch memory of constant size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rkif_kernels.contiguous import as_contiguous

# Number of elements. Six float32 streams of a block are 1.5 MiB, about the size of two cores' L2 caches. A
# block is two of PyTorch's grains of 32,768 elements, so two cores can share it.
BLOCK = 1 << 16


class Scratch:
    """Buffers of one block each, addressed by slot and allocated once per call of an operation."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[tuple[int, torch.dtype], Tensor] = {}

    def __call__(self, slot: int, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        key = (slot, dtype)
        if key not in self._buffers:
            self._buffers[key] = torch.empty(BLOCK, dtype=dtype, device=self._device)
        return self._buffers[key][:size]

    def float32(self, block: Tensor, slot: int) -> Tensor:
        """``block`` itself if it is float32, else a float32 copy of it in a buffer."""
        return block if block.dtype == torch.float32 else self(slot, block.numel()).copy_(block)


def blocks(*roles: Sequence[Tensor | None] | None) -> Iterator[tuple[int, tuple[Tensor | None, ...]]]:
    """Yield (tensor index, one block of at most BLOCK elements of every role), in order.

    A role that is None, or holds None for a tensor, yields None. Blocks are views of the tensors if they are
    contiguous, otherwise of copies, so outputs must come from ``in_place``.
    """
    first = roles[0]
    assert first is not None
    for index in range(len(first)):
        tensors = (None if role is None else role[index] for role in roles)
        flat = [None if tensor is None else as_contiguous(tensor).view(-1) for tensor in tensors]
        size = flat[0].numel() if flat[0] is not None else 0
        for start in range(0, size, BLOCK):
            yield index, tuple(None if t is None else t[start : start + BLOCK] for t in flat)
