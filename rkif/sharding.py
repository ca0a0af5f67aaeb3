"""Parameters that are spread over processes: the part that lies here, and whose it is to count.

What the method does to an element needs that element alone, except for the thresholds, so every process works
on its own parts. Spread parameters are ``DTensor``: what ``fully_shard`` (FSDP2) and tensor parallelism make
of a model. docs/distributed.md says how they fit together.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rkif.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_spread(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is a ``DTensor``; its module, slow to import, has been imported by whoever has one."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies in this process, not a copy; a plain tensor itself, detached."""
    return tensor.to_local() if is_spread(tensor) else tensor.detach()


@torch.no_grad()
def local_as(tensor: Tensor, parameter: Tensor) -> Tensor:
    """What of ``tensor``, of the parameter's shape, belongs to this process's part of ``parameter``."""
    if is_spread(parameter):
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = parameter.device_mesh, parameter.placements
        if is_spread(tensor):
            return tensor.redistribute(mesh, placements).to_local()
        return distribute_tensor(tensor, mesh, placements, src_data_rank=None).to_local()
    return tensor.full_tensor() if is_spread(tensor) else tensor.detach()


def spread_as(part: Tensor, parameter: Tensor) -> Tensor:
    """A local part as a tensor that is spread as ``parameter`` is; as it is where the parameter is plain."""
    if not is_spread(parameter):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def owned(parameter: Tensor) -> bool:
    """Whether this process counts its part: of replicas only the first does. A plain one counts for all."""
    if not is_spread(parameter):
        return True
    coordinate = parameter.device_mesh.get_coordinate()
    pairs = zip(coordinate or (), parameter.placements, strict=True)
    return all(place == 0 for place, placement in pairs if placement.is_replicate())


def ranks_of(source: Any, parameters: Sequence[tuple[str, Tensor]]) -> tuple[Ranks, bool]:
    """The processes that hold the parameters, and whether these are spread over them.

    Raises:
        ValueError: some parameters are spread and others are not, or not over the same processes; or a
            parameter is a sum of parts.
    """
    spread = [(name, p) for name, p in parameters if is_spread(p)]
    device = parameters[0][1].device
    if not spread:
        replicas = isinstance(source, nn.parallel.DistributedDataParallel)
        return Ranks(source.process_group if replicas else None, device), False
    first_name, first = spread[0]
    members = sorted(first.device_mesh.mesh.flatten().tolist())
    for name, parameter in parameters:
        if not is_spread(parameter):
            raise ValueError(
                f"{name!r} is a plain tensor, but {first_name!r} is spread over processes: "
                "wrap the root module, too (fully_shard(model))"
            )
        if sorted(parameter.device_mesh.mesh.flatten().tolist()) != members:
            raise ValueError(f"{name!r} is spread over other processes than {first_name!r}")
        if any(placement.is_partial() for placement in parameter.placements):
            raise ValueError(
                f"{name!r} is a sum of parts (Partial); a parameter must be sharded or replicated"
            )
    group: Any
    if first.device_mesh.ndim == 1:
        group = first.device_mesh.get_group()
    elif members == list(range(dist.get_world_size())):
        group = dist.group.WORLD
    else:
        group = dist.new_group(members, use_local_synchronization=True)
    return Ranks(group, torch.device(first.device_mesh.device_type)), True
