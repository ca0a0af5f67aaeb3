"""Parameters that are sharded over processes: the local part of each, and the process that counts it.

Except for the thresholds, the method processes every element independently, so every process needs only its
local parts. Sharded parameters are ``DTensor``: ``fully_shard`` (FSDP2) and tensor parallelism make them. See
docs/guide/distributed.md.
"""

from __future__ import annotations

import gc
import hashlib
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rkif.distributed.process_group import ProcessGroup
from rkif.distributed.thresholds import sharded_thresholds
from rkif_kernels import Scope, Scores, score_thresholds

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


def is_dtensor(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is a ``DTensor``. Its module is slow to import; until it is, there are none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def fsdp_units(source: Any) -> list[FSDPModule]:
    """The modules that FSDP2 has sharded: those inside ``source``, or all if it is not a module."""
    module = sys.modules.get("torch.distributed.fsdp")  # not imported here, as in is_dtensor
    if module is None or not dist.is_initialized():
        return []
    inside = source.modules() if isinstance(source, nn.Module) else gc.get_objects()
    units: list[Any] = [one for one in inside if issubclass(type(one), module.FSDPModule)]
    return units


def reshard(units: Iterable[FSDPModule]) -> None:
    """Free gathered parameters, which FSDP2 keeps after a forward pass without a backward pass.

    After that, the modules' parameters are the shards, and the next forward pass gathers their new values.
    """
    for unit in units:
        unit.reshard()


@torch.no_grad()
def to_local(tensor: Tensor) -> Tensor:
    """The local part of a sharded tensor, or a plain tensor; detached, not copied."""
    return tensor.to_local() if is_dtensor(tensor) else tensor.detach()


@torch.no_grad()
def to_local_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """The part of ``tensor``, of the parameter's shape, that matches the local part of ``parameter``."""
    if is_dtensor(parameter):
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = parameter.device_mesh, parameter.placements
        if is_dtensor(tensor):
            if tensor.device_mesh == mesh:
                return tensor.redistribute(mesh, placements).to_local()
            tensor = tensor.full_tensor()  # DTensor cannot be redistributed from one mesh to another
        return distribute_tensor(tensor, mesh, placements, src_data_rank=None).to_local()
    return to_whole(tensor)


@torch.no_grad()
def to_whole(tensor: Tensor) -> Tensor:
    """The whole tensor, detached; a sharded one is gathered, for which all processes must call."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor.detach()


def to_dtensor_like(part: Tensor, parameter: Tensor) -> Tensor:
    """A local part as a DTensor that is sharded like ``parameter``; unchanged if the parameter is plain."""
    if not is_dtensor(parameter):
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


def _counts(parameter: Tensor) -> bool:
    """Whether this process counts its part of a parameter. Of replicas, only the first is counted."""
    if not is_dtensor(parameter):
        return True
    coordinate = parameter.device_mesh.get_coordinate()
    pairs = zip(coordinate or (), parameter.placements, strict=True)
    return all(place == 0 for place, placement in pairs if placement.is_replicate())


class ShardedParameters:
    """The local parts of a model's parameters, and the processes that hold the other parts or replicas.

    Args:
        source: the module or iterable with the parameters; replicas are found in a DDP module only.
        parameters: name -> parameter.

    Attributes:
        processes: the processes that hold the parameters.
        sharded: whether the parameters are sharded over them; if not, every process has all.
        sizes: number of elements of each parameter, over all processes.
        owned: indices of the parameters whose parts this process counts. Of replicas, only the first is.
        owned_and_others: these indices as a list, and a list of all others.

    Raises:
        ValueError: some parameters are sharded and others are not, or over other processes; or a parameter is
            a sum of parts (Partial).
    """

    def __init__(self, source: Any, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = parameters
        self.processes, self.sharded = _processes_of(source, list(parameters.items()))
        self._units: WeakSet[FSDPModule] = WeakSet(fsdp_units(source) if self.sharded else ())
        self.sizes = [parameter.numel() for parameter in parameters.values()]
        flags = [_counts(parameter) for parameter in parameters.values()]
        self.owned_and_others = [
            [n for n, flag in enumerate(flags) if flag == wanted] for wanted in (True, False)
        ]
        self.owned = frozenset(self.owned_and_others[0])

    def parts(self) -> list[Tensor]:
        """The parameters, or their local parts; not copies."""
        parameters = list(self._parameters.values())
        return [to_local(parameter) for parameter in parameters] if self.sharded else parameters

    def gradients(self) -> list[Tensor | None]:
        """The gradients of the parts; None for a missing one."""
        gradients = [parameter.grad for parameter in self._parameters.values()]
        if not self.sharded:
            return gradients
        pairs = zip(gradients, self._parameters.values(), strict=True)
        return [
            None if gradient is None else to_local_like(gradient, parameter) for gradient, parameter in pairs
        ]

    def invalidate_gathered(self) -> None:
        """Free FSDP2's gathered copies, which are out of date after a write to the parameters."""
        reshard(self._units)

    def to_dtensors(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Name -> part, as tensors that are sharded like the parameters."""
        return {name: to_dtensor_like(part, self._parameters[name]) for name, part in parts.items()}

    def all_reduce_sum(self, sums: Tensor) -> Tensor:
        """Sum over all processes; ``sums`` are those over the parts that this process counts."""
        return self.processes.all_reduce_sum(sums) if self.sharded else sums

    def max_over_replicas(self, counts: Tensor) -> Tensor:
        """Combine int64 [n] counts of local parts: the sum over shards, or the maximum over replicas."""
        if self.sharded:
            return self.processes.all_reduce_sum(counts)
        if self.processes.size == 1:
            return counts
        return self.processes.all_gather(counts).view(self.processes.size, -1).amax(0)

    def seen_anywhere(self, names: Collection[str]) -> Iterable[tuple[str, int]]:
        """Pairs of a parameter's name and a count, positive if any process has the name in ``names``.

        Empty for one process with all names.
        """
        if self.processes.size == 1 and len(names) == len(self._parameters):
            return ()
        seen = torch.tensor([int(name in names) for name in self._parameters])
        return zip(self._parameters, self.max_over_replicas(seen).tolist(), strict=True)

    def thresholds(
        self, scores: Scores, *, density: float, scope: Scope, indices: Sequence[int] | None = None
    ) -> Tensor:
        """:func:`rkif_kernels.score_thresholds` over all processes, of all parameters or some."""
        if indices is not None:
            scores = scores.subset(indices)
        if not self.sharded:
            return score_thresholds(scores, density=density, scope=scope)
        indices = range(len(self.sizes)) if indices is None else indices
        others = [place for place, index in enumerate(indices) if index not in self.owned]
        sizes = [self.sizes[index] for index in indices]
        return sharded_thresholds(
            scores.emptied(others), sizes, density=density, scope=scope, processes=self.processes
        )

    def require_agreement(self, *settings: Any) -> None:
        """Check that all ranks have the same settings and parameters; otherwise results differ or ranks hang.

        Raises:
            RuntimeError: a rank has other settings or other parameters.
        """
        described = [(name, p.shape, p.dtype) for name, p in self._parameters.items()]
        digest = hashlib.sha256(repr((settings, described)).encode()).digest()[:8]
        every = self.processes.all_gather(torch.tensor([int.from_bytes(digest, "big") >> 1])).tolist()
        for rank, other in enumerate(every):
            if other != every[0]:
                raise RuntimeError(
                    f"rank {rank} has another config, another gate or other parameters than rank 0"
                )


def _processes_of(source: Any, parameters: Sequence[tuple[str, Tensor]]) -> tuple[ProcessGroup, bool]:
    """The processes that hold the parameters, and whether the parameters are sharded over them."""
    sharded = [(name, p) for name, p in parameters if is_dtensor(p)]
    device = parameters[0][1].device
    if not sharded:
        inside = source.modules() if isinstance(source, nn.Module) else ()
        replicas = (m for m in inside if isinstance(m, nn.parallel.DistributedDataParallel))
        return ProcessGroup(next((m.process_group for m in replicas), None), device), False
    first_name, first = sharded[0]
    members = sorted(first.device_mesh.mesh.flatten().tolist())
    for name, parameter in parameters:
        if not is_dtensor(parameter):
            raise ValueError(
                f"{name!r} is a plain tensor, but {first_name!r} is sharded over processes: "
                "wrap the root module as well (fully_shard(model))"
            )
        if sorted(parameter.device_mesh.mesh.flatten().tolist()) != members:
            raise ValueError(f"{name!r} and {first_name!r} are sharded over different processes")
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
    return ProcessGroup(group, torch.device(first.device_mesh.device_type)), True
