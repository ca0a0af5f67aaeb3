"""Repeated fusions of the same tensors: arguments are checked and launches prepared once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rkif_kernels.backends.choose import implementation, on_device
from rkif_kernels.checks import Arguments, require_writable
from rkif_kernels.ops.fuse import fits_one_pass, require_fusion, require_selection, select_and_fuse
from rkif_kernels.ops.guards import Description, describe
from rkif_kernels.ops.select import order_statistic_k
from rkif_kernels.profiling import profiled
from rkif_kernels.types import (
    Backend,
    FuseStats,
    FusionInputs,
    MergeRule,
    Scope,
    Views,
)

# Maximum number of prepared launches. From round to round, the copies of the parameters alternate between a
# few allocations.
_MAX_LAUNCHES = 4

# How a list is recognised. Of views: id and address of their flat tensor.
Location = tuple[int, int] | Description | None
# The location of each role, and whether the scores of each learner are distances.
Key = tuple[list[Location], tuple[bool, bool]]


class FusionPlan:
    """:func:`rkif_kernels.select_and_fuse_` for the same tensors in every round, at lower cost per call.

    A call compares addresses, dtypes, shapes and strides. If they are known, it only launches. Otherwise it
    validates the lists, and sends the addresses to the device.

    Several threads and several CUDA streams may use a plan. After a call outside of a capture, a call with
    the same tensors can be captured in a CUDA graph and replayed any number of times. What the graph reads is
    kept until the memory of these tensors is freed, also without the plan.

    Args:
        density, scope, names, backend: as for that function.
        rule: the weights of the cases, and where the outer task vector starts.

    Raises:
        TypeError, ValueError: for settings out of range; by :meth:`fuse`, for tensors that do not fit
        together, and nothing has been written.
    """

    def __init__(
        self,
        *,
        density: float,
        scope: Scope = "global",
        rule: MergeRule,
        names: Sequence[str] | None = None,
        backend: Backend = "auto",
    ) -> None:
        require_selection(density, scope)
        self._density, self._scope, self._rule = density, scope, rule
        self._names, self._backend = names, backend
        self._lock = threading.Lock()
        self._bound: list[_Bound] = []

    def __deepcopy__(self, _memo: object) -> FusionPlan:
        """A plan with the same settings and no prepared launches: a copied model has other addresses."""
        density, scope, rule = self._density, self._scope, self._rule
        return FusionPlan(density=density, scope=scope, rule=rule, names=self._names, backend=self._backend)

    def fuse(self, inputs: FusionInputs) -> FuseStats:
        """Select and fuse once; lists and result as for :func:`rkif_kernels.select_and_fuse_`."""
        # The flat tensor determines its views, so one address is compared instead of hundreds.
        locations = [None if row is None else _location(row) for row in inputs.lists]
        key = locations, (inputs.inner_scores.distance, inputs.outer_scores.distance)
        with self._lock:
            bound = next((bound for bound in self._bound if bound.key == key), None)
            if bound is None:
                bound = self._bind(inputs, key)
                self._bound = [bound, *self._bound][:_MAX_LAUNCHES]
            elif not isinstance(inputs.out, Views):
                # Descriptions do not tell whether inference mode made a tensor.
                require_writable(Arguments(self._names), "out", inputs.out)
            with torch.no_grad(), on_device(inputs.device), profiled("rkif.fuse", inputs.device):
                stats = (bound.launch or self._unprepared)(inputs)
        torch.autograd.graph.increment_version(inputs.out)
        return stats

    def _bind(self, inputs: FusionInputs, key: Key) -> _Bound:
        require_fusion(inputs, self._rule, self._names)
        module, launch = implementation(inputs.device, self._backend), None
        if hasattr(module, "prepared_fusion") and fits_one_pass(inputs, self._density, self._scope):
            with on_device(inputs.device):
                k = order_statistic_k(inputs.numel, self._density)
                launch = module.prepared_fusion(inputs, k, self._rule)
        views = [row for row in inputs.lists if isinstance(row, Views)]
        return _Bound(key, views, launch)

    def _unprepared(self, inputs: FusionInputs) -> FuseStats:
        """The fusion of lists for which the backend prepares nothing."""
        return select_and_fuse(inputs, self._rule, self._density, self._scope, self._backend)


class _Bound(NamedTuple):
    """A prepared launch, and the lists that it was prepared for."""

    key: Key
    views: list[Views]  # kept, so that no other list gets the id of one of them
    launch: Callable[[FusionInputs], FuseStats] | None  # None: the backend prepares nothing


def _location(row: Sequence[Tensor | None]) -> Location:
    return (id(row), row.flat.data_ptr()) if isinstance(row, Views) else describe(row)
