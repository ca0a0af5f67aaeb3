"""The host's cost of a call with a driver that launches nothing: time, launches, compilations.

The tensors of an adapter are so small that a GPU would wait for the host. Warm calls are measured: of
:class:`rkif.Fuser`, if it has the operation. Fusions of all sizes take the path of a large model.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import nn

import rkif
import rkif_kernels
from bench.kernels.stub_driver import Counter, stub_driver
from rkif_kernels.backends.triton import single_pass, thresholds
from rkif_kernels.backends.triton.launch import LaunchConfig
from rkif_kernels.backends.triton.launches import default_bracketing

TENSORS = (1, 160, 640)
SMALLEST = 64  # number of elements; one program each finds the thresholds of smaller tensors
SHAPE = (8, 16)  # small, so that the operations of PyTorch, which a GPU would run, take little CPU time
WEIGHTS = ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (0.0, 0.0))
ROUNDS, WARM_UP = 41, 3
# Maximum number of launches of a warm call.
LAUNCHES = {
    "observe": 1, "observe_moved": 1, "threshold": 8, "tensor_thresholds": 8, "fuse": 8, "tensor_fuse": 8,
    "adamw": 1,
}  # fmt: skip
# Microseconds of a warm call, by (call, tensors).
GOALS = {
    ("observe", 160): 40,
    ("observe", 640): 150,
    ("observe_moved", 160): 200,
    ("observe_moved", 640): 600,
    ("fuse", 160): 400,
}


class Row(NamedTuple):
    """Attributes:
    call: what was called.
    tensors: number of parameters.
    microseconds: host time of one warm call, the median.
    launches: kernels launched by one warm call.
    compilations: kernels compiled after the very first round of the call.
    """

    call: str
    tensors: int
    microseconds: float
    launches: int
    compilations: int


def measure(rounds: int = ROUNDS) -> list[Row]:
    """One row for each call and number of tensors."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with large_model() as counter:
            seen: dict[str, int] = {}
            return [row for tensors in TENSORS for row in Case(tensors).measure(counter, seen, rounds)]
    finally:
        torch.set_num_threads(threads)


@contextmanager
def large_model() -> Iterator[Counter]:
    """The stub driver, and a fusion of any size takes the path of a large model."""
    large = replace(default_bracketing(), min_numel=1)
    # No tensor is small enough for one program, as in a large model.
    bracketed = {"bracketing": large, "whole": LaunchConfig(SMALLEST, 1, 4)}
    with (
        stub_driver() as counter,
        patch.dict(single_pass.prepared_fusion.__kwdefaults__, bracketing=large),
        patch.dict(thresholds.score_thresholds.__kwdefaults__, bracketed),
        patch.dict(thresholds.both_thresholds.__kwdefaults__, bracketed),
    ):
        yield counter


class Case:
    """A fuser over ``tensors`` parameters, with two alternating sets of gradients."""

    def __init__(self, tensors: int) -> None:
        shapes = [SHAPE] * tensors
        self._tensors = tensors
        self._parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
        self._gradients = [[torch.zeros(shape) for shape in shapes] for _ in range(2)]
        config = rkif.FusionConfig.release()
        self.fuser = rkif.Fuser([(f"p{i}", p) for i, p in enumerate(self._parameters)], config)
        sensitivity, uncertainty = ([torch.zeros(shape) for shape in shapes] for _ in range(2))
        self._scores = rkif_kernels.Scores(sensitivity, uncertainty)
        # Weights, gradients, moments, S and U.
        self._steps = [[torch.zeros(shape) for shape in shapes] for _ in range(6)]
        self._nonfinite = torch.zeros(1, dtype=torch.int64)
        self._set(0)

    def _set(self, which: int) -> None:
        for parameter, gradient in zip(self._parameters, self._gradients[which], strict=True):
            parameter.grad = gradient

    def measure(self, counter: Counter, seen: dict[str, int], rounds: int) -> list[Row]:
        moves = iter(range(10**9))
        calls: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
            "observe": (lambda: None, self.fuser.observe),
            "observe_moved": (lambda: self._set(next(moves) % 2), self.fuser.observe),
            "threshold": (lambda: None, lambda: rkif_kernels.score_thresholds(self._scores, density=0.2)),
            "tensor_thresholds": (
                lambda: None,
                lambda: rkif_kernels.score_thresholds(self._scores, density=0.2, scope="tensor"),
            ),
            "fuse": (self.until_fuse, self.fuser.fuse),
            "tensor_fuse": (lambda: None, self._fuse_by_tensor),
            "adamw": (lambda: None, self._step),
        }
        rows = []
        for call, (prepare, run) in calls.items():
            first = call not in seen
            before = len(counter.compilations)
            seconds: list[float] = []
            for repetition in range(WARM_UP + rounds):
                prepare()
                counter.launches.clear()
                start = time.perf_counter()
                run()
                if repetition >= WARM_UP:
                    seconds.append(time.perf_counter() - start)
                elif first and repetition == 0:
                    before = len(counter.compilations)
            seen[call] = 1
            microseconds = round(statistics.median(seconds) * 1e6, 1)
            compilations = len(counter.compilations) - before
            rows.append(Row(call, self._tensors, microseconds, len(counter.launches), compilations))
        return rows

    def _step(self) -> None:
        rkif_kernels.adamw_(
            *self._steps, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, step=1,
            beta1=0.85, beta2=0.85, nonfinite=self._nonfinite,
        )  # fmt: skip

    def _fuse_by_tensor(self) -> None:
        out, base, inner, outer = self._steps[:4]
        scores = self._scores
        rkif_kernels.select_and_fuse_(
            out, base, inner, outer, scores, scores, density=0.2, scope="tensor", weights=WEIGHTS
        )

    def until_fuse(self) -> None:
        self.fuser.observe()
        self.fuser.begin_outer()
        self.fuser.observe()


def problems(rows: Sequence[Row]) -> list[str]:
    """One line for each violated limit of launches or compilations; the limits hold on any machine."""
    lines = []
    for row in rows:
        what = f"{row.call}, {row.tensors} tensors"
        if row.launches > LAUNCHES[row.call]:
            lines.append(f"{what}: {row.launches} launches; at most {LAUNCHES[row.call]} are needed")
        if row.compilations:
            lines.append(f"{what}: compiled {row.compilations} kernels again")
    return lines


def missed_goals(rows: Sequence[Row]) -> list[str]:
    """One line for each call that is slower than :data:`GOALS`; a busy machine may be the reason."""
    goals = ((row, GOALS.get((row.call, row.tensors), row.microseconds)) for row in rows)
    return [
        f"{row.call} of {row.tensors} tensors takes {row.microseconds} us; the goal is {goal}"
        for row, goal in goals
        if row.microseconds > goal
    ]
