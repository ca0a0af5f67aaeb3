"""The tables by which one launch reaches a whole list of tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from rkif_kernels.in_place import dense

ALIGNMENT = 16  # bytes: what a kernel may assume of every address, and the width of its accesses

TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@dataclass(frozen=True)
class Table:
    """Tensors of one combination of dtypes, and how their elements are shared out to programs.

    Attributes:
        indices: positions of these tensors in the caller's lists.
        dtypes: Triton dtype of each role; None for a role that these tensors lack.
        pointers: int64 [roles, tensors], addresses; 0 for a role that is lacking.
        numels: int64 [tensors].
        chunk_tensors: int32 [programs], which of these tensors a program works on.
        chunk_starts: int64 [programs], and from which element.
        tensors: keeps the memory behind the addresses alive.
    """

    indices: list[int]
    dtypes: list[tl.dtype | None]
    pointers: Tensor
    numels: Tensor
    chunk_tensors: Tensor
    chunk_starts: Tensor
    tensors: list[list[Tensor | None]]

    @property
    def programs(self) -> int:
        return self.chunk_starts.numel()


def tables(roles: Sequence[Sequence[Tensor | None] | None], chunk: int) -> Iterator[Table]:
    """One table for each combination of dtypes, or of lacking entries, among the lists in ``roles``.

    Empty tensors are left out.

    Tensors that are not contiguous, or not aligned, are replaced by copies: what is to be written comes
    through ``in_place`` with :data:`ALIGNMENT`.
    """
    first = roles[0]
    assert first is not None
    groups: dict[tuple[torch.dtype | None, ...], list[int]] = {}
    for index, tensor in enumerate(first):
        assert tensor is not None
        if tensor.numel() > 0:
            entries = (None if role is None else role[index] for role in roles)
            key = tuple(None if entry is None else entry.dtype for entry in entries)
            groups.setdefault(key, []).append(index)
    for dtypes, indices in groups.items():
        kept = [[_stand_in(role, index) for index in indices] for role in roles]
        device = first[indices[0]].device  # type: ignore[union-attr]
        numels = torch.tensor([first[index].numel() for index in indices])  # type: ignore[union-attr]
        pieces = (numels + chunk - 1) // chunk
        chunk_tensors = torch.repeat_interleave(torch.arange(len(indices)), pieces)
        chunk_starts = (torch.arange(len(chunk_tensors)) - (pieces.cumsum(0) - pieces)[chunk_tensors]) * chunk
        yield Table(
            indices,
            [None if dtype is None else TRITON_DTYPES[dtype] for dtype in dtypes],
            torch.tensor([[0 if t is None else t.data_ptr() for t in row] for row in kept]).to(device),
            numels.to(device),
            chunk_tensors.int().to(device),
            chunk_starts.to(device),
            kept,
        )


def _stand_in(role: Sequence[Tensor | None] | None, index: int) -> Tensor | None:
    tensor = None if role is None else role[index]
    return None if tensor is None else dense(tensor, ALIGNMENT)
