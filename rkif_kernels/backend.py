"""Which implementation an operation runs on."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from types import ModuleType
from typing import get_args

import torch

from rkif_kernels.types import Backend


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors: TRITON_INTERPRET=1 before import."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def resolve_backend(device: torch.device, requested: str) -> str:
    """Choose "triton" or "torch" for tensors on ``device``.

    "auto" takes Triton for CUDA and ROCm tensors where Triton is installed, and torch for everything else:
    the results are the same bits, so the choice is one of speed alone.

    Raises:
        ValueError: ``requested`` is not a backend.
        RuntimeError: "triton" was asked for and cannot run on ``device``.
    """
    if requested not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}; got {requested!r}")
    if requested == "auto":
        compiled = device.type == "cuda" and _triton_installed() and not interpreting()
        return "triton" if compiled else "torch"
    if requested == "triton":
        if not _triton_installed():
            raise RuntimeError("backend='triton' was requested, but triton is not installed")
        if device.type == "cpu" and not interpreting():
            raise RuntimeError(
                "backend='triton' was requested for CPU tensors; "
                "that needs TRITON_INTERPRET=1 in the environment"
            )
        if device.type == "cuda" and interpreting():
            raise RuntimeError("backend='triton' cannot reach CUDA tensors while TRITON_INTERPRET is set")
        if device.type not in ("cuda", "cpu"):
            raise RuntimeError(f"backend='triton' was requested, but it does not support device {device}")
    return requested


def on_device(device: torch.device) -> torch.cuda.device:
    """Make ``device`` the current one: kernels are launched there, whatever the addresses they are given."""
    return torch.cuda.device(device.index if device.type == "cuda" else -1)


def implementation(device: torch.device, requested: str) -> ModuleType:
    """The module that implements the operations; the only place from which Triton is ever imported."""
    name = {"triton": "kernels", "torch": "torch_backend"}[resolve_backend(device, requested)]
    return importlib.import_module(f"rkif_kernels.{name}")
