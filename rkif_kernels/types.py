"""Types that all modules of the package share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

from rkif_kernels.numerics import float32

Order = Literal["first", "second", "mixed"]
Scope = Literal["global", "tensor"]
OuterFrom = Literal["inner", "base"]
Backend = Literal["auto", "triton", "native", "torch"]

# The four cases of an element: which learners selected it.
CASES = ("inner_only", "outer_only", "both", "neither")
# (inner, outer) weights of the four cases, in this order.
CaseWeights = tuple[tuple[float, float], tuple[float, float], tuple[float, float], tuple[float, float]]


# The order of a fusion's lists in every backend: the output, the inputs, and S and U of each learner. A
# kernel's dtypes have the same order.
ROLES = ("OUT", "BASE", "INNER", "OUTER", "INNER_S", "INNER_U", "OUTER_S", "OUTER_U")

TensorLists = tuple[Sequence[Tensor | None] | None, ...]


class Views(tuple[Tensor, ...]):
    """Views of one flat tensor, whose address determines the addresses of all views.

    Attributes:
        flat: the tensor.
    """

    flat: Tensor

    @classmethod
    def of(cls, flat: Tensor, views: Iterable[Tensor]) -> Views:
        made = cls(views)
        made.flat = flat
        return made


@dataclass(frozen=True)
class Scores:
    """Importance scores of a list of tensors: ``sensitivity``, or ``sensitivity * uncertainty`` in float32.

    The product is never stored: kernels compute it from the two tensors. With ``distance`` the scores are
    ``|sensitivity - uncertainty|``, see :func:`magnitudes`.
    """

    sensitivity: Sequence[Tensor]
    uncertainty: Sequence[Tensor] | None = None
    distance: bool = False

    def values(self, index: int, part: slice | None = None) -> Tensor:
        """The float32 scores of one tensor; negative and NaN scores are not replaced.

        Args:
            index: index of the tensor in the lists.
            part: elements of the flattened tensor to take; all of them, in its shape, by default.
        """
        lists = (self.sensitivity, self.uncertainty)
        tensors = [tensors[index].detach() for tensors in lists if tensors is not None]
        if part is not None:
            tensors = [tensor.reshape(-1)[part] for tensor in tensors]
        first, *second = (tensor.float() for tensor in tensors)
        if not second:
            return first
        return (first - second[0]).abs() if self.distance else first * second[0]

    def subset(self, indices: Iterable[int]) -> Scores:
        """The scores of some of the tensors, without a copy."""
        indices = list(indices)
        return self._of_each(lambda tensors: [tensors[index] for index in indices])

    def emptied(self, indices: Iterable[int]) -> Scores:
        """The scores with empty tensors at some indices, without a copy."""
        emptied = frozenset(indices)
        return self._of_each(
            lambda tensors: [t.reshape(-1)[:0] if index in emptied else t for index, t in enumerate(tensors)]
        )

    def _of_each(self, change: Callable[[Sequence[Tensor]], list[Tensor]]) -> Scores:
        uncertainty = None if self.uncertainty is None else change(self.uncertainty)
        return Scores(change(self.sensitivity), uncertainty, self.distance)

    @property
    def numel(self) -> int:
        """Number of scores in all tensors together."""
        return sum(tensor.numel() for tensor in self.sensitivity)

    @property
    def device(self) -> torch.device:
        """Where the tensors are; the CPU for empty lists."""
        return _device(self.sensitivity)


def magnitudes(ends: Sequence[Tensor], starts: Sequence[Tensor]) -> Scores:
    """The magnitudes of a task vector, ``|end - start|`` in float32, as scores; they are never stored."""
    return Scores(ends, starts, distance=True)


class _Inputs:
    """The lists of an operation, one entry per parameter; the first list is never None."""

    @property
    def lists(self) -> TensorLists:
        raise NotImplementedError

    @functools.cached_property
    def numel(self) -> int:
        """Number of elements in all parameters together."""
        return sum(map(Tensor.numel, self._parameters))

    @property
    def device(self) -> torch.device:
        """Where the tensors are; the CPU for empty lists."""
        return _device(self._parameters)

    @property
    def _parameters(self) -> Sequence[Tensor]:
        return cast(Sequence[Tensor], self.lists[0])


@dataclass(frozen=True)
class FusionInputs(_Inputs):
    """The lists of tensors that a fusion reads and writes, one entry per parameter.

    Attributes:
        out: the result; the only list that is written.
        base, inner, outer: parameters before the round, after the inner and after the outer learner.
        inner_scores, outer_scores: importance.
    """

    out: Sequence[Tensor]
    base: Sequence[Tensor]
    inner: Sequence[Tensor]
    outer: Sequence[Tensor]
    inner_scores: Scores
    outer_scores: Scores

    @property
    def lists(self) -> TensorLists:
        """All lists in the order of :data:`ROLES`; None for an uncertainty that is not used."""
        sides = (self.inner_scores, self.outer_scores)
        states = [part for side in sides for part in (side.sensitivity, side.uncertainty)]
        return self.out, self.base, self.inner, self.outer, *states

    @property
    def read(self) -> dict[str, Sequence[Tensor]]:
        """The lists that are read, by the name that errors give them."""
        read = {
            "base": self.base,
            "inner": self.inner,
            "outer": self.outer,
            "inner_scores": self.inner_scores.sensitivity,
            "inner_scores.uncertainty": self.inner_scores.uncertainty,
            "outer_scores": self.outer_scores.sensitivity,
            "outer_scores.uncertainty": self.outer_scores.uncertainty,
        }
        return {argument: tensors for argument, tensors in read.items() if tensors is not None}


@dataclass(frozen=True)
class TaskVectorInputs(_Inputs):
    """The lists of tensors that a merge of task vectors reads and writes, one entry per parameter.

    Attributes:
        out: the result; the only list that is written.
        base, inner, outer: parameters; both task vectors start from ``base``.
    """

    out: Sequence[Tensor]
    base: Sequence[Tensor]
    inner: Sequence[Tensor]
    outer: Sequence[Tensor]

    @property
    def lists(self) -> TensorLists:
        """All lists: out, base, inner, outer."""
        return self.out, self.base, self.inner, self.outer


class TaskVectorRule(NamedTuple):
    """How a merge of task vectors weights them.

    Attributes:
        weight: of the inner and of the outer task vector.
        factor: of the merged task vector.
        consensus: keep only elements that have the sign of the weighted sum (TIES).
        normalize: divide an element by the weights of the task vectors that have that sign.
    """

    weight: tuple[float, float]
    factor: float = 1.0
    consensus: bool = False
    normalize: bool = False


@dataclass(frozen=True)
class ImportanceInputs(_Inputs):
    """The lists of tensors that an update of the importance reads and writes, one entry per parameter.

    Attributes:
        params: weights.
        grads: their gradients; None counts as a zero gradient.
        sensitivity, uncertainty: S and U; written. ``uncertainty`` is None if only S is used.
    """

    params: Sequence[Tensor]
    grads: Sequence[Tensor | None]
    sensitivity: Sequence[Tensor]
    uncertainty: Sequence[Tensor] | None = None

    @property
    def lists(self) -> TensorLists:
        """All lists: weights, gradients, S, and U or None."""
        return self.params, self.grads, self.sensitivity, self.uncertainty


@dataclass(frozen=True)
class Smoothing:
    """How the importance is computed and smoothed over steps.

    Attributes:
        beta1, beta2: smoothing factors of the sensitivity and of the uncertainty, in [0, 1].
        order: the form of the importance.
    """

    beta1: float
    beta2: float = 0.0
    order: Order = "first"

    @functools.cached_property
    def factors(self) -> tuple[float, float, float, float]:
        """``(beta1, 1 - beta1, beta2, 1 - beta2)``, computed in double and rounded to float32 once."""
        beta1, beta2 = self.beta1, self.beta2
        return float32(beta1), float32(1 - beta1), float32(beta2), float32(1 - beta2)

    @property
    def frozen(self) -> Smoothing:
        """The same form of importance with betas of 1, which leave S and U unchanged: 1*S + 0*I."""
        return Smoothing(1.0, 1.0, self.order)


class MergeRule(NamedTuple):
    """How a fusion weights two task vectors.

    Attributes:
        weights: (w_in, w_out) for each of :data:`CASES`.
        outer_from: where the outer task vector starts.
    """

    weights: CaseWeights
    outer_from: OuterFrom = "inner"

    @property
    def factors(self) -> tuple[float, ...]:
        """The eight weights in float32, pair by pair."""
        return tuple(float32(weight) for pair in self.weights for weight in pair)


class AdamWConstants(NamedTuple):
    """The constants of an AdamW step: computed in double, rounded to float32 once. See :func:`adamw_`."""

    decay: float  # 1 - lr*weight_decay
    take1: float  # 1 - beta1
    keep2: float  # beta2
    take2: float  # 1 - beta2
    unbias2: float  # 1 / sqrt(1 - beta2^step)
    eps: float
    step_size: float  # lr / (1 - beta1^step)


@dataclass(frozen=True)
class AdamWInputs(_Inputs):
    """The lists of tensors that an AdamW step reads and writes, one entry per parameter.

    Attributes:
        params: weights; written.
        grads: their gradients.
        exp_avg, exp_avg_sq: first and second moment; written.
        sensitivity, uncertainty: S and U; written. None without importance, or without uncertainty.
    """

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    exp_avg: Sequence[Tensor]
    exp_avg_sq: Sequence[Tensor]
    sensitivity: Sequence[Tensor] | None = None
    uncertainty: Sequence[Tensor] | None = None

    @property
    def lists(self) -> TensorLists:
        """All lists: weights, gradients, moments, S or None, and U or None."""
        return (
            self.params,
            self.grads,
            self.exp_avg,
            self.exp_avg_sq,
            self.sensitivity,
            self.uncertainty,
        )

    @property
    def importance(self) -> ImportanceInputs | None:
        """The lists of the importance's update; None without importance."""
        if self.sensitivity is None:
            return None
        return ImportanceInputs(self.params, self.grads, self.sensitivity, self.uncertainty)


def _device(tensors: Sequence[Tensor]) -> torch.device:
    return tensors[0].device if tensors else torch.device("cpu")


class FuseStats(NamedTuple):
    """Statistics of a fusion, on the device of the parameters; reading them waits for the device.

    Attributes:
        counts: int64 [4], elements selected by the inner learner only, the outer only, both, neither.
        squared_norms: float64 [3], squared L2 norms of the inner task vector, the outer task vector and
            ``out - base`` (with ``out`` as stored).
        thresholds: (inner, outer), each float32 [1], or one value per tensor.
    """

    counts: Tensor
    squared_norms: Tensor
    thresholds: tuple[Tensor, Tensor]
