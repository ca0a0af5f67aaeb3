"""Names of the operations for profilers, at negligible cost without a profiler."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def profiled(name: str, device: torch.device) -> AbstractContextManager[object]:
    """Mark the block as a range called ``name`` in a profile.

    While ``torch.profiler`` runs, the range is a ``record_function``, which takes microseconds. Otherwise it
    is an NVTX range on CUDA devices, for tools such as Nsight Systems.
    """
    if torch.autograd._profiler_enabled():  # type: ignore[attr-defined]
        return torch.profiler.record_function(name)
    if device.type == "cuda" and hasattr(torch._C, "_nvtx"):  # PyTorch can be built without NVTX
        return torch.cuda.nvtx.range(name)
    return nullcontext()
