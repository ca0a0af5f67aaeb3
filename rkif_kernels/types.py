"""Types that every layer of the package shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

Order = Literal["first", "second", "mixed"]
Scope = Literal["global", "tensor"]
OuterFrom = Literal["inner", "base"]
Backend = Literal["auto", "triton", "native", "torch"]

# Which learners selected an element.
CASES = ("inner_only", "outer_only", "both", "neither")
# (inner, outer) weights of the four cases, in this order.
CaseWeights = tuple[tuple[float, float], tuple[float, float], tuple[float, float], tuple[float, float]]


@dataclass(frozen=True)
class Scores:
    """Importance scores of a list of tensors: ``sensitivity``, or ``sensitivity * uncertainty`` in float32.

    The product is never stored: every reader forms it from the two where it needs it. With ``distance`` it is
    ``|sensitivity - uncertainty|`` instead, see :func:`magnitudes`.
    """

    sensitivity: Sequence[Tensor]
    uncertainty: Sequence[Tensor] | None = None
    distance: bool = False


def magnitudes(ends: Sequence[Tensor], starts: Sequence[Tensor]) -> Scores:
    """The magnitudes of a task vector, ``|end - start|`` in float32, as scores; never stored either."""
    return Scores(ends, starts, distance=True)


class FuseStats(NamedTuple):
    """What a fusion did, on the device of the parameters: reading it is what synchronises.

    Attributes:
        counts: int64 [4], elements selected by the inner learner only, the outer only, both, neither.
        squared_norms: float64 [3], squared L2 norms of the inner task vector, the outer task vector and
            ``out - base`` (with ``out`` as stored).
        thresholds: (inner, outer), float32 [1], or one for each tensor.
    """

    counts: Tensor
    squared_norms: Tensor
    thresholds: tuple[Tensor, Tensor]
