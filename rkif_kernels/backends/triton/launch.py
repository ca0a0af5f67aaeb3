"""Launch configurations, prepared launches, and brackets of thresholds; launches.json has the values."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from rkif_kernels.selection.bracket import half_width


@dataclass(frozen=True)
class LaunchConfig:
    """Attributes:
    block: number of elements that a program processes at a time, a power of two.
    tiles: number of blocks that a program processes in sequence; its chunk is ``block * tiles`` elements.
    num_warps: warps (wavefronts) per program.
    max_registers: maximum per thread on NVIDIA GPUs. With None, ptxas spills a few registers of some kernels
        in order to fit one more program on a multiprocessor.
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
    def label(self) -> str:
        """In tables: block x tiles, warps."""
        return f"{self.block} x {self.tiles}, {self.num_warps}"

    @property
    def options(self) -> dict[str, Any]:
        """Compiler options. Fused multiply-add is off, so that all backends give the same bits."""
        options = {"num_warps": self.num_warps, "enable_fp_fusion": False}
        if self.max_registers is not None and torch.version.hip is None:
            options["maxnreg"] = self.max_registers
        return options


class PreparedLaunch:
    """A kernel with fixed arguments; a launch passes the other arguments without Triton's binder.

    Triton takes longer to bind some twenty arguments and to look up the compiled kernel than for the rest of
    a launch. The compiled kernel depends on dtypes, alignment and constants. These are fixed here, so all
    launches use the compiled kernel of the first.

    Args:
        kernel: a Triton kernel.
        programs: size of the grid.
        arguments: fixed arguments by name. Each launch passes the others: floats, and memory that PyTorch has
            allocated.
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
        """Launch on the current stream, with the arguments that are not fixed from ``given``."""
        # In the kernel's order. The dict is not stored, because it would keep memory until the next launch.
        arguments = self._arguments | {name: given[name] for name in self._given}
        if self._launch is not None:
            self._launch(*arguments.values())
            return
        compiled = self._kernel[self._grid](**arguments, **self._options)
        if compiled is not None:  # Triton's interpreter compiles nothing
            self._launch = compiled[self._grid]


@dataclass(frozen=True)
class Bracketing:
    """How a sample brackets an order statistic of all scores.

    Attributes:
        min_numel: minimum number of scores for a bracketed pass; fewer are read several times.
        sample_stride: number of scores per sampled run; larger if ``max_samples`` limits the runs.
        max_samples: maximum number of runs.
        sigmas: half-width of a bracket, in standard deviations of a quantile of the sample.
        list_slack: capacity of the list, relative to the expected number of undecided elements.
        run: number of neighbours in a run, a power of two; eight float32 are one access to memory.
        design_effect: factor on the variance of a quantile, because neighbours are correlated.
        first_samples: number of scores in the first sample, a multiple of ``run``.
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
        """Number of scores per sampled run."""
        return max(self.sample_stride, -(-numel // self.max_samples))

    def capacity(self, fraction: float, numel: int, sides: int) -> int:
        """Capacity of the list of undecided elements: the expected number for all brackets, with slack."""
        width = 2 * self.margin(fraction, numel) / self._counted(numel)
        return min(max(math.ceil(self.list_slack * sides * width * numel), 1), numel)

    def sample_ks(self, fraction: float, sampled: int, numel: int, run: int = 1) -> tuple[int, int]:
        """The positions of the window's ends in the sorted first sample; -1 or ``sampled``: beyond it.

        The window contains the bracket in spite of the sampling errors of both samples.

        Args:
            run: number of neighbours in a run of the first sample.
        """
        margin = self._half_width(fraction, sampled, run)
        margin += 2 * self.margin(fraction, numel) * sampled / self._counted(numel)
        centre = fraction * (sampled - 1)
        return max(math.floor(centre - margin), -1), min(math.ceil(centre + margin), sampled)

    def margin(self, fraction: float, numel: int) -> float:
        """Half-width of a bracket, in scores of the second sample of ``numel``."""
        return self._half_width(fraction, self._counted(numel), self.run)

    def _counted(self, numel: int) -> int:
        """Number of scores in the second sample."""
        return -(-numel // self.stride(numel)) * self.run

    def _half_width(self, fraction: float, sampled: int, run: int) -> float:
        """Half-width of a bracket from a sample in runs, in sampled scores."""
        effect = self.design_effect if run > 1 else 1.0
        return half_width(fraction, sampled * effect, self.sigmas)


def capped_grid(programs: int, device: torch.device) -> int:
    """``programs``, but at most four per multiprocessor: such kernels loop over their work."""
    return max(1, min(programs, 4 * _multiprocessors(device)))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors of a GPU; 1 for the interpreter, so that programs loop."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
