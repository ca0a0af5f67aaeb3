"""Exact order statistics from counts alone: for scores that are never in memory together.

Positive floats are ordered like their bit patterns ("keys"), so the search narrows an interval of keys. Each
pass counts all scores in a window of the interval, with one bin per key if the window is narrow enough. The
bin that contains the k-th score is the next interval. Counts add up, so a pass may process chunks of a file
on several machines, in any order. The memory is independent of the number of scores and of ties.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

BINS = 1 << 19  # maximum: 4 MiB of counts; a window with one key per bin spans 6 % of a value
KEYS = 0x7F800001  # number of keys, from 0 for zero to that of infinity


class Window(NamedTuple):
    """Keys from ``low`` on: ``bins`` bins of ``1 << shift`` keys each."""

    low: int
    shift: int
    bins: int


class CountingSearch:
    """Finds the ``k``-th smallest score: while not :attr:`done`, count in :attr:`window`, :meth:`narrow`.

    It takes one pass if the guess contains the answer in at most BINS keys, and at most three passes.

    Args:
        k: from 0, below the number of scores.
        guess: two scores between which the answer probably lies, if any are known.
        bins: maximum number of bins in a window, a power of two; three passes are enough from 2^11 on.
    """

    def __init__(self, k: int, guess: tuple[float, float] | None = None, bins: int = BINS) -> None:
        self.k = k
        self._bins = bins
        self._low, self._high = 0, KEYS
        first, last = (_key(score) for score in guess) if guess else (0, KEYS - 1)
        self.window = _window(first, last + 1, bins)

    @property
    def done(self) -> bool:
        return self._high - self._low == 1

    @property
    def value(self) -> float:
        """The order statistic, once it is found."""
        return float(np.int32(self._low).view(np.float32))

    def narrow(self, counts: npt.NDArray[np.int64]) -> None:
        """Take the counts of all scores in :attr:`window`, from :func:`rkif_kernels.count_scores_`."""
        low, shift, bins = self.window
        bin_ = int(np.searchsorted(np.cumsum(counts), self.k, side="right")) - 1  # -1: below the window
        if bin_ >= 0:
            self._low = max(self._low, low + (bin_ << shift))
        if bin_ < bins:
            self._high = min(self._high, low + ((bin_ + 1) << shift))
        self.window = _window(self._low, self._high, self._bins)

    def state(self) -> list[int]:
        """The state of the search, for :meth:`restored`."""
        return [self.k, self._low, self._high, *self.window]

    @classmethod
    def restored(cls, state: list[int]) -> CountingSearch:
        search = cls(state[0])
        search._low, search._high = state[1:3]
        search.window = Window(*state[3:])
        return search


def _window(low: int, high: int, bins: int) -> Window:
    """The window of the keys in [low, high), in at most ``bins`` bins that are as narrow as possible."""
    shift = max((high - low - 1).bit_length() - bins.bit_length() + 1, 0)
    return Window(low, shift, -(-(high - low) // (1 << shift)))


def _key(score: float) -> int:
    return int(np.float32(score).view(np.int32)) if score > 0 else 0
