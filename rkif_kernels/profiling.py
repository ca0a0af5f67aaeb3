"""Names of the operations for profilers; without a profiler they cost next to nothing."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def profiled(name: str, device: torch.device) -> AbstractContextManager[object]:
    """A range called ``name`` in the profile that is being taken.

    ``torch.profiler`` gets a ``record_function`` (it takes microseconds, so only while one runs); without
    one, tools that attach to the process, as Nsight Systems does, get an NVTX range on CUDA devices.
    """
    if torch.autograd._profiler_enabled():  # type: ignore[attr-defined]
        return torch.profiler.record_function(name)
    if device.type == "cuda" and hasattr(torch._C, "_nvtx"):  # PyTorch can be built without NVTX
        return torch.cuda.nvtx.range(name)
    return nullcontext()
