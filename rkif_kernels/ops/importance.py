"""Importance of parameters, smoothed over steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from rkif_kernels.backends.choose import implementation, on_device
from rkif_kernels.checks import (
    STATE_DTYPES,
    Arguments,
    ValidatedLists,
    require_choice,
    require_disjoint,
    require_fraction,
    require_writable,
)
from rkif_kernels.profiling import profiled
from rkif_kernels.types import Backend, ImportanceInputs, Order, Smoothing

_validated = ValidatedLists()


def update_importance_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    sensitivity: Sequence[Tensor],
    uncertainty: Sequence[Tensor] | None = None,
    *,
    beta1: float,
    beta2: float = 0.0,
    order: Order = "first",
    nonfinite: Tensor,
    names: Sequence[str] | None = None,
    backend: Backend = "auto",
) -> None:
    r"""Update the smoothed sensitivity, and the uncertainty if there is one, of every parameter, in place.

    Element by element in float32, with one rounding at each store::

        I = |w*g|                 (order="first")
            (w*g)^2               (order="second")
            |w*g - (w*g)^2 / 2|   (order="mixed")
        S <- beta1*S + (1-beta1)*I
        U <- beta2*U + (1-beta2)*|I - S|      S just updated, before it is rounded to its storage dtype

    An element whose I is not finite keeps its S and U and is counted. The first-order form is the
    sensitivity of PLATON (Zhang et al., 2022), with its uncertainty as in AdaLoRA (Zhang et al., 2023).

    Args:
        params: weights, any shapes; float32, bfloat16 or float16, also mixed.
        grads: their gradients, of the same shapes; None counts as a zero gradient.
        sensitivity: S, of the same shapes, contiguous, float32 or bfloat16; mutated.
        uncertainty: U, as ``sensitivity``; mutated. None if only the sensitivity is used.
        beta1, beta2: smoothing in [0, 1]. ``1 - beta`` is formed in double and rounded to float32 once.
        order: the form of I.
        nonfinite: int64 tensor of one element on the same device; mutated. The number of elements with a
            non-finite I is added to it, without waiting for the device.
        names: parameter names, for error messages.
        backend: "auto", "triton", "native" or "torch"; all give the same bits.

    Raises:
        TypeError, ValueError: for tensors that do not fit together; nothing has been written.
    """
    if torch.compiler.is_compiling():
        # The compiler treats the call as one opaque operation; names are not passed.
        update = torch.ops.rkif.update_importance_
        update(params, grads, sensitivity, uncertainty or [], beta1, beta2, order, nonfinite, backend)
        return
    inputs = ImportanceInputs(params, grads, sensitivity, uncertainty)
    smoothing = Smoothing(beta1, beta2, order)
    require_importance(inputs, smoothing, nonfinite, names)
    device = inputs.device
    with torch.no_grad(), on_device(device), profiled("rkif.observe", device):
        implementation(device, backend).update_importance_(inputs, smoothing, nonfinite)


def require_importance(
    inputs: ImportanceInputs, smoothing: Smoothing, nonfinite: Tensor, names: Sequence[str] | None
) -> None:
    """Check the arguments of :func:`update_importance_`."""
    params, grads, sensitivity, uncertainty = (
        inputs.params, inputs.grads, inputs.sensitivity, inputs.uncertainty
    )  # fmt: skip
    arguments = Arguments(names)
    key = _validated.key(params=params, grads=grads, sensitivity=sensitivity, uncertainty=uncertainty)
    if key not in _validated:
        arguments.add("params", params)
        arguments.add("grads", grads, optional=True)
        arguments.add("sensitivity", sensitivity, STATE_DTYPES)
        if uncertainty is not None:
            arguments.add("uncertainty", uncertainty, STATE_DTYPES)
        for argument, states in (("sensitivity", sensitivity), ("uncertainty", uncertainty or ())):
            for index, state in enumerate(states):
                if not state.is_contiguous():
                    raise ValueError(f"{arguments.label(argument, index)} must be contiguous")
        others = {"params": params, "grads": grads}
        written = {"sensitivity": sensitivity, "uncertainty": uncertainty or ()}
        for argument, states in written.items():
            rest = {name: tensors for name, tensors in written.items() if name != argument}
            require_disjoint(arguments, states, others | rest, argument, counterparts=False)
            require_writable(arguments, argument, states)
        _validated.add(key)
    require_smoothing(smoothing, nonfinite, inputs.device)


def require_smoothing(smoothing: Smoothing, nonfinite: Tensor, device: torch.device) -> None:
    """Check the settings of an update of the importance, and its counter."""
    require_fraction("beta1", smoothing.beta1)
    require_fraction("beta2", smoothing.beta2)
    require_choice("order", smoothing.order, get_args(Order))
    if nonfinite.dtype != torch.int64 or nonfinite.numel() != 1 or nonfinite.device != device:
        raise ValueError(
            f"nonfinite must be one int64 on {device}; "
            f"got {nonfinite.dtype} {tuple(nonfinite.shape)} on {nonfinite.device}"
        )
    require_writable(Arguments(), "nonfinite", [nonfinite])
