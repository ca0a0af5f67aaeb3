"""Accesses outside the tensors of a launch, those of its pointer table included.

ttsem alone knows only the tensors among a launch's arguments, but rkif's kernels reach tensors by addresses
in a table. Kernels access the memory of the CPU tensors themselves, so tensors that share memory
behave as on a GPU.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch
import triton.language as tl

from sanitizer.speed import FastMemory


class BoundedMemory(FastMemory):
    """The memory of some tensors; any other access is a fault.

    Args:
        tensors: address and number of bytes of each.
    """

    def __init__(self, tensors: list[tuple[int, int]]) -> None:
        super().__init__()
        self._given = {first for first, _ in tensors}
        merged: list[list[int]] = []
        for first, size in sorted(tensors):  # overlapping extents are merged; adjacent extents are not
            if merged and first < merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], first + size)
            else:
                merged.append([first, first + size])
        for first, end in merged:
            memory = (ctypes.c_uint8 * (end - first)).from_address(first)
            super().register(first, np.ctypeslib.as_array(memory))

    def register(self, base: int, array: Any) -> None:
        """Ignore ttsem's copies of tensors that are already there."""
        if int(base) not in self._given:
            super().register(base, array)


def own_bytes(tensor: torch.Tensor) -> tuple[int, Any]:
    """Address and size of a tensor, not of its storage: an access outside a view is a fault.

    The size is that of an array without memory of its own; kernels access the tensor itself.
    """
    assert tensor.is_contiguous()
    return int(tensor.data_ptr()), np.broadcast_to(np.zeros((), f"u{tensor.itemsize}"), tensor.numel())


def extents(record: Any) -> list[tuple[int, int]]:
    """Address and number of bytes of each tensor that a launch may access.

    The tensors of its table are added to ``record``, which names them in messages.
    """
    arguments = record.bound
    if "pointers_ptr" in arguments:
        pointers, (numels, begins) = arguments["pointers_ptr"].tolist(), _elements(arguments)
        for role, (dtype, row) in enumerate(zip(arguments["DTYPES"], pointers, strict=True)):
            if dtype is None:
                continue
            width = tl.dtype(dtype).primitive_bitwidth // 8
            for index, (address, numel, begin) in enumerate(zip(row, numels, begins, strict=True)):
                name = f"role {role}, tensor {index} of the table"
                record.bases[name] = address + begin * width
                record.pre[name] = np.zeros(numel - begin, f"u{width}")
    return [(base, record.pre[name].nbytes) for name, base in record.bases.items()]


def _elements(arguments: Any) -> tuple[list[int], list[int]]:
    """For each tensor of a table, its number of elements, and the first that any program owns."""
    if "numels_ptr" not in arguments:  # a kernel that samples
        numels = arguments["firsts_ptr"].diff().tolist()
        return numels, [0] * len(numels)
    tensors, starts = arguments["chunk_tensors_ptr"], arguments["chunk_starts_ptr"]
    numels = arguments["numels_ptr"].tolist()
    return numels, [int(starts[tensors == index].min()) for index in range(len(numels))]
