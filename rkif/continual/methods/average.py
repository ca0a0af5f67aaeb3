"""The plain average of the two task vectors."""

from __future__ import annotations

from torch import Tensor

from rkif.continual.methods.merging import Merging


class Average(Merging):
    """Half of what either learner added."""

    def merge(self, name: str, inner: Tensor, outer: Tensor) -> Tensor:
        return (inner + outer) / 2
