"""How kernels are launched: configurations as data, chosen by pure functions."""

from __future__ import annotations

from dataclasses import dataclass


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

    @property
    def chunk(self) -> int:
        return self.block * self.tiles


# 1024 float32 elements over 4 warps are two 16-byte accesses a thread and stream. Several tiles a program
# make one set of atomics, and one entry of the chunk table, serve 8,192 elements: 13e9 parameters are then
# 1.6 million chunks and 19 MB of table.
STREAM = LaunchConfig(block=1024, tiles=8, num_warps=4)
