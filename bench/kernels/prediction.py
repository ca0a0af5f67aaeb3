"""What speed to expect on a GPU that is not there, by counting bytes, instructions and launches.

A launch takes the longer of two times, to move its bytes at the speed of a copy and to issue its
instructions, and a fixed time to start and end. The model leaves out how many accesses are in flight, that
single sectors at random places are slower than rows, and that atomic additions to one place wait for each
other, so a call rather takes longer. Nothing of it is measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from rich.table import Table

from bench.kernels.shapes import LORA_R8, ShapeSet, fitted
from rkif_kernels.backends.triton.launch import BRACKETING, FUSE


@dataclass(frozen=True)
class Multiprocessor:
    """What the programs of a multiprocessor share. CUDA C++ Programming Guide, "Technical Specifications per
    Compute Capability"; the units of allocation are those of NVIDIA's occupancy calculator.

    Attributes:
        shared: bytes of shared memory.
        registers, warps, programs: how many there are at most.
        shared_reserved: bytes of shared memory that the system takes for each program.
        shared_unit, register_unit, warp_unit: what is allocated in multiples: bytes of shared memory a
            program, registers a warp, warps for which there are registers.
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
    """How many programs a multiprocessor holds at once; None for targets of which it is not known.

    Args:
        registers: a thread's.
        shared: bytes a program.
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
    bandwidth: bytes a second of its memory.
    multiprocessors: how many it has.
    clock: cycles a second, boosted.
    schedulers: of a multiprocessor; each issues one instruction of a warp a cycle.
    copy_share: of the bandwidth that a copy reaches. An assumption.
    launch: seconds from one kernel of a stream to the next. An assumption, for a CUDA graph: the start, the
        first and last accesses that nothing hides, and what the last program does alone.
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
        """Bytes a second that a copy reads and writes."""
        return self.bandwidth * self.copy_share

    @property
    def issue(self) -> float:
        """Instructions a second, each thread's counted."""
        return self.multiprocessors * self.schedulers * self.clock * LANES


# NVIDIA H100 data sheet, SXM: 3.35 TB/s, 67 TFLOP/s of float32. The H100 whitepaper: 132 multiprocessors of
# 128 float32 units, each a multiply-add a cycle; so the clock is 1.98 GHz.
H100 = Gpu("H100 SXM", bandwidth=3.35e12, multiprocessors=132, clock=1.98e9)


class Launch(NamedTuple):
    """What one launch needs.

    Attributes:
        kernel: its name, as in the rows of compiled kernels.
        moved: bytes between memory and the multiprocessors.
        instructions: of all threads.
    """

    kernel: str
    moved: float
    instructions: float

    def seconds(self, gpu: Gpu = H100) -> float:
        return max(self.moved / gpu.copy, self.instructions / gpu.issue) + gpu.launch


def predicted_share(bytes_per_element: float, instructions_per_element: float, numel: int = 2**26) -> float:
    """Of a copy's speed, for one launch over so many elements on an H100."""
    launch = Launch("", bytes_per_element * numel, instructions_per_element * numel)
    return round(launch.moved / H100.copy / launch.seconds(), 3)


# The kernels' variants whose counted instructions stand for a call: float32, with S and U.
VARIANTS = {
    "observe": "first fp32, fp32, S, U fp32",
    "bracketed scores": "S*U fp32",
    "bracketed fuse": "fp32, S*U fp32",
}
# What has no bulk loop was counted by hand, in machine code for sm_90 by triton 3.9. Of a thread: an element
# of the second sample for each side, and each halving in the search for its tensor; the list's kernel before
# its loop, and an iteration of that, which lists at most one element.
SAMPLED, HALVING = 100, 17
LIST_START, LIST_ENTRY = 240, 140
DENSITY = 0.2  # the release's, of the elements that a learner selects
SECTOR = 32  # bytes: the least that is read


def observe(shapes: ShapeSet, rates: Mapping[str, float]) -> list[Launch]:
    """Args:
    rates: instructions an element in the bulk loops of the kernels in :data:`VARIANTS`.
    """
    return [Launch("observe", 24 * shapes.numel, rates["observe"] * shapes.numel)]


def threshold(shapes: ShapeSet, rates: Mapping[str, float]) -> list[Launch]:
    """By one bracketed pass; see :func:`observe`."""
    moved, instructions = 8 * shapes.numel, rates["bracketed scores"] * shapes.numel
    return _bracketed(shapes, Launch("bracketed scores", moved, instructions), sides=1)


def fuse(shapes: ShapeSet, rates: Mapping[str, float]) -> list[Launch]:
    """Likewise, and the listed elements fused once more."""
    moved, instructions = 32 * shapes.numel, rates["bracketed fuse"] * shapes.numel
    launches = _bracketed(shapes, Launch("bracketed fuse", moved, instructions), sides=2)
    entry = 8 + 5 * 4 + SECTOR  # an address and five values, and what is written at that address
    return [*launches, Launch("finish", entry * _listed(shapes, sides=2), 0)]


def _bracketed(shapes: ShapeSet, bulk: Launch, sides: int) -> list[Launch]:
    """All launches from the workspace's fill to the thresholds.

    Args:
        bulk: the pass, without the bits that it stores.
    """
    numel, streams = shapes.numel, 2 * sides
    cells = -(-numel // BRACKETING.stride(numel))
    sampled = cells * BRACKETING.run * (SAMPLED * sides + HALVING * len(shapes.shapes).bit_length())
    bits, listed = numel / 8, _listed(shapes, sides)
    # Of each listed element one sector of every stream is read; where it fuses, of base, inner and outer too.
    gathered, stored = (7, 36) if sides == 2 else (streams, 4)
    threads = numel / FUSE.chunk * FUSE.num_warps * LANES
    return [
        Launch("fill", 0, 0),
        Launch("sample", BRACKETING.first_samples * streams * SECTOR, 0),
        Launch("count sample", cells * streams * SECTOR, sampled),
        Launch(bulk.kernel, bulk.moved + bits, bulk.instructions),
        Launch(
            "list",
            bits + listed * (gathered * SECTOR + stored),
            threads * (LIST_START + LIST_ENTRY * _iterations(64 * listed / numel, FUSE.block // 4)),
        ),
        *[Launch("narrow", listed * sides * 4, 0)] * 2,
    ]


def _listed(shapes: ShapeSet, sides: int) -> float:
    """How many elements the brackets are expected to leave undecided."""
    return BRACKETING.capacity(1 - DENSITY, shapes.numel, sides) / BRACKETING.list_slack


def _iterations(mean: float, lanes: int) -> float:
    """How often the list's loop is run: the most listed elements of a lane, where they lie independently."""
    count, expected = 0, 0.0
    term = at_most = math.exp(-mean)  # of a Poisson distribution: count, and at most count
    while (more := 1 - min(at_most, 1.0) ** lanes) > 1e-6:
        expected += more
        count += 1
        term *= mean / count
        at_most += term
    return expected


@dataclass(frozen=True)
class Call:
    """A call whose time is predicted.

    Attributes:
        launches: counts it.
        least: bytes an element that it has to move.
        share, microseconds: its goals: at least this share of the speed of a copy, at most so long.
    """

    launches: Callable[[ShapeSet, Mapping[str, float]], list[Launch]]
    least: int
    shapes: ShapeSet
    share: float | None = None
    microseconds: float | None = None

    def goal(self, seconds: float, share: float) -> str:
        """The goal, and whether it is reached."""
        if self.share is not None:
            return f"at least {self.share:.0%}: {_verdict(share >= self.share)}"
        if self.microseconds is not None:
            return f"at most {self.microseconds:.0f} us: {_verdict(seconds * 1e6 <= self.microseconds)}"
        return "-"


def _verdict(reached: bool) -> str:
    return "reached" if reached else "NOT REACHED"


LARGE = fitted("one-64Mi", 2**26)
CALLS = (
    Call(observe, 24, LARGE),
    Call(threshold, 8, LARGE),
    Call(fuse, 32, LARGE, share=0.85),
    Call(observe, 24, LORA_R8),
    Call(threshold, 8, LORA_R8),
    Call(fuse, 32, LORA_R8, microseconds=140),
)


def table(rates: Mapping[str, float]) -> Table:
    """Every call of :data:`CALLS`.

    Args:
        rates: see :func:`observe`.
    """
    out = Table(
        title=f"predicted for one {H100.name}",
        caption=f"float32, S and U, density {DENSITY}, from a CUDA graph. A model, with a copy at "
        f"{H100.copy / 1e12:.2f} TB/s and {H100.launch * 1e6:.0f} us a launch, which are assumptions.",
    )
    for heading in ("call", "shapes", "us", "of a copy", "goal", "measured", "us of each launch"):
        out.add_column(heading)
    for call in CALLS:
        launches = call.launches(call.shapes, rates)
        seconds = sum(launch.seconds() for launch in launches)
        share = call.least * call.shapes.numel / H100.copy / seconds
        each = ", ".join(f"{launch.kernel} {launch.seconds() * 1e6:.0f}" for launch in launches)
        figures = (f"{seconds * 1e6:.0f}", f"{share:.0%}", call.goal(seconds, share))
        out.add_row(call.launches.__name__, call.shapes.name, *figures, "not measured", each)
    return out
