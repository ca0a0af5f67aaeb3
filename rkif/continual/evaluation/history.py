"""Statistics of a task's rounds by tensor, for the plots of a report."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rkif.fusion import FusionReport
from rkif.ledger.records import selection


class RoundHistory:
    """Tensors with one row per round, which a checkpoint can store.

    - ``norms``: float64 [rounds, 3], L2 norms of the inner task vector, the outer one and the update.
    - ``importance.NAME``, for each parameter: float32 [rounds, 2], its mean inner and outer score.
    - ``counts.NAME``, for each parameter: int64 [rounds, 4], its elements by the learners that selected them:
      inner only, outer only, both, neither.
    """

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}

    def add(self, inner: Mapping[str, Tensor], outer: Mapping[str, Tensor], report: FusionReport) -> None:
        """Add a round.

        Args:
            inner, outer: name -> scores of the learner before the fusion.
            report: the report of the fusion.
        """
        self._append("norms", torch.tensor(list(report.norms.values()), dtype=torch.float64))
        means, counts = selection(inner, outer, report)
        for index, name in enumerate(inner):
            self._append(f"importance.{name}", means[index])
            taken = name not in report.missing
            self._append(f"counts.{name}", counts[index] if taken else torch.zeros_like(counts[index]))

    def _append(self, name: str, row: Tensor) -> None:
        rows = self._tensors.get(name, row.new_empty((0, *row.shape)))
        self._tensors[name] = torch.cat([rows, row[None]])

    def tensors(self) -> dict[str, Tensor]:
        return dict(self._tensors)

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)
