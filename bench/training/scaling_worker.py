"""A process of ``python -m bench scaling``: it fuses shards, and counts the bytes passed to collectives."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import rkif
from bench.common.machine import device_name
from rkif.distributed.process_group import ProcessGroup
from rkif_kernels.selection.counting import CountingSearch

ROUNDS = 7
SIZE, LAYERS = 2048, 4
SUMMED = 1 << 23


def main() -> None:
    """Time fusions of a sharded model, and of an unsharded one in this process alone."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    handed: list[int] = []
    windows: list[int] = []
    narrow = CountingSearch.narrow

    def counted(collective: Callable[[ProcessGroup, Tensor], Tensor]) -> Callable[..., Tensor]:
        def call(group: ProcessGroup, tensor: Tensor) -> Tensor:
            handed.append(tensor.nbytes)
            return collective(group, tensor)

        return call

    def counted_narrow(search: CountingSearch, counts: Any) -> None:
        windows.append(search.window.bins)
        narrow(search, counts)

    for name in ("all_reduce_sum", "all_gather"):
        patch.object(ProcessGroup, name, counted(getattr(ProcessGroup, name))).start()
    patch.object(CountingSearch, "narrow", counted_narrow).start()
    times: dict[str, list[float]] = {"alone": [], "together": []}
    for kind, taken in times.items():
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(SIZE, SIZE, bias=False) for _ in range(LAYERS)))
        if kind == "together":
            fully_shard(model)
        elif dist.get_rank():
            continue
        fuser = rkif.Fuser(model)
        for _ in range(ROUNDS):
            _step(fuser)
            fuser.begin_outer()
            _step(fuser)
            handed.clear()
            windows.clear()
            start = time.perf_counter()
            fuser.fuse()
            taken.append(time.perf_counter() - start)
        if kind == "alone":
            del fuser, model
    sums = []
    for _ in range(ROUNDS):
        tensor = torch.zeros(SUMMED // 8, dtype=torch.int64)
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(tensor)
        sums.append(time.perf_counter() - start)
    if dist.get_rank() == 0:
        row = {
            "parameters": SIZE * SIZE * LAYERS,
            "ranks": dist.get_world_size(),
            "rounds": ROUNDS,
            "fuse_ms": 1e3 * median(times["together"]),
            "alone_ms": 1e3 * median(times["alone"]),
            "handed_bytes": sum(handed),
            "passes": len(windows) // 2,
            "bins": sum(windows),
            "summed_bytes": SUMMED,
            "sum_ms": 1e3 * median(sums),
            "device": device_name(torch.device("cpu")).partition(",")[0],
            "threads": 1,
        }
        print(json.dumps(row))
    dist.destroy_process_group()


@torch.no_grad()
def _step(fuser: rkif.Fuser) -> None:
    for parameter in fuser.parameters.values():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        gradient = torch.randn(local.shape)
        whole = gradient
        if isinstance(parameter, DTensor):
            whole = DTensor.from_local(gradient, parameter.device_mesh, parameter.placements)
        parameter.grad = whole
        local.sub_(gradient, alpha=1e-3)
    fuser.observe()


if __name__ == "__main__":
    main()
