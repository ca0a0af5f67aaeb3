"""How kernels are launched: configurations as data, chosen by pure functions."""

from __future__ import annotations

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

    @property
    def chunk(self) -> int:
        return self.block * self.tiles

    @property
    def options(self) -> dict[str, Any]:
        """Compiler options. Without fused multiply-add the results are those of every other backend."""
        return {"num_warps": self.num_warps, "enable_fp_fusion": False}


# 1024 float32 elements over 4 warps are two 16-byte accesses a thread and stream. Several tiles a program
# make one set of atomics, and one entry of the chunk table, serve 8,192 elements: 13e9 parameters are then
# 1.6 million chunks and 19 MB of table.
STREAM = LaunchConfig(block=1024, tiles=8, num_warps=4)
