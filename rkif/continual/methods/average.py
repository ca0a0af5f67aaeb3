"""The plain average of the two task vectors."""

from __future__ import annotations

from torch import Tensor

from rkif.continual.methods.merging import Merging


class Average(Merging):
    """``(tau_in + tau_out) / 2``."""

    def merge(self, name: str, inner: Tensor, outer: Tensor) -> Tensor:
        return (inner + outer) / 2
