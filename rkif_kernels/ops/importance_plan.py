"""Repeated updates of the same importance: arguments are checked and the launch prepared once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rkif_kernels.backends.choose import implementation, on_device
from rkif_kernels.ops.guards import Description, describe
from rkif_kernels.ops.importance import require_importance
from rkif_kernels.profiling import profiled
from rkif_kernels.types import Backend, ImportanceInputs, Smoothing

# A prepared step on the current device. It takes weights, gradients, settings, and the gradients' addresses
# if one has changed since the last step.
Step = Callable[[Sequence[Tensor], Sequence[Tensor | None], Smoothing, list[int] | None], None]


class ImportancePlan:
    """:func:`rkif_kernels.update_importance_` for the same states in every step, at lower cost per call.

    The lists are validated and their addresses sent to the device once. A step compares addresses, dtypes,
    shapes and strides of weights and gradients. If nothing has changed, it only launches. If gradients have
    new addresses, it sends these. After other changes (a weight with a new address, another dtype, a gradient
    that is missing or present again), it validates the lists again, as a new plan does.

    Several threads and several CUDA streams may use a plan; each step waits for the previous one. After a
    step outside of a capture, a step can be captured in a CUDA graph and replayed any number of times. Its
    gradients are allocated before or during the capture. The plan must outlive the graph.

    Args:
        sensitivity, uncertainty, nonfinite, names, backend: as for that function. On Triton the states
            must start on boundaries of 16 bytes.
        smoothing: the betas, and the form of the importance.

    Raises:
        TypeError, ValueError: by :meth:`update`, for tensors that do not fit together; nothing has been
            written.
    """

    def __init__(
        self,
        sensitivity: Sequence[Tensor],
        uncertainty: Sequence[Tensor] | None = None,
        *,
        smoothing: Smoothing,
        nonfinite: Tensor,
        names: Sequence[str] | None = None,
        backend: Backend = "auto",
    ) -> None:
        self._states = sensitivity, uncertainty
        self._smoothing, self._nonfinite = smoothing, nonfinite
        self._frozen = smoothing.frozen
        self._names, self._backend = names, backend
        self._lock = threading.Lock()
        self._bound: _Bound | None = None
        self._captured: dict[Any, Any] = {}  # what the backend keeps for CUDA graphs
        # Views share the version counter of their flat tensor; autograd must see it change.
        owners = [_owner(state) for state in (*sensitivity, *(uncertainty or ()))]
        self._owners = list({id(owner): owner for owner in owners}.values())

    def update(
        self, params: Sequence[Tensor], grads: Sequence[Tensor | None], *, frozen: bool = False
    ) -> None:
        """Update the importance by one step.

        Args:
            params, grads: as for :func:`rkif_kernels.update_importance_`.
            frozen: leave S and U unchanged, and only count non-finite elements.
        """
        smoothing = self._frozen if frozen else self._smoothing
        with self._lock:
            bound, moved = self._bound, None
            weights, gradients = describe(params), describe(grads)
            if bound is None or weights != bound.params or gradients.kinds != bound.grads.kinds:
                bound = _Bound(self._prepare(params, grads), weights, gradients)
            elif gradients.addresses != bound.grads.addresses:
                bound, moved = bound._replace(grads=gradients), gradients.address_list()
            # If the launch fails, the next step validates again.
            self._bound = None
            device = self._nonfinite.device
            with on_device(device), profiled("rkif.observe", device):
                bound.step(params, grads, smoothing, moved)
            self._bound = bound
        torch.autograd.graph.increment_version(self._owners)

    def _prepare(self, params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> Step:
        inputs = ImportanceInputs(list(params), list(grads), *self._states)
        require_importance(inputs, self._smoothing, self._nonfinite, self._names)
        module = implementation(inputs.device, self._backend)
        make = getattr(module, "PreparedUpdate", None)
        if make is None:
            return self._unprepared(module)
        with torch.no_grad(), on_device(inputs.device):
            prepared = make(inputs, self._smoothing.order, self._nonfinite, self._captured)
        step: Step = prepared.launch
        return step

    def _unprepared(self, module: ModuleType) -> Step:
        """The step of a backend that prepares nothing."""
        # The step does not refer to the plan: a reference cycle would keep the states alive until a
        # collection.
        states, counter = self._states, self._nonfinite

        def step(
            params: Sequence[Tensor], grads: Sequence[Tensor | None], smoothing: Smoothing, _moved: object
        ) -> None:
            inputs = ImportanceInputs(params, grads, *states)
            with torch.no_grad():
                module.update_importance_(inputs, smoothing, counter)

        return step


class _Bound(NamedTuple):
    """A prepared step, the weights that it was prepared for, and the gradients of the last step."""

    step: Step
    params: Description
    grads: Description


def _owner(view: Tensor) -> Tensor:
    """The tensor that ``view`` is a view of, or the tensor itself."""
    return view if view._base is None else view._base
