"""Several order statistics from counts: the searches of both learners, or of all tensors, run together."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from rkif_kernels.ops.select import count_scores_
from rkif_kernels.selection.counting import CountingSearch
from rkif_kernels.types import Scores


class CountingSearches:
    """While not :attr:`done`: :meth:`count` the scores of every search, in any parts, then :meth:`narrow`."""

    def __init__(self, searches: Iterable[CountingSearch]) -> None:
        self._searches = list(searches)
        self._begin()

    def _begin(self) -> None:
        bins = [1 if search.done else search.window.bins for search in self._searches]
        self._counts = [torch.zeros(size + 3, dtype=torch.int64, device="cpu") for size in bins]

    @property
    def done(self) -> bool:
        return all(search.done for search in self._searches)

    @property
    def valid(self) -> bool:
        """Whether all values counted since the last :meth:`narrow` are scores: finite, and not negative."""
        return not any(counts[-1] for counts in self._counts)

    @property
    def values(self) -> list[float]:
        """The order statistics, once all are found."""
        return [search.value for search in self._searches]

    def count(self, index: int, scores: Scores) -> None:
        """Count scores for one of the searches, unless it is done."""
        search = self._searches[index]
        if not search.done:
            counts = self._counts[index] = self._counts[index].to(scores.device)
            count_scores_(counts, scores, low=search.window.low, shift=search.window.shift)

    def narrow(self, total: Callable[[Tensor], Tensor] = lambda counts: counts) -> None:
        """Narrow every search by the counts.

        Args:
            total: sums int64 counts over all processes that count parts of the scores; all must call it.
        """
        left = [index for index, search in enumerate(self._searches) if not search.done]
        if left:
            counts = [self._counts[index] for index in left]
            sums = torch.split(total(torch.cat(counts)).cpu(), [part.numel() for part in counts])
            for index, part in zip(left, sums, strict=True):
                self._searches[index].narrow(part.numpy())
        self._begin()

    def state(self) -> dict[str, Tensor]:
        """Copies of the state of the searches, for :meth:`restore`."""
        searches = [search.state() for search in self._searches]
        counts = {f"counts.{index}": counts.cpu().clone() for index, counts in enumerate(self._counts)}
        return {"searches": torch.tensor(searches), **counts}

    def restore(self, state: dict[str, Tensor]) -> None:
        self._searches = [CountingSearch.restored(row) for row in state["searches"].tolist()]
        self._counts = [state[f"counts.{index}"] for index in range(len(self._searches))]
