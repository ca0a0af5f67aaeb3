"""Computes thresholds and scales over all elements before the fusion, in passes over the chunks.

The state of a scan can be saved after any chunk and restored. Its size does not depend on the number of
elements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor

import rkif_kernels
from rkif.checkpoint.layout import Chunk, OutputTensor, runs
from rkif.checkpoint.methods import EVERYTHING, NOTHING, Method, ScanResult, TaskArithmetic
from rkif.checkpoint.scores import guess_thresholds
from rkif.checkpoint.tiles import Tile
from rkif.distributed.process_group import ProcessGroup
from rkif_kernels import CountingSearch, CountingSearches, Scores

Guess = Callable[[Method, Sequence[OutputTensor], Sequence[int]], Sequence[tuple[float, float]]]


class Scan(Protocol):
    """Passes over chunks: while ``next_pass()`` is not None, observe its chunks, then call ``end_pass()``."""

    def next_pass(self) -> range | None:
        """Indices of the chunks of the next pass, which may be empty; None when the result is known."""

    def observe(self, tile: Tile, scores: Sequence[Scores]) -> bool:
        """Process a part of a chunk; return whether its scores are finite and not negative."""

    def end_pass(self) -> None:
        """End the pass; all its chunks have been observed."""

    @property
    def passes(self) -> int:
        """Number of finished passes whose counts were summed over the processes; the same on all of them."""

    def state(self) -> dict[str, Tensor]:
        """Copies of the state that :meth:`restore` needs."""

    def restore(self, state: dict[str, Tensor]) -> None: ...

    def result(self) -> ScanResult: ...


def make_scan(
    method: Method,
    tensors: Sequence[OutputTensor],
    chunks: Sequence[Chunk],
    share: range,
    processes: ProcessGroup,
    guess: Guess | None = guess_thresholds,
) -> Scan:
    """The scan that a method needs.

    Args:
        method: the method.
        tensors: the tensors of the output; for a global threshold, a sample of their inputs is read.
        chunks: the chunks of the tensors that are fused.
        share: indices of the chunks that this process scans.
        processes: their counts are summed at the end of a pass, or in :meth:`Scan.result`.
        guess: estimates bounds of each model's threshold, to save passes; None for tensors that are in no
            file.
    """
    if method.scope == "global" and method.needs_threshold:
        return GlobalThresholds(method, tensors, share, processes, guess)
    if method.scope is not None:
        return TensorThresholds(method, tensors, chunks, share, processes)
    if method.rescales:
        return Scales(cast(TaskArithmetic, method), len(tensors), share, processes)
    return NoScan()


class NoScan:
    """The scan of a method that needs none."""

    passes = 0

    def next_pass(self) -> range | None:
        return None

    def observe(self, tile: Tile, scores: Sequence[Scores]) -> bool:
        raise AssertionError("there is no pass to observe in")

    def end_pass(self) -> None: ...

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, state: dict[str, Tensor]) -> None: ...

    def result(self) -> ScanResult:
        return ScanResult()


class GlobalThresholds:
    """One threshold for each model, over all tensors."""

    def __init__(
        self,
        method: Method,
        tensors: Sequence[OutputTensor],
        share: range,
        processes: ProcessGroup,
        guess: Guess | None,
    ) -> None:
        k = method.threshold_k(sum(tensor.target.numel for tensor in tensors if tensor.fused))
        assert k is not None
        self._share, self._processes = share, processes
        guesses = guess(method, tensors, [k] * method.models) if guess else [None] * method.models
        self._searches = CountingSearches(CountingSearch(k, bounds) for bounds in guesses)
        self.passes = 0

    def next_pass(self) -> range | None:
        return None if self._searches.done else self._share

    def observe(self, tile: Tile, scores: Sequence[Scores]) -> bool:
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
    """One threshold for each model and tensor.

    Whole tensors of a chunk are searched in memory; a tensor that is cut is searched by counting over its
    chunks. If everything or nothing is selected, under either scope, no search is needed.
    """

    passes = 0  # one process scans a whole tensor, so no pass ends with a sum over processes

    def __init__(
        self,
        method: Method,
        tensors: Sequence[OutputTensor],
        chunks: Sequence[Chunk],
        share: range,
        processes: ProcessGroup,
    ) -> None:
        self._method, self._tensors, self._chunks, self._processes = method, tensors, chunks, processes
        searched = method.needs_threshold
        trivial = EVERYTHING if method.density == 1 else NOTHING
        size = len(tensors) if method.scope == "tensor" else 1
        self._thresholds = torch.full((method.models, size), NOTHING if searched else trivial)
        self._runs = [run for run in runs(chunks) if run.start in share] if searched else []
        self._start(0)

    def _start(self, run: int) -> None:
        self._run = run
        self._searches: CountingSearches | None = None
        if run < len(self._runs) and len(self._runs[run]) > 1:
            ks = [max(k, 0) for k in self._ks(self._cut_tensor)]
            guesses = guess_thresholds(self._method, [self._tensors[self._cut_tensor]], ks)
            self._searches = CountingSearches(map(CountingSearch, ks, guesses))

    @property
    def _cut_tensor(self) -> int:
        """Index of the tensor whose parts are the run's chunks."""
        return self._chunks[self._runs[self._run].start][0].tensor

    def _ks(self, tensor: int) -> list[int]:
        """The k of each model; a negative k selects every element."""
        return self._method.threshold_ks(self._tensors[tensor].name, self._tensors[tensor].target.numel)

    def next_pass(self) -> range | None:
        return self._runs[self._run] if self._run < len(self._runs) else None

    def observe(self, tile: Tile, scores: Sequence[Scores]) -> bool:
        if self._searches is not None:
            return _count(self._searches, scores)
        indices = list(tile.tensors)
        by_model = zip(*map(self._ks, indices), strict=True)
        for side, (values, ks) in enumerate(zip(scores, by_model, strict=True)):
            # A magnitude that is not finite is detected later, by the norms of the fusion.
            if tile.importance is not None and not are_valid_scores(values):
                return False
            thresholds = rkif_kernels.kth_scores(values, ks=[max(k, 0) for k in ks], scope="tensor").cpu()
            self._thresholds[side, indices] = _limited(thresholds, ks)
        return True

    def end_pass(self) -> None:
        if self._searches is not None:
            self._searches.narrow()
            if not self._searches.done:
                return
            thresholds = torch.tensor(self._searches.values, dtype=torch.float32)
            self._thresholds[:, self._cut_tensor] = _limited(thresholds, self._ks(self._cut_tensor))
        self._start(self._run + 1)

    def state(self) -> dict[str, Tensor]:
        searches = {} if self._searches is None else self._searches.state()
        return {"thresholds": self._thresholds.clone(), "at": torch.tensor(self._run), **searches}

    def restore(self, state: dict[str, Tensor]) -> None:
        self._thresholds = state["thresholds"].clone()
        self._start(int(state["at"]))
        if self._searches is not None:
            self._searches.restore(state)

    def result(self) -> ScanResult:
        # Each process has +inf for the tensors that it did not scan.
        by_process = self._processes.all_gather(self._thresholds.flatten()).view(self._processes.size, -1)
        return ScanResult(thresholds=by_process.amin(dim=0).view_as(self._thresholds))


def _limited(thresholds: Tensor, ks: Sequence[int]) -> Tensor:
    """The thresholds; for a negative k, the threshold that selects every element."""
    return torch.where(torch.tensor(ks) < 0, EVERYTHING, thresholds)


def are_valid_scores(scores: Scores) -> bool:
    """Whether all scores are finite and not negative."""
    counts = torch.zeros(4, dtype=torch.int64, device=scores.device)
    rkif_kernels.count_scores_(counts, scores, low=0, shift=0)
    return int(counts[-1]) == 0


def _count(searches: CountingSearches, scores: Sequence[Scores]) -> bool:
    """Count the scores of all models; returns whether all are finite and not negative."""
    for side, values in enumerate(scores):
        searches.count(side, values)
    return searches.valid


class Scales:
    """The factors that restore the L1 norms of task vectors after a random part was dropped."""

    MIN_NORM = 1e-7  # smaller norms are not restored, as in mergekit
    passes = 0  # the norms are summed in the result, not at the end of a pass

    def __init__(self, method: TaskArithmetic, tensors: int, share: range, processes: ProcessGroup) -> None:
        self._method, self._processes = method, processes
        self._chunks: range | None = share
        # [all or kept, model, tensor]
        self._norms = torch.zeros(2, method.models, tensors, dtype=torch.float64)

    def next_pass(self) -> range | None:
        return self._chunks

    def observe(self, tile: Tile, scores: Sequence[Scores]) -> bool:
        sums = self._method.absolute_sums(tile)
        self._norms[:, :, list(tile.tensors)] += sums
        return bool(sums.isfinite().all())

    def end_pass(self) -> None:
        self._chunks = None

    def state(self) -> dict[str, Tensor]:
        return {"norms": self._norms.clone(), "done": torch.tensor(self._chunks is None)}

    def restore(self, state: dict[str, Tensor]) -> None:
        self._norms = state["norms"].clone()
        if state["done"]:
            self._chunks = None

    def result(self) -> ScanResult:
        whole, kept = self._processes.all_reduce_sum(self._norms)
        small = (whole < self.MIN_NORM) | (kept < self.MIN_NORM)
        return ScanResult(scales=torch.where(small, 1.0, whole / kept))
