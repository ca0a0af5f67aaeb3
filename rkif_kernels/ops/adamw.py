"""AdamW, with the importance of the parameters updated in the same pass over memory."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rkif_kernels.backends.choose import implementation, on_device
from rkif_kernels.checks import (
    STATE_DTYPES,
    Arguments,
    ValidatedLists,
    require_disjoint,
    require_whole_number,
    require_writable,
)
from rkif_kernels.numerics import FLOAT32_MAX, float32
from rkif_kernels.ops.importance import require_smoothing
from rkif_kernels.types import AdamWConstants, AdamWInputs, Backend, Order, Smoothing

_validated = ValidatedLists()


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    sensitivity: Sequence[Tensor] | None = None,
    uncertainty: Sequence[Tensor] | None = None,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    beta1: float = 0.0,
    beta2: float = 0.0,
    order: Order = "first",
    nonfinite: Tensor | None = None,
    names: Sequence[str] | None = None,
    backend: Backend = "auto",
) -> None:
    r"""Update the importance from the weights before the step, and take an AdamW step, in place.

    With ``sensitivity``, S and U are updated with the bits of :func:`update_importance_`. Then follows the
    step (Loshchilov & Hutter, 2019, algorithm 2), with ``(b1, b2) = betas``, element by element in float32::

        m <- m + (1-b1)*(g - m)
        v <- b2*v + ((1-b2)*g)*g
        w <- (1 - lr*weight_decay)*w - (lr/(1-b1^step) * m) / (sqrt(v) * 1/sqrt(1-b2^step) + eps)

    The formulas are evaluated from left to right, without fused multiply-add, with one rounding at each
    store. Constants are formed in double and rounded to float32 once. The step uses the new m and v before
    they are rounded to their storage dtype. Float32 moves 44 bytes per element with S and U (36 with S only,
    28 without importance): w, g, m, v, S and U are read once, and all but g are written once.

    Args:
        params: weights, any shapes; float32, bfloat16 or float16, also mixed; mutated.
        grads: their gradients, of the same shapes.
        exp_avg, exp_avg_sq: m and v, of the same shapes, contiguous, float32 or bfloat16; mutated.
        sensitivity: S, as ``exp_avg``; mutated. None: no importance is updated.
        uncertainty: U, as ``exp_avg``; mutated. None if only the sensitivity is used.
        lr, betas, eps, weight_decay: the step's settings; ``lr``, ``eps`` and ``weight_decay`` not negative,
            ``betas`` in [0, 1). The constants of the formulas must be finite in float32.
        step: number of this step, counted from 1.
        beta1, beta2, order, nonfinite: the importance's, see :func:`update_importance_`. ``nonfinite`` is
            needed with ``sensitivity``.
        names: parameter names, for error messages.
        backend: "auto", "triton", "native" or "torch"; all give the same bits.

    Raises:
        TypeError, ValueError: for tensors that do not fit together, or settings out of range; nothing has
        been written.
    """
    constants = adamw_constants(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, step=step)
    inputs = AdamWInputs(params, grads, exp_avg, exp_avg_sq, sensitivity, uncertainty)
    _validate(inputs, names)
    device = inputs.device
    if sensitivity is not None and nonfinite is None:
        raise ValueError("nonfinite must be given with sensitivity; got None")
    if nonfinite is None:
        nonfinite = torch.zeros(1, dtype=torch.int64, device=device)
    smoothing = Smoothing(beta1, beta2, order)
    require_smoothing(smoothing, nonfinite, device)
    with torch.no_grad(), on_device(device):
        implementation(device, backend).adamw_(inputs, constants, smoothing, nonfinite)


def adamw_constants(
    *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, step: int
) -> AdamWConstants:
    """The constants of a step.

    Raises:
        ValueError: a setting is not a number, or out of its range; or float32 cannot hold a constant.
    """
    for argument, value in {"lr": lr, "eps": eps, "weight_decay": weight_decay}.items():
        if not _is_number(value) or not 0 <= value <= FLOAT32_MAX:
            raise ValueError(
                f"{argument} must be a non-negative number, finite in float32, not a tensor; got {value!r}"
            )
    try:
        b1, b2 = betas
    except (TypeError, ValueError):
        raise ValueError(f"betas must be two numbers in [0, 1); got {betas!r}") from None
    for index, beta in enumerate((b1, b2)):
        if not _is_number(beta) or not 0 <= beta < 1:
            raise ValueError(f"betas[{index}] must be a number in [0, 1), not a tensor; got {beta!r}")
    require_whole_number("step", step, minimum=1, bits=63)
    constants = AdamWConstants(
        decay=float32(1 - lr * weight_decay),
        take1=float32(1 - b1),
        keep2=float32(b2),
        take2=float32(1 - b2),
        unbias2=float32(1 / math.sqrt(1 - b2**step)),
        eps=float32(eps),
        step_size=float32(lr / (1 - b1**step)),
    )
    if not all(map(math.isfinite, constants)):
        raise ValueError(
            "lr, betas and weight_decay must give constants that are finite in float32; "
            f"got lr={lr!r}, betas={betas!r} and weight_decay={weight_decay!r}"
        )
    return constants


def _is_number(value: Any) -> bool:
    # Reading a tensor waits for the device, and its value could change between this check and the step.
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _validate(inputs: AdamWInputs, names: Sequence[str] | None) -> None:
    states = {
        "exp_avg": inputs.exp_avg,
        "exp_avg_sq": inputs.exp_avg_sq,
        "sensitivity": inputs.sensitivity,
        "uncertainty": inputs.uncertainty,
    }
    written = {argument: tensors for argument, tensors in states.items() if tensors is not None}
    lists = {"params": inputs.params, "grads": inputs.grads, **written}
    key = _validated.key(**lists)
    if key in _validated:
        return
    if inputs.uncertainty is not None and inputs.sensitivity is None:
        raise ValueError("uncertainty was given without sensitivity")
    arguments = Arguments(names)
    arguments.add("params", inputs.params)
    arguments.add("grads", inputs.grads)
    for argument, tensors in written.items():
        arguments.add(argument, tensors, STATE_DTYPES)
        for index, tensor in enumerate(tensors):
            if not tensor.is_contiguous():
                raise ValueError(f"{arguments.label(argument, index)} must be contiguous")
    for argument, tensors in {"params": inputs.params, **written}.items():
        rest = {name: others for name, others in lists.items() if name != argument}
        require_disjoint(arguments, tensors, rest, argument, counterparts=False)
        require_writable(arguments, argument, tensors)
    _validated.add(key)
