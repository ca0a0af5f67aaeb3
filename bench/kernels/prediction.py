"""Predicted speed on a GPU, from the number of bytes, instructions and launches. Nothing of it is measured.

The time of a launch is the maximum of two times (to move its bytes at the speed of a copy, and to issue its
instructions) plus a fixed time. The model ignores the number of accesses in flight, the lower speed of
random sectors, and contention of atomic additions. So a call probably takes longer than predicted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rich.table import Table

from bench.kernels.goals import GOALS, Goal
from bench.kernels.operations import DENSITY, DTYPES, bytes_per_element
from bench.kernels.shapes import LORA_R8, ShapeSet, fitted
from rkif_kernels.backends.triton.launches import default, default_bracketing
from rkif_kernels.backends.triton.windows import BINS


@dataclass(frozen=True)
class Multiprocessor:
    """Resources of a multiprocessor, from the CUDA C++ Programming Guide, "Technical Specifications per
    Compute Capability"; the units of allocation are those of NVIDIA's occupancy calculator.

    Attributes:
        shared: bytes of shared memory.
        registers, warps, programs: maximum numbers.
        shared_reserved: bytes of shared memory that the system reserves per program.
        shared_unit, register_unit, warp_unit: units of allocation: bytes of shared memory per program,
            registers per warp, and warps that get registers.
    """

    shared: int
    registers: int = 65_536
    warps: int = 64
    programs: int = 32
    shared_reserved: int = 1024
    shared_unit: int = 128
    register_unit: int = 256
    warp_unit: int = 4


MULTIPROCESSORS = {
    "sm_80": Multiprocessor(shared=164 * 1024),
    "sm_90": Multiprocessor(shared=228 * 1024),
    "sm_100": Multiprocessor(shared=228 * 1024),
}
LANES = 32


def blocks_per_sm(target: str, registers: int, shared: int, num_warps: int) -> int | None:
    """Number of programs that a multiprocessor holds at once; None for targets without known limits.

    Args:
        registers: per thread.
        shared: bytes per program.
    """
    limits = MULTIPROCESSORS.get(target)
    if limits is None:
        return None
    a_warp = _rounded(registers * LANES, limits.register_unit)
    warps = limits.registers // a_warp // limits.warp_unit * limits.warp_unit
    a_program = _rounded(shared + limits.shared_reserved, limits.shared_unit)
    return min(limits.programs, min(warps, limits.warps) // num_warps, limits.shared // a_program)


def _rounded(number: int, unit: int) -> int:
    return -(-number // unit) * unit


@dataclass(frozen=True)
class Gpu:
    """Attributes:
    bandwidth: of its memory, in bytes per second.
    multiprocessors: number of multiprocessors.
    clock: boost clock, in cycles per second.
    schedulers: per multiprocessor; each issues one instruction of a warp per cycle.
    copy_share: share of the bandwidth that a copy reaches. An assumption.
    launch: fixed seconds of a kernel in a CUDA graph: its start, the latency of its first and last accesses,
        and the work of its last program. An assumption.
    """

    name: str
    bandwidth: float
    multiprocessors: int
    clock: float
    schedulers: int = 4
    copy_share: float = 0.9
    launch: float = 4e-6

    @property
    def copy(self) -> float:
        """Bytes per second that a copy reads and writes."""
        return self.bandwidth * self.copy_share

    @property
    def issue(self) -> float:
        """Instructions per second, summed over threads."""
        return self.multiprocessors * self.schedulers * self.clock * LANES


# NVIDIA H100 data sheet, SXM: 3.35 TB/s, 67 TFLOP/s of float32. The H100 whitepaper: 132 multiprocessors of
# 128 float32 units, each a multiply-add a cycle; so the clock is 1.98 GHz.
H100 = Gpu("H100 SXM", bandwidth=3.35e12, multiprocessors=132, clock=1.98e9)


# A sentence for tables.
ASSUMPTIONS = (
    f"A model, with a copy at {H100.copy / 1e12:.2f} TB/s and {H100.launch * 1e6:.0f} us a launch, "
    "which are assumptions."
)


class Launch(NamedTuple):
    """The cost of one launch.

    Attributes:
        kernel: its name, as in the rows of compiled kernels.
        moved: bytes between memory and the multiprocessors.
        instructions: summed over all threads.
    """

    kernel: str
    moved: float
    instructions: float

    def seconds(self, gpu: Gpu = H100) -> float:
        return max(self.moved / gpu.copy, self.instructions / gpu.issue) + gpu.launch


def predicted_share(bytes_per_element: float, instructions_per_element: float, numel: int = 2**26) -> float:
    """Share of a copy's speed that one launch over ``numel`` elements reaches on an H100."""
    launch = Launch("", bytes_per_element * numel, instructions_per_element * numel)
    return round(launch.moved / H100.copy / launch.seconds(), 3)


PREDICTED = "sm_90"  # the target whose instructions the predictions use
# The variants whose numbers of instructions the predictions use: float32, with S and U.
VARIANTS = {
    "observe": "first fp32, fp32, S, U fp32",
    "bracketed scores": "S*U fp32",
    "bracketed fuse": "fp32, S*U fp32",
    "adamw": "first fp32, fp32, moments fp32, S, U",
}
# Instructions of a thread in code without a bulk loop, counted by hand for sm_90 and triton 3.9.
# Second sample: per element and side, and per step of the bisection for its tensor. List kernel: before its
# loop, and per iteration, which lists at most one element.
SAMPLED, HALVING = 100, 17
LIST_START, LIST_ENTRY = 240, 140
SECTOR = 32  # bytes: minimum of an access


def observe(shapes: ShapeSet, rates: Mapping[str, float]) -> list[Launch]:
    """The only launch of an update of the importance.

    Args:
        rates: instructions per element in the bulk loops of the kernels in :data:`VARIANTS`.
    """
    return [Launch("observe", 24 * shapes.numel, rates["observe"] * shapes.numel)]


def adamw(shapes: ShapeSet, rates: Mapping[str, float]) -> list[Launch]:
    """With the importance; see :func:`observe`."""
    return [Launch("adamw", 44 * shapes.numel, rates["adamw"] * shapes.numel)]


def threshold(shapes: ShapeSet, rates: Mapping[str, float]) -> list[Launch]:
    """The launches with one bracketed pass; see :func:`observe`."""
    moved, instructions = 8 * shapes.numel, rates["bracketed scores"] * shapes.numel
    launch = Launch("bracketed scores", moved, instructions)
    return _bracketed([shapes.numel], launch, sides=1, tensors=len(shapes.shapes))


def tensor_thresholds(shapes: ShapeSet, rates: Mapping[str, float]) -> list[Launch]:
    """A threshold for each tensor; see :func:`observe`. Small tensors are found by one program each."""
    sizes = [math.prod(shape) for shape in shapes.shapes]
    large = [size for size in sizes if size > default("whole").launch.block]
    moved, instructions = 8 * sum(large), rates["bracketed scores"] * sum(large)
    launches = [Launch("whole", 8 * (sum(sizes) - sum(large)), 0)] if len(large) < len(sizes) else []
    if large:
        launch = Launch("bracketed scores", moved, instructions)
        launches += _bracketed(large, launch, sides=1, tensors=1)
    return launches


def fuse(shapes: ShapeSet, rates: Mapping[str, float]) -> list[Launch]:
    """The launches with one bracketed pass, after which the listed elements are fused again."""
    moved, instructions = 32 * shapes.numel, rates["bracketed fuse"] * shapes.numel
    launch = Launch("bracketed fuse", moved, instructions)
    launches = _bracketed([shapes.numel], launch, sides=2, tensors=len(shapes.shapes))
    entry = 8 + 5 * 4 + SECTOR  # an address, five values, and the sector that is written
    return [*launches, Launch("finish", entry * _listed([shapes.numel], sides=2), 0)]


def _bracketed(groups: Sequence[int], bulk: Launch, sides: int, tensors: int) -> list[Launch]:
    """All launches from the fill of the workspace to the thresholds.

    Args:
        groups: number of elements of each group that has one threshold.
        bulk: the pass, without the bits that it stores.
        tensors: number of tensors in a group.
    """
    numel, streams = sum(groups), 2 * sides
    config, bracketing = default("fuse" if sides == 2 else "threshold").launch, default_bracketing()
    run = bracketing.run if len(groups) > 1 else 1
    first = len(groups) * bracketing.first_samples
    cells = sum(-(-size // bracketing.stride(size)) for size in groups)
    sampled = cells * bracketing.run * (SAMPLED * sides + HALVING * tensors.bit_length())
    bits, listed = numel / 8, _listed(groups, sides)
    bins = len(groups) * sides * BINS.value * 8  # each launch of the search reads them and sets them to zero
    # Each listed element reads one sector of every score stream; in a fusion, of base, inner and outer too.
    gathered, stored = (7, 36) if sides == 2 else (streams, 4)
    threads = numel / config.chunk * config.num_warps * LANES
    return [
        Launch("fill", 0, 0),
        Launch("sample", first // run * streams * SECTOR + first * sides * 8 + bins, 0),
        Launch("count sample", cells * streams * SECTOR + 2 * bins, sampled),
        Launch(bulk.kernel, bulk.moved + bits, bulk.instructions),
        Launch(
            "list",
            bits + listed * (gathered * SECTOR + stored) + 2 * bins,
            threads * (LIST_START + LIST_ENTRY * _iterations(64 * listed / numel, config.block // 4)),
        ),
        *[Launch("narrow", listed * sides * 4 + 2 * bins, 0)] * 2,
    ]


def _listed(groups: Sequence[int], sides: int) -> float:
    """Expected number of elements that the brackets leave undecided."""
    bracketing = default_bracketing()
    return sum(bracketing.capacity(1 - DENSITY, size, sides) for size in groups) / bracketing.list_slack


def _iterations(mean: float, lanes: int) -> float:
    """Expected iterations of the list's loop: the maximum of listed elements over the (independent) lanes."""
    count, expected = 0, 0.0
    term = at_most = math.exp(-mean)  # Poisson probabilities of count, and of at most count
    while (more := 1 - min(at_most, 1.0) ** lanes) > 1e-6:
        expected += more
        count += 1
        term *= mean / count
        at_most += term
    return expected


@dataclass(frozen=True)
class Call:
    """A call whose time is predicted: an operation in float32, with S and U, on a set of shapes.

    Attributes:
        launches: function that lists the launches; its name is that of the operation.
    """

    launches: Callable[[ShapeSet, Mapping[str, float]], list[Launch]]
    shapes: ShapeSet

    @property
    def op(self) -> str:
        return self.launches.__name__

    @property
    def least(self) -> int:
        """Minimum bytes per element."""
        return bytes_per_element(self.op, DTYPES["float32"])

    @property
    def floor(self) -> float:
        """Microseconds that a copy of the least bytes takes."""
        return self.least * self.shapes.numel / H100.copy * 1e6

    @property
    def goal(self) -> Goal | None:
        return next((goal for goal in GOALS if self._is_of(goal)), None)

    def _is_of(self, goal: Goal) -> bool:
        return goal.concerns(self.op, self.shapes.name, self.shapes.numel, "float32")

    def microseconds(self, rates: Mapping[str, float]) -> float:
        """The prediction; see :func:`observe`."""
        return sum(launch.seconds() for launch in self.launches(self.shapes, rates)) * 1e6


LARGE = fitted("one-64Mi", 2**26)
CALLS = tuple(
    Call(op, shapes)
    for shapes in (LORA_R8, LARGE)
    for op in (observe, threshold, tensor_thresholds, fuse, adamw)
    if len(shapes.shapes) > 1 or op is not tensor_thresholds  # of one tensor, the same as the global one
)


def table(rates: Mapping[str, float]) -> Table:
    """A table of the predictions for :data:`CALLS`.

    Args:
        rates: see :func:`observe`.
    """
    out = Table(
        title=f"predicted for one {H100.name}",
        caption=f"float32, S and U, density {DENSITY}, from a CUDA graph. {ASSUMPTIONS} "
        "Floor: the time of a copy of the least bytes.",
    )
    for heading in ("call", "shapes", "us", "of the floor", "goal", "prediction", "us of each launch"):
        out.add_column(heading)
    for call in CALLS:
        launches, microseconds, goal = call.launches(call.shapes, rates), call.microseconds(rates), call.goal
        each = ", ".join(f"{launch.kernel} {launch.seconds() * 1e6:.0f}" for launch in launches)
        times = f"{microseconds / call.floor:.2f}x"
        stated = (goal.limit, goal.verdict(microseconds, call.floor)) if goal else ("-", "-")
        out.add_row(call.op, call.shapes.name, f"{microseconds:.0f}", times, *stated, each)
    return out
