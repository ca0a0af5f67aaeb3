"""What a method has to know of all elements before it can fuse one: found in passes over the chunks.

Every scan can be written down after any chunk and taken up again, and holds memory that does not depend on
how many elements there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor

import rkif_kernels
from rkif.checkpoint import layout
from rkif.checkpoint.layout import Chunk, runs
from rkif.checkpoint.methods import EVERYTHING, NOTHING, Method, ScanResult, TaskArithmetic
from rkif.checkpoint.tiles import Tile
from rkif.distributed.process_group import ProcessGroup
from rkif_kernels import CountingSearch, CountingSearches, Scores

Sides = tuple[Scores, Scores]
Guess = Callable[[], tuple[tuple[float, float], tuple[float, float]]]


class Scan(Protocol):
    """Passes over chunks: until ``next_pass()`` is None, observe each of its chunks, then ``end_pass()``."""

    def next_pass(self) -> range | None:
        """The chunks to go over next, none of them perhaps; None when everything is known."""

    def observe(self, tile: Tile, scores: Sides) -> bool:
        """Take in a part of a chunk; returns whether its values are valid: finite, no score negative."""

    def end_pass(self) -> None:
        """All of the pass's chunks have been observed."""

    @property
    def passes(self) -> int:
        """Passes done at whose end the processes waited for each other: they must be at the same one."""

    def state(self) -> dict[str, Tensor]:
        """Copies of what :meth:`restore` needs."""

    def restore(self, state: dict[str, Tensor]) -> None: ...

    def result(self) -> ScanResult: ...


def make_scan(
    method: Method,
    tensors: Sequence[layout.Tensor],
    chunks: Sequence[Chunk],
    guess: Guess,
    *,
    own: range,
    processes: ProcessGroup,
) -> Scan:
    """The scan that a method needs.

    Args:
        guess: for each side two scores between which a global threshold probably lies.
        own: the chunks that this process goes over.
        processes: the processes; their counts are summed at the end of a pass, or in :meth:`result`.
    """
    if method.scope == "global" and method.needs_threshold:
        numel = sum(tensor.target.numel for tensor in tensors if tensor.fused)
        return GlobalThresholds(method, numel, own, guess, processes)
    if method.scope is not None:
        return TensorThresholds(method, tensors, chunks, own, processes)
    if method.rescales:
        return Scales(cast(TaskArithmetic, method), len(tensors), own, processes)
    return NoScan()


class NoScan:
    """For a method that needs to know nothing."""

    def next_pass(self) -> range | None:
        return None

    def observe(self, tile: Tile, scores: Sides) -> bool:
        raise AssertionError("there is no pass to observe in")

    def end_pass(self) -> None: ...

    @property
    def passes(self) -> int:
        return 0

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, state: dict[str, Tensor]) -> None: ...

    def result(self) -> ScanResult:
        return ScanResult()


class GlobalThresholds:
    """One threshold a side, over all tensors."""

    def __init__(self, method: Method, numel: int, own: range, guess: Guess, processes: ProcessGroup) -> None:
        k = method.threshold_k(numel)
        assert k is not None
        self._own, self._processes = own, processes
        self._searches = CountingSearches(CountingSearch(k, guess) for guess in guess())
        self.passes = 0

    def next_pass(self) -> range | None:
        return None if self._searches.done else self._own

    def observe(self, tile: Tile, scores: Sides) -> bool:
        return _count(self._searches, scores)

    def end_pass(self) -> None:
        self._searches.narrow(self._processes.all_reduce_sum)
        self.passes += 1

    def state(self) -> dict[str, Tensor]:
        return self._searches.state() | {"passes": torch.tensor(self.passes)}

    def restore(self, state: dict[str, Tensor]) -> None:
        self._searches.restore(state)
        self.passes = int(state["passes"])

    def result(self) -> ScanResult:
        return ScanResult(thresholds=torch.tensor(self._searches.values, dtype=torch.float32)[:, None])


class TensorThresholds:
    """Thresholds for each tensor: of those in one chunk at once, of a larger one by counting over its chunks.

    Also the trivial thresholds, where everything or nothing is selected, of either scope.
    """

    def __init__(
        self,
        method: Method,
        tensors: Sequence[layout.Tensor],
        chunks: Sequence[Chunk],
        own: range,
        processes: ProcessGroup,
    ) -> None:
        self._method, self._tensors, self._chunks, self._processes = method, tensors, chunks, processes
        searched = method.needs_threshold
        trivial = EVERYTHING if method.density == 1 else NOTHING
        size = len(tensors) if method.scope == "tensor" else 1
        self._thresholds = torch.full((2, size), NOTHING if searched else trivial)
        self._runs = [run for run in runs(chunks) if run.start in own] if searched else []
        self._begin(0)

    def _begin(self, run: int) -> None:
        self._at = run
        self._searches: CountingSearches | None = None
        if run < len(self._runs) and len(self._runs[run]) > 1:
            self._searches = CountingSearches(CountingSearch(self._k(self._large)) for _ in range(2))

    @property
    def _large(self) -> int:
        """The tensor that the run's chunks are parts of."""
        return self._chunks[self._runs[self._at].start][0].tensor

    def _k(self, tensor: int) -> int:
        k = self._method.threshold_k(self._tensors[tensor].target.numel)
        assert k is not None
        return k

    def next_pass(self) -> range | None:
        return self._runs[self._at] if self._at < len(self._runs) else None

    @property
    def passes(self) -> int:
        return 0  # a tensor is one process's business

    def observe(self, tile: Tile, scores: Sides) -> bool:
        if self._searches is not None:
            return _count(self._searches, scores)
        numbers = list(tile.tensors)
        ks = [self._k(number) for number in numbers]
        for side, values in enumerate(scores):
            if not are_valid_scores(values):
                return False
            found = rkif_kernels.kth_scores(values, ks=[max(k, 0) for k in ks], scope="tensor").cpu()
            # A k below the first score keeps all of them.
            self._thresholds[side, numbers] = torch.where(torch.tensor(ks) < 0, EVERYTHING, found)
        return True

    def end_pass(self) -> None:
        if self._searches is not None:
            self._searches.narrow()
            if not self._searches.done:
                return
            self._thresholds[:, self._large] = torch.tensor(self._searches.values, dtype=torch.float32)
        self._begin(self._at + 1)

    def state(self) -> dict[str, Tensor]:
        searches = {} if self._searches is None else self._searches.state()
        return {"thresholds": self._thresholds.clone(), "at": torch.tensor(self._at), **searches}

    def restore(self, state: dict[str, Tensor]) -> None:
        self._thresholds = state["thresholds"].clone()
        self._begin(int(state["at"]))
        if self._searches is not None:
            self._searches.restore(state)

    def result(self) -> ScanResult:
        # What a process has not looked at is +inf there, and only there.
        own = self._thresholds.flatten()
        every = self._processes.all_gather(own).view(self._processes.size, -1)
        return ScanResult(thresholds=every.amin(dim=0).view_as(self._thresholds))


def are_valid_scores(scores: Scores) -> bool:
    """Whether all are scores: finite, and not negative."""
    counts = torch.zeros(4, dtype=torch.int64, device=scores.device)
    rkif_kernels.count_scores_(counts, scores, low=0, shift=0)
    return int(counts[-1]) == 0


def _count(searches: CountingSearches, scores: Sides) -> bool:
    """Count both sides; whether all are scores."""
    for side, values in enumerate(scores):
        searches.count(side, values)
    return searches.valid


class Scales:
    """The factors that give task vectors thinned at random the L1 norm they had."""

    LEAST = 1e-7  # norms below it are left alone, as in mergekit

    def __init__(self, method: TaskArithmetic, tensors: int, own: range, processes: ProcessGroup) -> None:
        self._method, self._processes = method, processes
        self._chunks: range | None = own
        self._norms = torch.zeros(2, 2, tensors, dtype=torch.float64)  # [whole or kept, side, tensor]

    def next_pass(self) -> range | None:
        return self._chunks

    def observe(self, tile: Tile, scores: Sides) -> bool:
        for position, number in enumerate(tile.tensors):
            base = tile.base[position].float()
            for side, end in enumerate((tile.inner[position], tile.outer[position])):
                distance = (end.float() - base).abs_()
                self._norms[0, side, number] += float(distance.double().sum())
                kept = distance.mul_(self._method.keeps(tile, position, side))
                self._norms[1, side, number] += float(kept.double().sum())
        return bool(self._norms.isfinite().all())

    def end_pass(self) -> None:
        self._chunks = None

    @property
    def passes(self) -> int:
        return 0  # a tensor is one process's business

    def state(self) -> dict[str, Tensor]:
        return {"norms": self._norms.clone(), "done": torch.tensor(self._chunks is None)}

    def restore(self, state: dict[str, Tensor]) -> None:
        self._norms = state["norms"].clone()
        if state["done"]:
            self._chunks = None

    def result(self) -> ScanResult:
        whole, kept = self._processes.all_reduce_sum(self._norms)
        small = (whole < self.LEAST) | (kept < self.LEAST)
        return ScanResult(scales=torch.where(small, 1.0, whole / kept))
