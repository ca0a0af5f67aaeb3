"""The trainable parameters, and flat memory for their importance."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from rkif.distributed.shards import fsdp_units, is_dtensor, reshard, to_local
from rkif_kernels import Arguments, Views, require_disjoint

# Wrappers of submodules, whose attribute is a part of parameters' names.
_INSIDE = re.compile(r"\b(_orig_mod|_checkpoint_wrapped_module)\.")


def parameter_copies(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name -> detached copy."""
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def trainable_parameters(source: nn.Module | Iterable[tuple[str, nn.Parameter]]) -> dict[str, nn.Parameter]:
    """Name -> trainable parameter, in the model's order. Names have no prefix of a wrapper.

    Raises:
        TypeError: ``source`` is neither a module nor pairs of a name and a parameter, a dtype is not one that
            rkif computes with, or the parameters are DeepSpeed's or those of the first FSDP.
        ValueError: a name is given twice, two parameters share memory, nothing is trainable, or parameters
            are on several devices.
    """
    pairs: Any = source
    reshard(fsdp_units(source))
    if isinstance(source, nn.Module):
        _refuse_flat(source)
        named = unwrapped(source).named_parameters()
        pairs = ((_INSIDE.sub("", name), parameter) for name, parameter in named)
    parameters: dict[str, Any] = {}
    for pair in pairs if isinstance(pairs, Iterable) else [pairs]:
        match pair:
            case (str() as name, Tensor() as parameter):
                if name in parameters:
                    raise ValueError(f"the parameter name {name!r} is given twice")
                _refuse_zero(name, parameter)
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
    require_separate_memory(parameters)
    return parameters


def require_separate_memory(parameters: Mapping[str, Tensor]) -> None:
    """Check that every parameter has memory of its own.

    Raises:
        TypeError: a dtype is not one that rkif computes with.
        ValueError: memory is freed, or shared by two parameters or by elements of one.
    """
    for name, parameter in parameters.items():
        _refuse_freed(name, parameter)
    arguments = Arguments(list(parameters))
    parts = [to_local(parameter) for parameter in parameters.values()]
    arguments.add("parameters", parts)
    require_disjoint(arguments, parts, {}, argument="parameters")


def unwrapped(module: nn.Module) -> nn.Module:
    """The model inside ``torch.compile``, DDP and nn.DataParallel, in whatever order they are wrapped."""
    while True:
        if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
            module = module.module
        elif isinstance(inside := getattr(module, "_orig_mod", None), nn.Module):
            module = inside
        else:
            return module


def _refuse_flat(module: nn.Module) -> None:
    for inside in module.modules():
        # By name: importing the class would cause a deprecation warning.
        if type(inside).__name__ == "FullyShardedDataParallel":
            raise TypeError(
                "FullyShardedDataParallel (FSDP1) flattens many parameters into one; use FSDP2: "
                "torch.distributed.fsdp.fully_shard(model), or fsdp_version: 2 in accelerate"
            )
        if type(inside).__name__ == "DeepSpeedEngine":
            _refuse_deepspeed("a DeepSpeedEngine")


def _refuse_zero(name: str, parameter: Tensor) -> None:
    # ZeRO sets these attributes: an id (stage 3), and the link to the float32 master (stages 1 to 3).
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        _refuse_deepspeed(f"the parameter {name!r}")


def _refuse_freed(name: str, parameter: Tensor) -> None:
    steps = zip(parameter.shape, parameter.stride(), strict=True)
    reach = parameter.itemsize * (1 + sum((size - 1) * step for size, step in steps))
    if parameter.numel() and not is_dtensor(parameter) and parameter.untyped_storage().nbytes() < reach:
        raise ValueError(
            f"the memory of parameter {name!r} is freed: FSDP2 had gathered it for a forward pass; "
            "give the module, or list its parameters after reshard()"
        )


def _refuse_deepspeed(what: str) -> None:
    raise TypeError(
        f"{what} is DeepSpeed's: its ZeRO keeps gradients and float32 masters in buffers of its own, so that "
        ".grad is not the gradient and a fusion of the weights would be undone by the next step; use "
        "FSDP2 (fully_shard) or DDP instead"
    )


def arena(shapes: Sequence[torch.Size], dtype: torch.dtype, device: torch.device) -> Views:
    """Views of one flat zeroed tensor, in the given shapes, each starting on a 64-byte boundary."""
    starts, total = aligned_starts([shape.numel() for shape in shapes], dtype)
    flat = torch.zeros(total, dtype=dtype, device=device)
    rows = zip(starts, shapes, strict=True)
    return Views.of(flat, (flat[start : start + shape.numel()].view(shape) for start, shape in rows))


def aligned_starts(sizes: Sequence[int], dtype: torch.dtype) -> tuple[list[int], int]:
    """The start of each tensor in a flat one, on 64-byte boundaries, and the size of the flat one."""
    step = 64 // dtype.itemsize
    ends = [0, *accumulate(-(-size // step) * step for size in sizes)]
    return ends[:-1], ends[-1]


def short_name(name: str) -> str:
    """A short name for display: without prefixes and suffixes that most parameters share."""
    return re.sub(r"^(base_model\.model\.|model\.)+|(\.default)?\.weight$", "", name)
