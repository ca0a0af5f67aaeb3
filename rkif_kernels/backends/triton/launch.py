"""How kernels are launched: configurations as data, chosen by pure functions."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class LaunchConfig:
    """Attributes:
    block: elements a program handles at a time, a power of two.
    tiles: blocks a program handles one after another; its chunk is ``block * tiles`` elements.
    num_warps: warps (wavefronts) a program.
    max_registers: a thread's at most, on NVIDIA GPUs. Without a number ptxas spills a few registers of some
        kernels in order to fit one more program on a multiprocessor.
    """

    block: int
    tiles: int
    num_warps: int
    max_registers: int | None = None

    def __post_init__(self) -> None:
        assert 4 * self.tiles < 1 << 8  # lanes of four elements count in 8 bits

    @property
    def chunk(self) -> int:
        return self.block * self.tiles

    @property
    def options(self) -> dict[str, Any]:
        """Compiler options. Without fused multiply-add the results are those of every other backend."""
        options = {"num_warps": self.num_warps, "enable_fp_fusion": False}
        if self.max_registers is not None and torch.version.hip is None:
            options["maxnreg"] = self.max_registers
        return options


class PreparedLaunch:
    """A kernel and the arguments that it keeps; a later launch passes the others, and binds nothing.

    Binding some twenty arguments and looking up the compiled kernel takes Triton longer than the rest of a
    launch. What it depends on (dtypes, alignment, constants) does not change here, so the compiled kernel
    of the first launch serves all others.

    Args:
        kernel: a Triton kernel.
        programs: size of the grid.
        arguments: by name. What the kernel takes beside them is given at each launch: floats, and memory as
            PyTorch's allocators give it.
        options: of the compiler.
    """

    def __init__(
        self, kernel: Any, programs: int, arguments: Mapping[str, Any], options: Mapping[str, Any]
    ) -> None:
        self._kernel, self._grid, self._options = kernel, (programs, 1, 1), options
        self._arguments = {name: arguments.get(name) for name in kernel.arg_names}
        self._given = [name for name in kernel.arg_names if name not in arguments]
        self._launch: Any = None

    def __call__(self, given: Mapping[str, Any]) -> None:
        """Launch on the current stream, with what is not among the arguments kept from ``given``."""
        # In an order that is the kernel's; not kept, or the memory of one launch would live until the next.
        arguments = self._arguments | {name: given[name] for name in self._given}
        if self._launch is not None:
            self._launch(*arguments.values())
            return
        compiled = self._kernel[self._grid](**arguments, **self._options)
        if compiled is not None:  # Triton's interpreter compiles nothing
            self._launch = compiled[self._grid]


# 1024 float32 elements over 4 warps are two 16-byte accesses a thread and stream. Several tiles a program
# make one set of atomics, and one entry of the chunk table, serve 8,192 elements: 13e9 parameters are then
# 1.6 million chunks and 19 MB of table.
STREAM = LaunchConfig(block=1024, tiles=8, num_warps=4)

# Fusing holds seven streams in registers, and in a single pass masks and a list: with half the elements a
# thread that is 125 of them, not 200, and more programs fit on a multiprocessor.
FUSE = LaunchConfig(block=512, tiles=16, num_warps=4)
# Of the bracketed pass of a fusion, and of its finish; see LaunchConfig.max_registers.
FUSE_PASS_REGISTERS = 128


@dataclass(frozen=True)
class Bracketing:
    """How a sample brackets an order statistic of all scores.

    Attributes:
        min_numel: number of scores from which a bracketed pass pays; below, they are read several times.
        sample_stride: one run of scores is sampled from so many,
        max_samples: but not more runs than these.
        sigmas: half-width of a bracket, in standard deviations of a quantile of the sample.
        list_slack: length of the list, in times of what a perfect sample would leave undecided.
        run: neighbours in a run, a power of two; eight float32 are one access to memory.
        design_effect: factor on the variance of a quantile, because neighbours resemble each other.
        first_samples: how many scores give the first window.
    """

    min_numel: int
    sample_stride: int
    max_samples: int
    sigmas: float
    list_slack: float
    run: int = 1
    design_effect: float = 1.0
    first_samples: int = 2048

    def stride(self, numel: int) -> int:
        """One run is sampled from so many neighbours."""
        return max(self.sample_stride, -(-numel // self.max_samples))

    def capacity(self, fraction: float, numel: int, sides: int) -> int:
        """Elements that can be listed as undecided: all brackets' share, and some slack."""
        sampled = -(-numel // self.stride(numel)) * self.run
        width = 2 * self._margin(fraction, sampled) / sampled
        return min(max(math.ceil(self.list_slack * sides * width * numel), 1), numel)

    def sample_ks(self, fraction: float, sampled: int, numel: int) -> tuple[int, int]:
        """Orders in the first sample of the window's ends; -1 or ``sampled`` for one beyond it.

        The window holds the bracket although both samples err.
        """
        margin = self.sigmas * math.sqrt(fraction * (1 - fraction) * sampled)
        counted = -(-numel // self.stride(numel)) * self.run
        margin += 2 * self._margin(fraction, counted) * sampled / counted + 1
        centre = fraction * (sampled - 1)
        return max(math.floor(centre - margin), -1), min(math.ceil(centre + margin), sampled)

    def _margin(self, fraction: float, sampled: int) -> float:
        """Half-width of a bracket, in sampled scores."""
        return self.sigmas * math.sqrt(fraction * (1 - fraction) * sampled * self.design_effect) + 1


# A run costs a sector of 32 bytes for each of four streams, and a bracket's width falls with the square root
# of their number: one run of eight in 128 scores reads 3 % of all bytes and leaves 0.7 % of 64 Mi elements
# undecided, which cost as much again. Neighbours resemble each other, so eight are counted as three.
# Radix selection takes 17 launches for a fusion instead of 7, and reads scores four times; below 2^17
# elements a sample would be most of them. None of it is measured.
BRACKETING = Bracketing(
    min_numel=1 << 17, sample_stride=128, max_samples=1 << 20, sigmas=4.0, list_slack=2.0,
    run=8, design_effect=2.5,
)  # fmt: skip


def capped_grid(programs: int, device: torch.device) -> int:
    """As many programs as are wanted, but no more than a few for each multiprocessor: they loop."""
    return max(1, min(programs, 4 * _multiprocessors(device)))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    """Of a GPU; for the interpreter so few that programs do loop."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
