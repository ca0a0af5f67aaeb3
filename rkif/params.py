"""Which parameters take part, and flat memory for what rkif keeps about them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from rkif_kernels.checks import Arguments, require_disjoint


def trainable_parameters(source: nn.Module | Iterable[tuple[str, nn.Parameter]]) -> dict[str, nn.Parameter]:
    """Name -> trainable parameter, in the model's order.

    Raises:
        TypeError: ``source`` is neither a module nor pairs of a name and a parameter, or a dtype is not one
            that rkif computes with.
        ValueError: a name comes twice, two parameters share memory, nothing is trainable, or parameters are
            on several devices.
    """
    pairs = source.named_parameters() if isinstance(source, nn.Module) else source
    parameters: dict[str, nn.Parameter] = {}
    for pair in pairs if isinstance(pairs, Iterable) else [pairs]:
        match pair:
            case (str() as name, Tensor() as parameter):
                if name in parameters:
                    raise ValueError(f"the parameter name {name!r} comes twice")
                if parameter.requires_grad:
                    parameters[name] = parameter
            case _:
                raise TypeError(
                    "expected an nn.Module or an iterable of (name, parameter), such as "
                    f"model.named_parameters(); got {type(source).__name__} with {type(pair).__name__}"
                )
    if not parameters:
        raise ValueError(
            "no parameter is trainable (requires_grad): there is nothing to fuse in a frozen model"
        )
    devices = sorted({str(parameter.device) for parameter in parameters.values()})
    if len(devices) > 1:
        raise ValueError(f"trainable parameters must be on one device; found {', '.join(devices)}")
    arguments = Arguments(list(parameters))
    arguments.add("parameters", list(parameters.values()))
    require_disjoint(arguments, list(parameters.values()), {}, argument="parameters")
    return parameters


def arena(
    shapes: Sequence[torch.Size], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, list[Tensor]]:
    """One flat zeroed tensor, and views of it in the given shapes, each starting on a 64-byte boundary."""
    step = 64 // dtype.itemsize
    starts, total = [], 0
    for shape in shapes:
        starts.append(total)
        total += -(-shape.numel() // step) * step
    flat = torch.zeros(total, dtype=dtype, device=device)
    views = [
        flat[start : start + shape.numel()].view(shape) for start, shape in zip(starts, shapes, strict=True)
    ]
    return flat, views


def short_name(name: str) -> str:
    """A parameter's name for people: without the wrappers that all of a model's have in common."""
    return re.sub(r"^(base_model\.model\.|model\.)+|(\.default)?\.weight$", "", name)
