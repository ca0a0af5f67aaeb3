"""How kernels are launched: configurations as data, chosen by pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LaunchConfig:
    """Attributes:
    block: elements a program handles at a time, a power of two.
    tiles: blocks a program handles one after another; its chunk is ``block * tiles`` elements.
    num_warps: warps (wavefronts) a program.
    """

    block: int
    tiles: int
    num_warps: int

    def __post_init__(self) -> None:
        assert 4 * self.tiles < 1 << 8  # lanes of four elements count in 8 bits

    @property
    def chunk(self) -> int:
        return self.block * self.tiles

    @property
    def options(self) -> dict[str, Any]:
        """Compiler options. Without fused multiply-add the results are those of every other backend."""
        return {"num_warps": self.num_warps, "enable_fp_fusion": False}


class PreparedLaunch:
    """A kernel and the arguments that it keeps; a later launch passes those that change, and binds nothing.

    Binding some twenty arguments and looking up the compiled kernel takes Triton longer than the rest of a
    launch. What it depends on (dtypes, alignment, constants) does not change here, so the compiled kernel
    of the first launch serves all others.

    Args:
        kernel: a Triton kernel.
        programs: size of the grid.
        arguments: by name, all of the kernel's.
        options: of the compiler.
    """

    def __init__(
        self, kernel: Any, programs: int, arguments: Mapping[str, Any], options: Mapping[str, Any]
    ) -> None:
        self._kernel, self._grid, self._options = kernel, (programs, 1, 1), options
        self._arguments = {name: arguments[name] for name in kernel.arg_names}
        self._launch: Any = None

    def __call__(self, **changed: float) -> None:
        """Launch on the current stream; ``changed`` are float arguments, which no kernel is compiled for."""
        self._arguments.update(changed)
        if self._launch is not None:
            self._launch(*self._arguments.values())
            return
        compiled = self._kernel[self._grid](**self._arguments, **self._options)
        if compiled is not None:  # Triton's interpreter compiles nothing
            self._launch = compiled[self._grid]


# 1024 float32 elements over 4 warps are two 16-byte accesses a thread and stream. Several tiles a program
# make one set of atomics, and one entry of the chunk table, serve 8,192 elements: 13e9 parameters are then
# 1.6 million chunks and 19 MB of table.
STREAM = LaunchConfig(block=1024, tiles=8, num_warps=4)

# Fusing holds seven streams in registers, and in a single pass masks and a list: with half the elements a
# thread that is 125 of them, not 200, and more programs fit on a multiprocessor.
FUSE = LaunchConfig(block=512, tiles=16, num_warps=4)


@dataclass(frozen=True)
class Bracketing:
    """How a sample brackets an order statistic of all scores.

    Attributes:
        least: number of scores from which a single pass pays; below, the scores are read several times.
        one_in: one score in so many is sampled,
        most: but not more than these.
        sigmas: half-width of a bracket, in standard deviations of a quantile of the sample.
        room: length of the list, in times of what a perfect sample would leave undecided.
    """

    least: int
    one_in: int
    most: int
    sigmas: float
    room: float

    def step(self, numel: int) -> int:
        """One score is sampled from so many neighbours."""
        return max(self.one_in, -(-numel // self.most))

    def capacity(self, k: int, numel: int, sampled: int) -> int:
        """Elements that can be listed as undecided: both brackets' share of all, and room to spare."""
        undecided = 2 * 2 * self._margin(k / max(numel - 1, 1), sampled) / sampled * numel
        return min(max(math.ceil(self.room * undecided), 1), numel)

    def sample_ks(self, k: int, numel: int, sampled: int) -> tuple[int, int]:
        """Ranks in the sample of the bracket's two sides; -1 for one that lies beyond the sample."""
        fraction = k / max(numel - 1, 1)
        centre, margin = fraction * (sampled - 1), self._margin(fraction, sampled)
        low, high = math.floor(centre - margin), math.ceil(centre + margin)
        return max(low, -1), high if high < sampled else -1

    def _margin(self, fraction: float, sampled: int) -> float:
        """Half-width of a bracket, in places of the sorted sample."""
        return self.sigmas * math.sqrt(fraction * (1 - fraction) * sampled) + 1


# The sample costs 32 bytes and more a score and the bracket's width falls with its square root: a million
# leave 0.35 % of the elements undecided on a side. An entry of the list takes 16 bytes: with room for twice
# as many, 0.2 bytes a parameter for billions, 0.9 for four million. Below four million elements the extra
# launches take longer than reading the scores again. Neither is measured yet.
BRACKETING = Bracketing(least=1 << 22, one_in=64, most=1 << 20, sigmas=4.5, room=2.0)
