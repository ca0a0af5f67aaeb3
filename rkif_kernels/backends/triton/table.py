"""Tables of addresses with which one launch processes a whole list of tensors.

A table depends only on addresses, sizes and dtypes, which are its key in a cache. While these do not change,
a launch uploads nothing. A tensor with a new address needs a new table.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from rkif_kernels.backends.choose import capturing
from rkif_kernels.contiguous import as_contiguous

ALIGNMENT = 16  # bytes: alignment of every address, and the width of a kernel's accesses

# Triton's names of dtypes, for which kernels are compiled.
DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

Dtypes = tuple[torch.dtype | None, ...]
Rows = list[list[Tensor | None]]


@dataclass(frozen=True)
class Layout:
    """The distribution of the elements of some tensors over programs; all on the device.

    Attributes:
        numels: int64 [tensors].
        chunk_tensors: int32 [programs], index of the tensor that a program processes.
        chunk_starts: int64 [programs], the first element that it processes.
    """

    numels: Tensor
    chunk_tensors: Tensor
    chunk_starts: Tensor

    @property
    def programs(self) -> int:
        return self.chunk_starts.numel()

    @property
    def arguments(self) -> dict[str, object]:
        """The arguments of every kernel that processes chunks, by the names of its parameters."""
        return {
            "numels_ptr": self.numels,
            "chunk_tensors_ptr": self.chunk_tensors,
            "chunk_starts_ptr": self.chunk_starts,
        }


@dataclass(frozen=True)
class Table:
    """Tensors of one combination of dtypes.

    Attributes:
        dtypes: name of each role's dtype; None for a missing role.
        pointers: int64 [roles, tensors], addresses; 0 for a missing role.
        indices: int32 [tensors], indices in the caller's lists.
        firsts: int64 [tensors + 1], position of each tensor's first element in the concatenation of the
            tensors of all tables, and the end.
        numel: number of elements.
        members, sizes: the tensors' indices and numbers of elements, on the host.
        layout: distribution of the elements over programs.
    """

    dtypes: tuple[str | None, ...]
    pointers: Tensor
    indices: Tensor
    firsts: Tensor
    numel: int
    members: tuple[int, ...]
    sizes: tuple[int, ...]
    layout: Layout

    @property
    def memory(self) -> tuple[Tensor, ...]:
        """Its tensors on the device."""
        layout = self.layout
        return (
            self.pointers, self.indices, self.firsts, layout.numels, layout.chunk_tensors, layout.chunk_starts
        )  # fmt: skip

    @property
    def programs(self) -> int:
        return self.layout.programs

    @property
    def tensors(self) -> int:
        return self.indices.numel()

    @property
    def arguments(self) -> dict[str, object]:
        """The arguments of every kernel that processes chunks of its tensors."""
        return {"pointers_ptr": self.pointers, "n_tensors": self.tensors, **self.layout.arguments}


class StreamOrder:
    """Orders several CUDA streams that use the same memory.

    Args:
        device: of the memory; on a CPU there is nothing to order.
        memory: tensors that were written on the current stream.
    """

    def __init__(self, device: torch.device, memory: Sequence[Tensor]) -> None:
        self._device, self._memory = device, memory
        self._lock = threading.Lock()
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def enter(self) -> None:
        """Let the current stream wait for the stream that entered last, if it is another one.

        A capture of a CUDA graph cannot wait for work outside of it, and need not: it begins with a wait.
        """
        if self._stream is None:
            return
        current = torch.cuda.current_stream(self._device)
        with self._lock:
            if current == self._stream:
                return
            if not capturing(self._device):
                current.wait_stream(self._stream)
                self._stream = current
            for tensor in self._memory:
                tensor.record_stream(current)


def aligned(roles: Sequence[Sequence[Tensor | None] | None]) -> Rows:
    """The roles' tensors in a form that kernels can address. The caller keeps them until its last launch.

    Tensors that are not contiguous, or not aligned, are replaced by copies, so outputs must come from
    ``in_place`` with :data:`ALIGNMENT`. A role that is None gives a row of None.
    """
    first = roles[0]
    assert first is not None
    return [
        [None] * len(first)
        if role is None
        else [None if tensor is None else as_contiguous(tensor, ALIGNMENT) for tensor in role]
        for role in roles
    ]


def tables(rows: Rows, chunk: int) -> tuple[Table, ...]:
    """One table for each combination of dtypes and missing entries in ``rows`` (from :func:`aligned`).

    Empty tensors are left out.
    """
    first = [tensor for tensor in rows[0] if tensor is not None]
    made, order = _tables(
        first[0].device if first else torch.device("cpu"),
        tuple(tuple(0 if tensor is None else tensor.data_ptr() for tensor in row) for row in rows),
        tuple(tuple(None if tensor is None else tensor.dtype for tensor in row) for row in rows),
        tuple(tensor.numel() for tensor in first),
        chunk,
    )
    order.enter()
    keep_for_graph(made, rows)
    return made


def build_tables(
    device: torch.device,
    addresses: tuple[tuple[int, ...], ...],
    dtypes: tuple[Dtypes, ...],
    numels: tuple[int, ...],
    chunk: int,
) -> tuple[Table, ...]:
    """:func:`tables` without the cache; ``addresses`` and ``dtypes`` have one row per role."""
    groups: dict[Dtypes, list[int]] = {}
    for index, key in enumerate(zip(*dtypes, strict=True)):
        if numels[index] > 0:
            groups.setdefault(key, []).append(index)
    made, start = [], 0
    for key, indices in groups.items():
        sizes = tuple(numels[index] for index in indices)
        ends = _host([0, *sizes]).cumsum(0) + start
        made.append(
            Table(
                tuple(None if dtype is None else DTYPE_NAMES[dtype] for dtype in key),
                upload(_host([[row[index] for index in indices] for row in addresses]), device),
                upload(_host(indices).int(), device),
                upload(ends, device),
                sum(sizes),
                tuple(indices),
                sizes,
                layout_of(device, sizes, chunk),
            )
        )
        start += sum(sizes)
    return tuple(made)


# Gradients may alternate between a few addresses, and each learner has its own states.
@functools.lru_cache(maxsize=64)
def _tables(device: torch.device, *key: Any) -> tuple[tuple[Table, ...], StreamOrder]:
    made = build_tables(device, *key)
    return made, StreamOrder(device, [tensor for table in made for tensor in table.memory])


def layout_of(device: torch.device, numels: tuple[int, ...], chunk: int) -> Layout:
    """The distribution of some elements of each tensor over programs, ``chunk`` of a tensor per program.

    It comes from a cache, so a caller that is captured in a CUDA graph must keep it for the graph.
    """
    layout, order = _layout(device, numels, chunk)
    order.enter()
    return layout


@functools.lru_cache(maxsize=64)
def _layout(device: torch.device, numels: tuple[int, ...], chunk: int) -> tuple[Layout, StreamOrder]:
    sizes = _host(numels)
    pieces = (sizes + chunk - 1) // chunk
    tensors = torch.repeat_interleave(pieces)
    starts = (torch.arange(len(tensors), device="cpu") - (pieces.cumsum(0) - pieces)[tensors]) * chunk
    memory = upload(sizes, device), upload(tensors.int(), device), upload(starts, device)
    return Layout(*memory), StreamOrder(device, memory)


def _host(values: Sequence[object]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu")  # users may change PyTorch's defaults


def constant(device: torch.device, values: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """A small read-only tensor on the device, from a cache; see :func:`layout_of`."""
    tensor, order = _constant(device, values, dtype)
    order.enter()
    return tensor


@functools.lru_cache(maxsize=64)
def _constant(
    device: torch.device, values: tuple[float, ...], dtype: torch.dtype
) -> tuple[Tensor, StreamOrder]:
    made = upload(torch.tensor(values, dtype=dtype, device="cpu"), device)
    return made, StreamOrder(device, [made])


# Memory of tensors -> objects that CUDA graphs captured with these tensors read at each replay. The keys of
# the inner dicts are ids, so repeated captures of the same tensors add nothing.
_captured: WeakKeyDictionary[torch.UntypedStorage, dict[int, object]] = WeakKeyDictionary()


def keep_for_graph(used: object, rows: Iterable[Iterable[Tensor | None] | None]) -> None:
    """If a CUDA graph is being captured, keep ``used`` until the memory of all tensors in ``rows`` is freed.

    The caches may drop it earlier. A graph whose tensors are freed cannot be replayed any more.
    """
    tensors = (tensor for row in rows for tensor in row or () if tensor is not None)
    first = next(tensors, None)
    if first is None or not capturing(first.device):
        return
    for tensor in (first, *tensors):
        _captured.setdefault(tensor.untyped_storage(), {})[id(used)] = used


def upload(host: Tensor, device: torch.device) -> Tensor:
    """Copy to the device without waiting for it.

    Raises:
        RuntimeError: a CUDA graph is being captured; it would contain the copy but not keep its source.
    """
    if device.type != "cuda":
        return host.to(device)
    if capturing(device):
        raise RuntimeError(
            "these tensors are new to rkif, and their addresses cannot be uploaded while a CUDA graph is "
            "captured; make the same call, with the same tensors, once before the capture (tensors made in "
            "the capture itself, such as gradients, must be allocated before it)"
        )
    return host.pin_memory().to(device, non_blocking=True)
