"""The choice of the backend that runs an operation."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import get_args

import torch

from rkif_kernels.backends.native.library import library
from rkif_kernels.types import Backend


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors: TRITON_INTERPRET=1 before import."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def available(device: torch.device) -> list[str]:
    """The backends that can run on ``device``; "auto" takes the first."""
    backends = []
    if device.type == "cuda" and _triton_installed() and not interpreting():
        backends.append("triton")
    if device.type == "cpu" and library() is not None:
        backends.append("native")
    backends.append("torch")
    if device.type == "cpu" and _triton_installed() and interpreting():
        backends.append("triton")  # for tests; the interpreter is slow
    return backends


def resolve_backend(device: torch.device, requested: str) -> str:
    """Choose "triton", "native" or "torch" for tensors on ``device``.

    "auto" is Triton for CUDA and ROCm tensors if Triton is installed, the compiled library for CPU tensors
    if it was built, and torch otherwise. All give the same bits, so the choice affects only speed.

    Raises:
        ValueError: ``requested`` is not a backend.
        RuntimeError: the requested backend cannot run on ``device``.
    """
    if requested not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}; got {requested!r}")
    backends = available(device)
    if requested == "auto":
        return backends[0]
    if requested not in backends:
        raise RuntimeError(f"backend={requested!r} was requested, but {_obstacle(requested, device)}")
    return requested


def _obstacle(backend: str, device: torch.device) -> str:
    """Why ``backend`` is not available on ``device``."""
    if backend == "triton" and not _triton_installed():
        return "triton is not installed"
    if backend == "triton" and device.type == "cpu":
        return "for CPU tensors it needs TRITON_INTERPRET=1 in the environment"
    if backend == "triton" and device.type == "cuda":
        return "it cannot reach CUDA tensors while TRITON_INTERPRET is set"
    if backend == "native" and device.type == "cpu":
        return (
            "its library was not built (was there a C++ compiler when rkif was installed?), "
            "or cannot be loaded, or is of another version: install rkif again"
        )
    return f"it does not support device {device}"


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make ``device`` the current one, because kernels are launched on the current device."""
    return torch.cuda.device(device.index) if device.type == "cuda" else nullcontext()


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def implementation(device: torch.device, requested: str) -> ModuleType:
    """The module that implements the operations. Triton is imported only through this function."""
    return importlib.import_module(f"rkif_kernels.backends.{resolve_backend(device, requested)}")
