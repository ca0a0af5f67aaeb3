"""A process of ``python -m bench scaling``: it fuses shards, and counts the bytes passed to collectives."""

from __future__ import annotations

import json
import time
from statistics import median

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
    handed, windows = [0], [0]
    total, gathered, narrow = ProcessGroup.all_reduce_sum, ProcessGroup.all_gather, CountingSearch.narrow

    def counted_total(self: ProcessGroup, tensor: Tensor) -> Tensor:
        handed[0] += tensor.numel() * tensor.element_size()
        return total(self, tensor)

    def counted_gathered(self: ProcessGroup, tensor: Tensor) -> Tensor:
        handed[0] += tensor.numel() * tensor.element_size()
        return gathered(self, tensor)

    def counted_narrow(self: CountingSearch, counts: object) -> None:
        windows.append(self.window.bins)
        narrow(self, counts)  # type: ignore[arg-type]

    ProcessGroup.all_reduce_sum, ProcessGroup.all_gather = counted_total, counted_gathered  # type: ignore[method-assign]
    CountingSearch.narrow = counted_narrow  # type: ignore[method-assign]
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
            handed[0], windows[:] = 0, []
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
            "handed_bytes": handed[0],
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
