"""Random drops. They depend only on the seed, and on an element's tensor, task vector and position."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rkif_kernels.checks import require_fraction, require_whole_number

PER_COUNTER = 8  # float32 numbers that NumPy's Philox draws at each step of its counter


@dataclass(frozen=True)
class Draws:
    """An element is kept if its random number is below ``density``.

    The numbers of a tensor and a side (the inner or the outer task vector) are a stream of NumPy's Philox
    generator. So an element has the same number, however its tensor is divided into parts.

    Attributes:
        density: probability to keep an element, in [0, 1].
        seed: in [0, 2^63).
        names: of the tensors.
        starts: for each tensor, the index of the first element of its part, in [0, 2^62).

    Raises:
        TypeError, ValueError: a value is out of its range, or there is not one start per name.
    """

    density: float
    seed: int
    names: Sequence[str]
    starts: Sequence[int]

    def __post_init__(self) -> None:
        require_fraction("density", self.density)
        require_whole_number("seed", self.seed, minimum=0, bits=63)
        if len(self.starts) != len(self.names):
            raise ValueError(f"starts has {len(self.starts)} indices, names has {len(self.names)} names")
        for name, start in zip(self.names, self.starts, strict=True):
            require_whole_number(f"starts[{name!r}]", start, minimum=0, bits=62)

    @functools.cached_property
    def keys(self) -> npt.NDArray[np.uint64]:
        """The keys of Philox: [2 (inner, outer), tensors, 2 (seed, stream)]."""
        digests = [hashlib.sha256(name.encode()).digest() for name in self.names]
        streams = [int.from_bytes(digest[:7], "little") * 2 for digest in digests]
        keys = [[(self.seed, stream + side) for stream in streams] for side in (0, 1)]
        return np.array(keys, np.uint64)

    def keeps(self, side: int, index: int, start: int, numel: int) -> Tensor:
        """Which of ``numel`` elements are kept, from ``start`` on in the part of a tensor: bool on CPU."""
        counter, skipped = divmod(self.starts[index] + start, PER_COUNTER)
        generator = np.random.Generator(np.random.Philox(key=self.keys[side, index], counter=counter))
        drawn = generator.random(skipped + numel, dtype=np.float32)[skipped:]
        return torch.from_numpy(drawn) < self.density
