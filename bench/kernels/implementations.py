"""The implementations of an operation: rkif's backends and the baselines, with their names in rows."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from bench.kernels import baselines
from bench.kernels.shapes import ShapeSet
from rkif_kernels import score_thresholds, select_and_fuse_, update_importance_
from rkif_kernels.backends.choose import available
from rkif_kernels.types import Backend


@dataclass(frozen=True)
class Implementation:
    """One implementation of an operation.

    Attributes:
        name: as in rows.
        make: returns the callable; not called if there is an obstacle.
        exact: whether its results must have the bits of the reference.
        same: whether it computes the same operation; if not, results are not compared.
        largest: maximum number of elements.
        captures: whether a capture in a CUDA graph is tried; False if the implementation waits for the GPU.
        adapters_only: whether it is measured on adapters only.
        obstacle: why it cannot run here, or "".
    """

    name: str
    make: Callable[[], Callable[..., Any]]
    exact: bool = False
    same: bool = True
    largest: int | None = None
    captures: bool = True
    adapters_only: bool = False
    obstacle: str = ""

    def obstacle_to(self, shapes: ShapeSet) -> str:
        """Why it cannot be measured on these shapes, or ""."""
        if self.adapters_only and not shapes.adapter:
            return f"{self.name} is measured on adapters only"
        if self.largest is not None and shapes.numel > self.largest:
            return f"{self.name} takes at most {self.largest:,} elements"
        return self.obstacle


def implementations(op: str, device: torch.device) -> list[Implementation]:
    """All implementations of an operation on a device, rkif's first."""
    ours = {"observe": _observe, "threshold": _threshold, "fuse": _fuse}[op]
    backends = [backend for backend in available(device) if device.type == "cuda" or backend != "triton"]
    implementations = [
        Implementation(
            f"rkif.{backend}",
            lambda b=backend: ours(b, device),  # type: ignore[misc]
            exact=True,
            captures=backend == "triton",
        )
        for backend in backends
    ]
    return implementations + {"observe": _observing, "threshold": _selecting, "fuse": _fusing}[op](device)


def _observing(device: torch.device) -> list[Implementation]:
    return [
        Implementation("eager", lambda: baselines.observe, captures=False),
        Implementation("foreach", lambda: baselines.observe_foreach),
        Implementation("compiled", baselines.compiled_observe, obstacle=_no_compiler(device)),
    ]


def _selecting(device: torch.device) -> list[Implementation]:
    on_cpu = "" if device.type == "cpu" else "numpy works on the CPU"
    limit = baselines.QUANTILE_LIMIT
    return [
        Implementation("torch.quantile", lambda: baselines.quantile, largest=limit, captures=False),
        Implementation("torch.kthvalue", lambda: baselines.kthvalue, exact=True, captures=False),
        Implementation("torch.topk", lambda: baselines.topk, exact=True, captures=False),
        Implementation("torch.sort", lambda: baselines.sort, exact=True, captures=False),
        Implementation("numpy.partition", lambda: baselines.numpy_partition, exact=True, obstacle=on_cpu),
    ]


def _fusing(device: torch.device) -> list[Implementation]:
    no_peft = "" if importlib.util.find_spec("peft") else "peft is not installed"
    other = [
        Implementation(
            f"peft.{method} (another algorithm)",
            lambda method=method: baselines.peft_merge(method),  # type: ignore[misc]
            same=False,
            captures=False,
            adapters_only=True,
            obstacle=no_peft,
        )
        for method in ("ties", "magnitude_prune")
    ]
    return [
        Implementation("eager", lambda: baselines.fuse, captures=False),
        Implementation("foreach", lambda: baselines.fuse_foreach, captures=False),
        Implementation("compiled", baselines.compiled_fuse, captures=False, obstacle=_no_compiler(device)),
        *other,
    ]


def _no_compiler(device: torch.device) -> str:
    if device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        return "torch.compile needs a C++ compiler"
    return ""


def _observe(backend: str, device: torch.device) -> Callable[..., None]:
    nonfinite = torch.zeros(1, dtype=torch.int64, device=device)

    def run(
        params: Sequence[Tensor], grads: Sequence[Tensor], s: list[Tensor], u: list[Tensor], **betas: Any
    ) -> None:
        chosen = cast(Backend, backend)
        update_importance_(params, grads, s, u, **betas, nonfinite=nonfinite, backend=chosen)

    return run


def _threshold(backend: str, device: torch.device) -> Callable[..., Tensor]:
    return lambda scores, density: score_thresholds(scores, density=density, backend=cast(Backend, backend))


def _fuse(backend: str, device: torch.device) -> Callable[..., Any]:
    def run(*tensors: Any, **settings: Any) -> Any:
        return select_and_fuse_(*tensors, **settings, backend=cast(Backend, backend))

    return run
