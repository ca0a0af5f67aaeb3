"""Copies of the parameters at one moment, on their device or in the host's memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

# Elements that are in flight between host and device at a time, unless one tensor has more: 64 MiB of float32
# take a millisecond to copy, long against a launch and short against memory.
TURN = 1 << 24


def turns(sizes: Sequence[int]) -> list[range]:
    """Neighbouring tensors, by number: at most TURN elements together, or one tensor and empty ones."""
    starts, held = [0], 0
    for index, size in enumerate(sizes):
        if held and held + size > TURN:
            starts.append(index)
            held = 0
        held += size
    return [range(*ends) for ends in pairwise([*starts, len(sizes)])]


class Snapshot:
    """Room for a copy of each of some tensors.

    Args:
        like: the tensors, which give shapes and device.
        dtypes: of the copies, one a tensor.
        offload: keep them in the host's memory: pinned where the tensors are on a GPU, to and from which
            they are then copied beside its other work.

    Attributes:
        tensors: the copies, where they lie.
        device: where the tensors are that they are copies of.
        away: whether they lie on another device.
    """

    def __init__(self, like: Sequence[Tensor], dtypes: Sequence[torch.dtype], *, offload: bool) -> None:
        self.device = like[0].device
        self.away = offload and self.device.type == "cuda"
        device = torch.device("cpu") if offload else self.device
        with torch.inference_mode(False):  # whatever the caller's mode is, later rounds write to them
            self.tensors = [
                torch.empty_strided(
                    t.shape, _dense_strides(t), dtype=dtype, device=device, pin_memory=self.away
                )
                for t, dtype in zip(like, dtypes, strict=True)
            ]
        self._stream: Any = torch.cuda.Stream(self.device) if self.away else None  # type: ignore[no-untyped-call]

    def room(self, numbers: Iterable[int]) -> list[Tensor]:
        """Where to compute what is to be :meth:`put`: in place, unless the copies lie away."""
        own = [self.tensors[number] for number in numbers]
        return [torch.empty_like(t, device=self.device) for t in own] if self.away else own

    @torch.no_grad()
    def put(self, numbers: Iterable[int], values: Sequence[Tensor]) -> None:
        """Take copies of values on the tensors' device, which must not change before :meth:`settle`."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            for number, value in zip(numbers, values, strict=True):
                if value is self.tensors[number]:
                    continue
                self.tensors[number].copy_(value, non_blocking=self.away)
                if self._stream is not None:
                    value.record_stream(self._stream)

    def settle(self) -> None:
        """Let what the device does from now on wait until all copies have been taken."""
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)

    def settle_host(self) -> None:
        """Wait until all copies have been taken: before the host reads :attr:`tensors`."""
        if self._stream is not None:
            self._stream.synchronize()

    @torch.no_grad()
    def give(self, targets: Sequence[Tensor]) -> None:
        """Copy back, with rounding where the targets' dtype is another."""
        self.settle()
        for target, tensor in zip(targets, self.tensors, strict=True):
            target.copy_(tensor, non_blocking=self.away)

    def on_device(self, numbers: range) -> list[Tensor]:
        """Some of the copies, where the parameters are: they themselves unless they lie away."""
        return [self.tensors[number].to(self.device, non_blocking=self.away) for number in numbers]


def in_turns(snapshots: Sequence[Snapshot]) -> Iterator[tuple[range, list[list[Tensor]]]]:
    """Yield some tensors' numbers and what each snapshot has of them, on the device, while the next come."""
    numbers = turns([tensor.numel() for tensor in snapshots[0].tensors])
    away = [snapshot for snapshot in snapshots if snapshot.away]
    if not away:
        for turn in numbers:
            yield turn, [snapshot.on_device(turn) for snapshot in snapshots]
        return
    device = away[0].device
    stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    for snapshot in away:
        snapshot.settle()
    stream.wait_stream(torch.cuda.current_stream(device))

    def fetch(turn: range) -> tuple[range, list[list[Tensor]], Any]:
        with torch.cuda.stream(stream):
            found = [snapshot.on_device(turn) for snapshot in snapshots]
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(stream)
        return turn, found, event

    ahead = fetch(numbers[0])
    for following in (*numbers[1:], None):
        turn, found, event = ahead
        if following is not None:
            ahead = fetch(following)
        current = torch.cuda.current_stream(device)
        current.wait_event(event)
        for snapshot, tensors in zip(snapshots, found, strict=True):
            for tensor in tensors if snapshot.away else ():
                tensor.record_stream(current)
        yield turn, found


def _dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides of a copy as PyTorch makes it: those of the tensor where it has no gaps."""
    return torch.empty_like(tensor, device="meta").stride()
