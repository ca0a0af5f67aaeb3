"""Copies of the parameters at one moment, on their device or in host memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from rkif.fuser.parameters import aligned_starts
from rkif_kernels import Views

# Elements that are copied between host and device at a time, unless one tensor has more. 64 MiB of float32
# take about a millisecond, which is long compared with a launch, and are a small part of a device's memory.
GROUP_NUMEL = 1 << 24
# A snapshot of at most so many bytes keeps its memory while it is not in use: that of an adapter is smaller.
KEPT_BYTES = 1 << 27


def groups(sizes: Sequence[int]) -> list[range]:
    """Group consecutive tensors: at most GROUP_NUMEL elements per group, or only one tensor with elements."""
    starts, held = [0], 0
    for index, size in enumerate(sizes):
        if held and held + size > GROUP_NUMEL:
            starts.append(index)
            held = 0
        held += size
    return [range(*ends) for ends in pairwise([*starts, len(sizes)])]


def keeps_memory(size: float) -> bool:
    """Whether a snapshot of ``size`` bytes keeps its memory in every phase."""
    return size <= KEPT_BYTES


class Snapshot:
    """Copies of a list of tensors, in few allocations; uninitialised at first.

    Args:
        like: the tensors, which give shapes and device.
        dtypes: dtypes of the copies, one per tensor.
        offload: keep the copies in host memory. If the tensors are on a GPU, this memory is pinned, and a
            separate stream copies to it.

    Attributes:
        tensors: the copies.
        device: device of the tensors that are copied.
        dtypes: dtypes of the copies.
        offloaded: whether the copies are on another device than the tensors.
    """

    def __init__(self, like: Sequence[Tensor], dtypes: Sequence[torch.dtype], *, offload: bool) -> None:
        self.device, self.dtypes = like[0].device, list(dtypes)
        self.offloaded = offload and self.device.type == "cuda"
        device = torch.device("cpu") if offload else self.device
        with torch.inference_mode(False):  # later rounds write to the copies outside of inference mode
            self._arenas, self.tensors = _arenas(like, dtypes, device, pin_memory=self.offloaded)
        self._stream: Any = torch.cuda.Stream(self.device) if self.offloaded else None  # type: ignore[no-untyped-call]

    def free(self) -> None:
        """Free the memory until :meth:`allocate`.

        Small memory is kept, so that the copies of all rounds have few addresses, which a fusion plan
        recognises. Pinned memory is kept because its allocation is slow.
        """
        if not keeps_memory(sum(arena.nbytes for arena in self._arenas)):
            self._resize(0)

    def allocate(self) -> None:
        """Allocate the memory that :meth:`free` has freed, uninitialised."""
        self._resize(1)

    def _resize(self, share: int) -> None:
        for arena in () if self.offloaded else self._arenas:
            size = share * arena.nbytes
            if arena.untyped_storage().nbytes() != size:
                arena.untyped_storage().resize_(size)

    def scratch(self, indices: Iterable[int]) -> list[Tensor]:
        """Memory on the tensors' device for values of :meth:`copy_from`: the copies, or new if offloaded."""
        copies = [self.tensors[index] for index in indices]
        return [torch.empty_like(t, device=self.device) for t in copies] if self.offloaded else copies

    @torch.no_grad()
    def copy_from(self, indices: Iterable[int], values: Sequence[Tensor]) -> None:
        """Copy ``values`` from the tensors' device; they must not change before :meth:`wait_stream`."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            for index, value in zip(indices, values, strict=True):
                if value is self.tensors[index]:
                    continue
                self.tensors[index].copy_(value, non_blocking=self.offloaded)
                if self._stream is not None:
                    value.record_stream(self._stream)

    def wait_stream(self) -> None:
        """Make the device's current stream wait for all copies."""
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)

    def synchronize(self) -> None:
        """Make the host wait for all copies: call it before the host reads :attr:`tensors`."""
        if self._stream is not None:
            self._stream.synchronize()

    @torch.no_grad()
    def copy_to(self, targets: Sequence[Tensor]) -> None:
        """Copy all tensors to ``targets``, rounding where a target's dtype is narrower."""
        self.wait_stream()
        torch._foreach_copy_(list(targets), list(self.tensors), non_blocking=self.offloaded)

    def on_device(self, indices: range) -> list[Tensor]:
        """Some of the copies on :attr:`device`: the tensors themselves unless they are offloaded."""
        return [self.tensors[index].to(self.device, non_blocking=self.offloaded) for index in indices]


class SnapshotPool:
    """Reuses snapshots of the same tensors. One that is put back keeps its views, but not large memory."""

    def __init__(self, *, offload: bool) -> None:
        self._offload = offload
        self._free: list[Snapshot] = []

    def take(
        self, like: Sequence[Tensor], dtypes: Sequence[torch.dtype], values: Sequence[Tensor] | None = None
    ) -> Snapshot:
        """A snapshot of ``values``, or uninitialised. ``like`` has the same shapes in every call."""
        snapshot = next((free for free in self._free if free.dtypes == dtypes), None)
        if snapshot is None:
            snapshot = Snapshot(like, dtypes, offload=self._offload)
        else:
            self._free.remove(snapshot)
            snapshot.allocate()
        if values is not None:
            with self.put_back_on_failure(snapshot):
                snapshot.copy_from(range(len(values)), [value.detach() for value in values])
        return snapshot

    @contextmanager
    def put_back_on_failure(self, snapshot: Snapshot) -> Iterator[None]:
        """Put a snapshot back if the block raises, because a fusion plan can keep its tensors alive."""
        try:
            yield
        except BaseException:
            self.put_back(snapshot)
            raise

    def put_back(self, snapshot: Snapshot | None) -> None:
        """Free a snapshot, if there is one, for the next :meth:`take`. Its tensors must not be used then."""
        if snapshot is not None:
            snapshot.free()
            self._free.append(snapshot)


def iter_groups(snapshots: Sequence[Snapshot]) -> Iterator[tuple[range, list[list[Tensor]]]]:
    """Yield each group's indices and the snapshots' tensors on the device; the next group is being copied."""
    indices = groups([tensor.numel() for tensor in snapshots[0].tensors])
    offloaded = [snapshot for snapshot in snapshots if snapshot.offloaded]
    if not offloaded:
        for group in indices:
            yield group, [snapshot.on_device(group) for snapshot in snapshots]
        return
    device = offloaded[0].device
    stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    for snapshot in offloaded:
        snapshot.wait_stream()
    stream.wait_stream(torch.cuda.current_stream(device))

    def fetch(group: range) -> tuple[range, list[list[Tensor]], Any]:
        with torch.cuda.stream(stream):
            fetched = [snapshot.on_device(group) for snapshot in snapshots]
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(stream)
        return group, fetched, event

    ahead = fetch(indices[0])
    for following in (*indices[1:], None):
        group, fetched, event = ahead
        if following is not None:
            ahead = fetch(following)
        current = torch.cuda.current_stream(device)
        current.wait_event(event)
        for snapshot, tensors in zip(snapshots, fetched, strict=True):
            for tensor in tensors if snapshot.offloaded else ():
                tensor.record_stream(current)
        yield group, fetched


def _arenas(
    like: Sequence[Tensor], dtypes: Sequence[torch.dtype], device: torch.device, *, pin_memory: bool
) -> tuple[list[Tensor], Sequence[Tensor]]:
    """Flat tensors, and dense views of them, each of which starts on a 64-byte boundary.

    Small memory is one flat tensor for each dtype. Large memory is allocated in groups: the allocator may
    have no free block for the whole, and the size of pinned memory is rounded up to a power of two.
    """
    sizes = [tensor.numel() for tensor in like]
    total = sum(size * dtype.itemsize for size, dtype in zip(sizes, dtypes, strict=True))
    arenas: list[Tensor] = []
    views: list[Tensor] = [like[0]] * len(like)
    for indices in [range(len(sizes))] if keeps_memory(total) else groups(sizes):
        for dtype in dict.fromkeys(dtypes[index] for index in indices):
            of_dtype = [index for index in indices if dtypes[index] == dtype]
            starts, size = aligned_starts([sizes[index] for index in of_dtype], dtype)
            flat = torch.empty(size, dtype=dtype, device=device, pin_memory=pin_memory)
            arenas.append(flat)
            for index, start in zip(of_dtype, starts, strict=True):
                views[index] = flat.as_strided(like[index].shape, _dense_strides(like[index]), start)
    return arenas, Views.of(arenas[0], views) if len(arenas) == 1 else views


def _dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides of a copy as PyTorch makes it: those of the tensor where it has no gaps."""
    return torch.empty_like(tensor, device="meta").stride()
